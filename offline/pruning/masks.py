"""Masks of the kept weights: N:M and unstructured patterns."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ria_vllm.errors import RiaError


@dataclass(frozen=True)
class Pattern:
    """N:M keeps N of every M consecutive input channels in each row; unstructured keeps a `fraction` of each row.

    Either (n, m) or fraction is set.

    Raises:
        RiaError: both or neither are set, or the pattern keeps nothing or everything.
    """

    n: int | None = None
    m: int | None = None
    fraction: float | None = None

    def __post_init__(self):
        if self.fraction is not None and (self.n, self.m) == (None, None):
            if not 0 < self.fraction < 1:
                raise RiaError(f"pattern {self}: the fraction of weights to keep must lie between 0 and 1")
        elif self.fraction is not None or self.n is None or self.m is None:
            raise RiaError("a pattern is either N:M or a fraction")
        elif not 0 < self.n < self.m <= 64:
            raise RiaError(f"pattern {self}: N:M keeps N of every M weights, 0 < N < M <= 64")

    @classmethod
    def parse(cls, text: str) -> "Pattern":
        """From "2:4" (keep two of four), "unstructured" (keep half) or "unstructured:0.3" (keep 30%).

        Raises:
            RiaError: the text is none of these, or keeps nothing or everything.
        """
        text = text.strip().lower()
        if groups := re.fullmatch(r"(\d+):(\d+)", text):
            return cls(n=int(groups[1]), m=int(groups[2]))
        if groups := re.fullmatch(r"unstructured(?::(\d*\.?\d+))?", text):
            return cls(fraction=float(groups[1] or 0.5))
        raise RiaError(f"unknown pattern {text!r}; write N:M (for example 2:4), unstructured or unstructured:FRACTION")

    @property
    def structured(self) -> bool:
        return self.m is not None

    @property
    def density(self) -> float:
        """The fraction of weights that are kept."""
        return self.n / self.m if self.structured else self.fraction

    def __str__(self) -> str:
        return f"{self.n}:{self.m}" if self.structured else f"unstructured:{self.fraction:g}"


def mask(S: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """Keep the largest scores that the pattern allows; of equal scores, the one in the lower column.

    Unstructured patterns compare the weights within each row, as Wanda does.

    Args:
        S: [out, in] scores, any floating dtype.

    Returns:
        bool [out, in], True = kept.

    Raises:
        RiaError: `in` is not a multiple of M.
    """
    rows, columns = S.shape
    if not pattern.structured:
        keep = max(1, round(columns * pattern.fraction))
        order = S.argsort(dim=1, descending=True, stable=True)[:, :keep]
        return torch.zeros(rows, columns, dtype=torch.bool, device=S.device).scatter_(1, order, True)
    if columns % pattern.m:
        raise RiaError(f"{columns} input channels do not divide into groups of {pattern.m}")
    groups = S.reshape(rows, columns // pattern.m, pattern.m).unbind(-1)
    return torch.stack(kept_of_groups(groups, pattern.n), dim=-1).reshape(rows, columns)


def kept_of_groups(scores: Sequence[torch.Tensor], n: int) -> list[torch.Tensor]:
    """Which scores are among the largest n of their group; of equal ones, the one that comes first.

    Args:
        scores: m tensors of one shape, one for each place in a group.

    Returns:
        m bool tensors of this shape.
    """
    # A score's rank is the number of scores in its group that beat it: at first, all that come after it. For such small
    # groups, counting is many times faster than sorting.
    m = len(scores)
    rank = [torch.full_like(score, m - 1 - place, dtype=torch.int8) for place, score in enumerate(scores)]
    for low in range(m):
        for high in range(low + 1, m):
            low_wins = (scores[low] >= scores[high]).view(torch.int8)
            rank[high] += low_wins
            rank[low] -= low_wins
    return [r < n for r in rank]
