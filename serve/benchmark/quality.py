"""Perplexity and divergence of a model as it is served, from what its own server says of a text."""

import http.client
import json
import math
import urllib.error
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from ria_vllm.errors import RiaError
from ria_vllm.files.text_file import read_text
from ria_vllm.progress import Monitor
from ria_vllm.serve.benchmark.engines import OpenAi
from ria_vllm.serve.benchmark.process import masked
from ria_vllm.serve.benchmark.server import Server, ask

TOP = 256  # logprobs per position
TIMEOUT = 3600.0  # seconds
# Logprobs in float32 sum to one within about this.
SMALLEST_REST = 1e-6


class Unanswered(RiaError):
    """A server does not give what it is asked for."""


@dataclass(frozen=True)
class Quality:
    """A side's perplexity on a text, and its divergence from the reference.

    Attributes:
        tokens: predicted ones: all but the first of each window.
        kl: mean over the tokens of `divergence` from the reference, in nats; 0 for the reference itself.
        unlisted: mean probability that the reference gives to tokens that not both list.
    """

    perplexity: float
    tokens: int
    kl: float
    unlisted: float


@dataclass(frozen=True)
class Listed:
    """What a server said of one position: int64 [listed] tokens, float64 [listed] logprobs, and the text's own one."""

    ids: np.ndarray
    logprobs: np.ndarray
    target: float


class TextQuality:
    """Measures sides on one text. Divergences are from the first side that is measured.

    Args:
        text: a text file.
        seq_len: tokens per window. Each window stands on its own; an incomplete last one is dropped.
        max_tokens: from the start of the text.

    Raises:
        RiaError: the text cannot be read.
    """

    def __init__(self, text: Path, seq_len: int, max_tokens: int):
        self._content = read_text(text, "--eval-data")
        self._text, self.seq_len, self._max_tokens = text, seq_len, max_tokens
        self._tokens: list[int] = []
        self._reference: list[Listed] = []

    def check(self, name: str, server: Server) -> None:
        """Split the text into tokens by this side's server.

        Raises:
            Unanswered: the server does not answer; one that ran already also if it does not give logprobs, or has too
                small a context, or other tokens than the first side.
            RiaError: it gives other tokens than an earlier side's, the text is shorter than a window, or a window does
                not fit the server's context.
        """
        if isinstance(server.engine, OpenAi):
            raise Unanswered(f"{name}: only vLLM's and llama.cpp's servers give logprobs of a prompt.")
        ask = partial(answer_of, name, server)
        try:
            tokens, context = server.engine.tokenize(ask, server.model_name, self._content)
            tokens, context = tokens[: self._max_tokens], int(context)
        except (LookupError, TypeError, ValueError) as error:
            raise Unanswered(f"{name}: its server does not answer with the text's tokens ({error!r}).") from None
        if len(tokens) < self.seq_len:
            raise RiaError(
                f"--eval-data {self._text}: {len(tokens)} tokens are less than one window of {self.seq_len}."
            )
        if context <= self.seq_len:  # the request asks for one more token
            failure = RiaError if server.process else Unanswered  # no option reaches one that ran already
            raise failure(
                f"{name}: a window of {self.seq_len} tokens and one more do not fit the server's context of "
                f"{context}. Choose a smaller --seq-len, or a larger --max-model-len in --serve-args."
            )
        if server.process is None:
            self._positions(name, server, tokens[:2])
        self._tokens = self._tokens or tokens
        if tokens != self._tokens:
            failure = RiaError if server.process else Unanswered
            raise failure(
                f"{name}: splits {self._text} into different tokens than the first side, so their perplexities are "
                "not comparable. Leave out this side, or --eval-data."
            )

    def measure(self, name: str, server: Server, monitor: Monitor) -> Quality:
        """Perplexity and divergence of a side that `check` has passed.

        Raises:
            RiaError: the server ended, refused a request or gave no usable answer.
        """
        size, is_reference = self.seq_len, not self._reference
        starts = range(0, len(self._tokens) - size + 1, size)
        targets: list[float] = []
        diverging: list[tuple[float, float]] = []
        for start in monitor.steps(starts, "windows of text", len(starts)):
            lists = self._positions(name, server, self._tokens[start : start + size])
            targets += [listed.target for listed in lists]
            if is_reference:
                self._reference += lists
            else:
                reference = self._reference[len(diverging) : len(diverging) + len(lists)]
                diverging += map(divergence, reference, lists)
        mean = -fmean(targets)
        if mean > 700:  # vLLM writes -9999 for the logarithm of 0
            raise RiaError(f"{name}: gives the text no probability. Check the folder with `ria-vllm verify`.")
        kl, unlisted = (0.0, 0.0) if is_reference else map(fmean, zip(*diverging, strict=True))
        return Quality(math.exp(mean), len(targets), kl, unlisted)

    def _positions(self, name: str, server: Server, window: list[int]) -> list[Listed]:
        """What the server says of all positions of a window but the first."""
        assert not isinstance(server.engine, OpenAi)
        ask = partial(answer_of, name, server)
        try:
            positions = server.engine.prompt_logprobs(ask, server.model_name, window, TOP)
            return [listed_in(logprobs, token) for logprobs, token in zip(positions, window[1:], strict=True)]
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise Unanswered(f"{name}: its server does not answer with the prompt's logprobs ({error!r}).") from None


def listed_in(logprobs: dict[int, float], token: int) -> Listed:
    """Raises LookupError or ValueError: the window's token is not listed, or a logprob is none."""
    ids, values = (np.array(column) for column in zip(*sorted(logprobs.items()), strict=True))
    if not (values <= SMALLEST_REST).all():  # a NaN fails too
        raise ValueError("a logprob is not a number of at most 0")
    return Listed(ids, values, logprobs[token])


def divergence(reference: Listed, side: Listed) -> tuple[float, float]:
    """A lower bound of KL(reference || side) in nats, and the reference's probability of tokens that not both list.

    Those tokens count as one: merging tokens never raises a divergence.
    """
    _, ours, theirs = np.intersect1d(reference.ids, side.ids, assume_unique=True, return_indices=True)
    log_p, log_q = reference.logprobs[ours], side.logprobs[theirs]
    p_rest = max(1 - np.exp(log_p).sum(), SMALLEST_REST)
    q_rest = max(1 - np.exp(log_q).sum(), SMALLEST_REST)
    return (np.exp(log_p) * (log_p - log_q)).sum() + p_rest * math.log(p_rest / q_rest), p_rest


def answer_of(name: str, server: Server, path: str, content: dict[str, Any] | None = None) -> Any:
    """The server's answer to a request.

    Raises:
        Unanswered: it refused the request, or is gone; names the side, and quotes its log.
    """
    try:
        return json.loads(ask(f"{server.url}{path}", content, TIMEOUT))
    except (OSError, http.client.HTTPException, ValueError) as error:
        said = ""
        if isinstance(error, urllib.error.HTTPError):
            with suppress(OSError, http.client.HTTPException):
                said = masked(error.read().decode(errors="replace"))[:500]
        problem = f"{name}: no answer from {server.url}{path} ({error}). {said}"
        raise Unanswered(f"{problem}\n{server.end_of_log()}".strip()) from None
