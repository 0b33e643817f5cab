"""Perplexity and divergence of a served model, from the prompt logprobs of its own server.

The server loads nothing twice, and a format is measured as it is served. vLLM's completions take token ids and give,
for every token of the prompt, its logprob and those of the `top` likeliest ones (`prompt_logprobs`), in float32 and
before any temperature.
"""

import http.client
import json
import math
import urllib.error
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from ria_vllm.errors import RiaError
from ria_vllm.files.text_file import read_text
from ria_vllm.progress import Monitor
from ria_vllm.serve.benchmark.server import Server, ask

TOP = 256  # logprobs per position
TIMEOUT = 3600.0  # seconds
# Logprobs in float32 sum to one within about this.
SMALLEST_REST = 1e-6


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
    """What a server said of one position. ids: int64, ascending; logprobs: float64; both [listed]."""

    ids: np.ndarray
    logprobs: np.ndarray

    def logprob_of(self, token: int) -> float:
        return float(self.logprobs[np.searchsorted(self.ids, token)])


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
        self._content = read_text(text, "--text")
        self._text, self._seq_len, self._max_tokens = text, seq_len, max_tokens
        self._tokens: list[int] = []
        self._reference: list[Listed] = []

    def check(self, name: str, server: Server) -> None:
        """Split the text into tokens by this side's server.

        Raises:
            RiaError: it gives other tokens than an earlier side's, the text is shorter than a window, a window does
                not fit the server's context, or the server does not answer.
        """
        answer = answer_of(name, server, "/tokenize", {"model": server.model_name, "prompt": self._content})
        tokens, context = answer["tokens"][: self._max_tokens], answer["max_model_len"]
        if len(tokens) < self._seq_len:
            raise RiaError(
                f"--text {self._text}: {len(tokens)} tokens are less than one window of {self._seq_len}. Give a longer "
                "text, more --max-tokens or a smaller --seq-len."
            )
        if context <= self._seq_len:  # the request asks for one more token
            raise RiaError(
                f"{name}: a window of {self._seq_len} tokens and one more do not fit the server's context of "
                f"{context}. Choose a smaller --seq-len, or a larger --max-model-len in --serve-args."
            )
        self._tokens = self._tokens or tokens
        if tokens != self._tokens:
            raise RiaError(
                f"{name}: splits {self._text} into different tokens than the first side, so their perplexities are "
                "not comparable. Compare models with the same tokenizer, or leave out --text."
            )

    def measure(self, name: str, server: Server, monitor: Monitor) -> Quality:
        """Perplexity and divergence of a side that `check` has passed.

        Raises:
            RiaError: the server ended, refused a request or gave no usable answer.
        """
        size, is_reference = self._seq_len, not self._reference
        starts = range(0, len(self._tokens) - size + 1, size)
        targets: list[float] = []
        diverging: list[tuple[float, float]] = []
        for start in monitor.steps(starts, "windows of text", len(starts)):
            window = self._tokens[start : start + size]
            lists = self._positions(name, server, window)
            targets += [listed.logprob_of(token) for listed, token in zip(lists, window[1:], strict=True)]
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
        request = {"model": server.model_name, "prompt": window, "max_tokens": 1, "temperature": 0}
        answer = answer_of(name, server, "/v1/completions", request | {"prompt_logprobs": TOP})
        try:
            positions = answer["choices"][0]["prompt_logprobs"][1:]
            return [listed_in(entries, token) for entries, token in zip(positions, window[1:], strict=True)]
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise RiaError(
                f"{name}: {server.url} does not answer with the prompt's logprobs ({type(error).__name__}: {error})."
            ) from None


def listed_in(entries: dict[str, dict[str, Any]], token: int) -> Listed:
    """One entry of vLLM's `prompt_logprobs`: token id -> {"logprob", "rank", "decoded_token"}, for the likeliest tokens
    and the prompt's own.

    Raises:
        LookupError, TypeError, ValueError, AttributeError: it is not one, or has a logprob that is not one.
    """
    pairs = sorted((int(token_id), float(entry["logprob"])) for token_id, entry in entries.items())
    ids, logprobs = (np.array(column) for column in zip(*pairs, strict=True))
    if not (logprobs <= SMALLEST_REST).all():  # a NaN fails too
        raise ValueError("a logprob is not a number of at most 0")
    if token not in ids:
        raise ValueError(f"the prompt's own token {token} is not listed")
    return Listed(ids, logprobs)


def divergence(reference: Listed, side: Listed) -> tuple[float, float]:
    """A lower bound of KL(reference || side) in nats, and the reference's probability of tokens that not both list.

    Those tokens count as one: merging tokens never raises a divergence.
    """
    _, ours, theirs = np.intersect1d(reference.ids, side.ids, assume_unique=True, return_indices=True)
    log_p, log_q = reference.logprobs[ours], side.logprobs[theirs]
    p_rest = max(1 - np.exp(log_p).sum(), SMALLEST_REST)
    q_rest = max(1 - np.exp(log_q).sum(), SMALLEST_REST)
    return (np.exp(log_p) * (log_p - log_q)).sum() + p_rest * math.log(p_rest / q_rest), p_rest


def answer_of(name: str, server: Server, path: str, content: dict[str, Any]) -> Any:
    """The server's answer to a request.

    Raises:
        RiaError: it refused the request, or is gone; names the side.
    """
    try:
        return json.loads(ask(f"{server.url}{path}", content, TIMEOUT))
    except urllib.error.HTTPError as error:
        body = error.read().decode(errors="replace")
        raise RiaError(f"{name}: {server.url}{path} refused the request: {error.code} {body[:500]}") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        if not server.process.running:
            end = f"The end of {server.process.log}:\n{server.process.log_tail()}"
            raise RiaError(f"{name}: the server ended while it measured the text. {end}") from None
        raise RiaError(f"{name}: {server.url}{path} does not answer ({error}).") from None
