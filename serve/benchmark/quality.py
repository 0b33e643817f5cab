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
from typing import Any

import numpy as np

from ria_vllm.errors import RiaError
from ria_vllm.progress import Monitor
from ria_vllm.serve.benchmark.divergence import SMALLEST_REST, Listed, divergences
from ria_vllm.serve.benchmark.server import Server, post
from ria_vllm.text_file import read_text

TIMEOUT = 3600.0  # seconds
POSITIONS = 256  # whose divergences are computed at once


class Incomparable(RiaError):
    """The sides cannot be compared on this text."""


@dataclass(frozen=True)
class Quality:
    """A side's perplexity on a text, and its divergence from the reference.

    Attributes:
        tokens: predicted ones: all but the first of each window.
        kl: mean over the tokens of the least KL(reference || side) that both lists allow, in nats; None if the
            reference was not measured.
        unlisted: mean probability that the reference gives to tokens that not both list.
        top_logprobs: tokens listed at each position.
    """

    perplexity: float
    tokens: int
    windows: int
    seq_len: int
    top_logprobs: int
    kl: float | None
    unlisted: float | None


class TextQuality:
    """Measures sides on one text. Divergences are from the side called `reference`, which must be the first.

    Args:
        text: a text file.
        seq_len: tokens per window. Each window stands on its own; an incomplete last one is dropped.
        max_tokens: from the start of the text.
        top: logprobs per position.

    Raises:
        RiaError: the text cannot be read.
    """

    def __init__(self, text: Path, seq_len: int, max_tokens: int, top: int, reference: str):
        self._content = read_text(text, "--text")
        self._text, self._seq_len, self._max_tokens, self._top = text, seq_len, max_tokens, top
        self._reference = reference
        self._tokens: tuple[str, list[int]] | None = None
        self._dense: list[Listed] | None = None

    def check(self, name: str, server: Server) -> None:
        """Split the text into tokens by this side's server.

        Raises:
            Incomparable: it gives other tokens than an earlier side's, the text is shorter than a window, or a window
                does not fit the server's context.
            RiaError: the server does not answer.
        """
        answer = ask(name, server, "/tokenize", {"model": server.model_name, "prompt": self._content})
        try:
            tokens = [int(token) for token in answer["tokens"][: self._max_tokens]]
            context = int(answer["max_model_len"])
        except (LookupError, TypeError, ValueError):
            raise RiaError(f"{name}: {server.url}/tokenize does not answer like vLLM's server.") from None
        if len(tokens) < self._seq_len:
            raise Incomparable(
                f"--text {self._text}: {len(tokens)} tokens are less than one window of {self._seq_len}. Give a longer "
                "text, more --max-tokens or a smaller --seq-len."
            )
        if context <= self._seq_len:  # the request asks for one more token
            raise Incomparable(
                f"{name}: a window of {self._seq_len} tokens and one more do not fit the server's context of "
                f"{context}. Choose a smaller --seq-len, or a larger --max-model-len in --serve-args."
            )
        if self._tokens is None:
            self._tokens = (name, tokens)
        first, expected = self._tokens
        if tokens != expected:
            raise Incomparable(
                f"{name}: splits {self._text} into different tokens than {first}, so their perplexities are not "
                "comparable. Compare models with the same tokenizer, or leave out --text."
            )

    def measure(self, name: str, server: Server, monitor: Monitor) -> Quality:
        """Perplexity and divergence of a side that `check` has passed.

        Raises:
            RiaError: the server ended, refused a request or gave no usable answer.
        """
        assert self._tokens is not None
        tokens, size = self._tokens[1], self._seq_len
        windows = [tokens[start : start + size] for start in range(0, len(tokens) - size + 1, size)]
        shown = monitor.steps(windows, "windows of text", len(windows))
        listed = [position for window in shown for position in self._positions(name, server, window)]
        mean = -math.fsum(position.target for position in listed) / len(listed)
        if mean > 700:  # vLLM writes -9999 for the logarithm of 0
            raise RiaError(f"{name}: gives the text no probability. Check the folder with `ria-vllm verify`.")
        kl, unlisted = (0.0, None) if name == self._reference else (None, None)
        if name == self._reference:
            self._dense = listed
        elif self._dense is not None:
            parts = [slice(start, start + POSITIONS) for start in range(0, len(listed), POSITIONS)]
            shown_parts = monitor.steps(parts, "divergence", len(parts))
            found = [divergences(self._dense[part], listed[part]) for part in shown_parts]
            kl, unlisted = (float(np.concatenate(column).mean()) for column in zip(*found, strict=True))
        return Quality(math.exp(mean), len(listed), len(windows), size, self._top, kl, unlisted)

    def _positions(self, name: str, server: Server, window: list[int]) -> list[Listed]:
        """What the server says of all positions of a window but the first."""
        request = {"model": server.model_name, "prompt": window, "max_tokens": 1, "temperature": 0}
        answer = ask(name, server, "/v1/completions", request | {"prompt_logprobs": self._top})
        try:
            positions = answer["choices"][0]["prompt_logprobs"][1:]
            listed = [
                read_position(entries, token, self._top) for entries, token in zip(positions, window[1:], strict=True)
            ]
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise RiaError(
                f"{name}: {server.url} does not answer with the prompt's logprobs ({type(error).__name__}: {error})."
            ) from None
        return listed


def read_position(entries: dict[str, dict[str, Any]], token: int, top: int) -> Listed:
    """One entry of vLLM's `prompt_logprobs`: token id -> {"logprob", "rank", "decoded_token"}, for the `top` likeliest
    tokens and the prompt's own.

    Raises:
        LookupError, TypeError, ValueError, AttributeError: it is not one, or has a logprob that is not one.
    """
    pairs = sorted((int(token_id), float(entry["logprob"])) for token_id, entry in entries.items())
    ids, logprobs = (np.array(column) for column in zip(*pairs, strict=True))
    if not (logprobs <= SMALLEST_REST).all():  # a NaN fails too
        raise ValueError("a logprob is not a number of at most 0")
    return Listed(ids, logprobs, float(np.sort(logprobs)[-min(top, len(pairs))]), dict(pairs)[token])


def ask(name: str, server: Server, path: str, content: dict[str, Any]) -> Any:
    """The server's answer to a request.

    Raises:
        RiaError: it refused the request, or is gone; names the side.
    """
    try:
        return post(f"{server.url}{path}", content, TIMEOUT)
    except urllib.error.HTTPError as error:
        raise RiaError(f"{name}: {server.url}{path} refused the request: {message_of(error)}") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        if server.process is not None and not server.process.running:
            end = f"The end of {server.process.log}:\n{server.process.log_tail()}"
            raise RiaError(f"{name}: the server ended while it measured the text. {end}") from None
        raise RiaError(f"{name}: {server.url}{path} does not answer ({error}).") from None


def message_of(error: urllib.error.HTTPError) -> str:
    """The error's message, or the start of its body if it is not in OpenAI's form."""
    body = error.read().decode(errors="replace")
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return f"{error.code} {body[:300]}"
