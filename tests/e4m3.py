"""float8_e4m3fn by its definition: a sign, 4 bits of exponent, 3 of mantissa; the last of them is no number."""

import torch

_POSITIVE = [m * 2.0**-9 for m in range(1, 8)] + [(8 + m) * 2.0 ** (e - 10) for e in range(1, 16) for m in range(8)]
VALUES = torch.tensor([*(-one for one in _POSITIVE[-2::-1]), 0.0, *_POSITIVE[:-1]], dtype=torch.float64)
"""All 253 finite values, ascending."""


def nearest(x: torch.Tensor) -> torch.Tensor:
    """float64: the value nearest to each number, which lies within their range."""
    x = x.double()
    above = torch.searchsorted(VALUES, x.contiguous()).clamp(1, len(VALUES) - 1)
    low, high = VALUES[above - 1], VALUES[above]
    return torch.where(x - low <= high - x, low, high)
