"""SmoothQuant's scales (Xiao et al., ICML 2023): they move outliers from the channels of an input into the weights.

X W^T = (X / s) (W s)^T for scales s of the channels. The paper's are s_j = max |X_j|^a / max |W_j|^(1 - a), where a is
the migration strength. Two things are different here. Instead of max |X_j| it is ||X_j||: a few tokens, such as a
text's first one, have maxima that say little of all others. And scales are powers of two, with which floating point
multiplies and divides exactly.
"""

import torch

# Temporaries are in float64: they are those of so many rows.
ROWS_AT_ONCE = 1024


def migration_scales(inputs: torch.Tensor, weights: torch.Tensor, strength: float) -> torch.Tensor:
    """The scale of each channel, a power of two; their geometric mean is about 1.

    Args:
        inputs: [channels] ||X_j||, in any unit.
        weights: [channels] max |W_j|, over all linears that read X.
        strength: a, from 0 (only weights become alike) to 1 (only inputs do).

    Returns:
        float64 [channels]; 1 for channels that are always zero.
    """
    inputs, weights = inputs.double(), weights.double()
    alive = (inputs > 0) & (weights > 0)
    logs = strength * torch.where(alive, inputs, 1.0).log2() - (1 - strength) * torch.where(alive, weights, 1.0).log2()
    mean = logs[alive].mean() if bool(alive.any()) else 0.0
    return torch.where(alive, torch.exp2((logs - mean).round()), 1.0)


def divided(gain: torch.Tensor, scales: torch.Tensor, offset: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight of a norm that multiplies by gain + offset, after its outputs were divided by `scales`, and by what
    exactly it then divides them: the new gain has to be rounded, and the scales that come back make up for that.

    Args:
        gain: [channels], any floating dtype.
        scales: float64 [channels], positive.

    Returns:
        (the new gain in its dtype, float64 scales). Both are unchanged where rounding would move the gain far.
    """
    before = gain.double() + offset
    new = (before / scales - offset).to(gain.dtype)
    after = new.double() + offset
    exact = torch.where(after == 0, 1.0, before / torch.where(after == 0, 1.0, after))
    good = (before != 0) & (after != 0) & (exact > scales / 2) & (exact < scales * 2)
    return torch.where(good, new, gain), torch.where(good, exact, 1.0)


def times(tensor: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """`tensor` times `factors` (float64, broadcast) in its dtype."""
    product, factors = torch.empty_like(tensor), factors.expand(tensor.shape)
    for start in range(0, len(tensor), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        product[rows] = (tensor[rows].double() * factors[rows]).to(tensor.dtype)
    return product
