"""Windows of two kinds of text: some are drawn from a file or a data set, and the dense model writes the others."""

from collections.abc import Iterable

import torch

from ria_vllm.errors import RiaError

HELD_OUT = 1024  # tokens, at least


def written_of(windows: int, fraction: float) -> int:
    """How many of the windows the dense model writes; never all of them."""
    return max(0, min(round(windows * fraction), windows - 1))


def held_out_of(samples: int, seq_len: int) -> int:
    """How many samples are drawn besides, to which nothing is fitted: they decide, and say how much is lost. An eighth,
    but at least HELD_OUT tokens, or as many as there are to fit to."""
    return max(-(-samples // 8), min(samples, -(-HELD_OUT // seq_len)))


def check_fraction(fraction: float, windows: int, text: str) -> None:
    """Refuse a `--self-written` that is no fraction, none of the windows, or beside a `text` that is all written.

    Raises:
        RiaError: see above.
    """
    if not 0 <= fraction < 1:
        raise RiaError(f"--self-written {fraction}: give a fraction from 0 to less than 1.")
    if fraction and windows > 0 and not written_of(windows, fraction):
        raise RiaError(f"--self-written {fraction}: of {windows} sequences, that is none. Give more or nothing.")
    if fraction and text == "self":
        raise RiaError("--data self: the dense model writes all of the text, so leave out --self-written.")


def spread_among(windows: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """[n, seq_len] and [k, seq_len] -> [n + k, seq_len]: the others evenly among the windows, all in their order."""
    total = len(windows) + len(others)
    if not len(others):
        return windows
    places = torch.arange(total + 1) * len(others) // total
    is_other = places[1:] > places[:-1]
    found = windows.new_empty(total, windows.shape[1])
    found[is_other], found[~is_other] = others.to(windows.dtype), windows
    return found


def check_vocabulary(windows: Iterable[torch.Tensor], vocabulary: int, name: str) -> None:
    """Refuse tokens that the model `name` does not know.

    Raises:
        RiaError: there are some.
    """
    largest = max(int(one.max()) for one in windows)
    if largest >= vocabulary:
        raise RiaError(f"{name}: its tokenizer produces token {largest}, but the model knows only {vocabulary} tokens.")
