"""The importance score of each weight, which decides what is pruned.

W is [out, in]; ||X_j|| is the l2 norm of input channel j over all calibration tokens.
"""

import torch


def score(
    method: str, weight: torch.Tensor, input_norm: torch.Tensor, column_sums: torch.Tensor | None = None
) -> torch.Tensor:
    """Importance S of every weight.

    ria        S_ij = (|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) * sqrt(||X_j||)      (Zhang et al., ICLR 2024)
    wanda      S_ij = |W_ij| * ||X_j||                                                     (Sun et al., ICLR 2024)
    magnitude  S_ij = |W_ij|

    Args:
        method: one of these.
        weight: [out, in], any floating dtype; computed in float32.
        input_norm: [in], ||X_j||; ignored by magnitude.
        column_sums: [in], sum_i |W_ij|, where `weight` has only some of the rows; None: over the rows given.

    Returns:
        S [out, in] float32, never NaN for finite input: a row or column of zeros scores 0.
    """
    magnitude = weight.abs().float()
    if method == "magnitude":
        return magnitude
    norm = input_norm.float()
    if method == "wanda":
        return magnitude * norm
    column_sums = magnitude.sum(0) if column_sums is None else column_sums
    relative = _share(magnitude, column_sums)
    relative += _share(magnitude, magnitude.sum(1, keepdim=True))
    return relative.mul_(norm**0.5)


def _share(magnitude: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    # If the sum is 0, so are all its terms; dividing by 1 keeps them 0.
    return magnitude / torch.where(total > 0, total, 1.0)
