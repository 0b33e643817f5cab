"""SparseGPT (Frantar and Alistarh, ICML 2023): prune column by column; later columns compensate for the error."""

import torch

from ria_vllm.format.pattern import TWO_OF_FOUR, Pattern
from ria_vllm.offline.pruning.admm import damping_of
from ria_vllm.offline.pruning.masks import mask
from ria_vllm.offline.pruning.symmetric import SymmetricMatrix, inverted_in_place


def sparsegpt(
    weight: torch.Tensor,
    gram: torch.Tensor | SymmetricMatrix,
    block: int = 128,
    damping: float = 0.01,
    order: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
    pattern: Pattern = TWO_OF_FOUR,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prune and update one linear.

    H is the damped Gram matrix (the Hessian) and R the upper Cholesky factor of its inverse. Removing w_j costs
    w_j^2 / R_jj^2, and w_k -= (w_j / R_jj) R_jk on the columns k > j compensates for it. The mask of a group is
    chosen when its first column is reached.

    Args:
        weight: [out, in], any floating dtype.
        gram: [in, in] X^T X.
        block: columns within a block are updated after each column, those behind it after each block.
        damping: added to the diagonal of the Gram matrix, in units of its mean.
        order: int64 [in], the channel of `gram` that each column of the weight reads; None: the same order.
        scales: [in], by which the channels of X were divided, for the damping; see `damping_of`.

    Returns:
        (W' [out, in] float32, mask bool [out, in], True = kept); W' is zero outside the mask.

    Raises:
        RiaError: `in` does not divide into the pattern's groups.
    """
    W = weight.float().clone()
    rows, columns = W.shape
    group = pattern.of
    block = max(group, block // group * group)
    dead = gram.diagonal() == 0
    # Weights of a channel that is always zero are pruned first.
    W[:, dead if order is None else dead[order]] = 0
    R = _inverse_factor(gram, damping, order, scales)
    kept = torch.ones(rows, columns, dtype=torch.bool, device=W.device)
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        part, factor, keep = W[:, start:stop], R[start:stop, start:stop], kept[:, start:stop]
        errors = torch.zeros_like(part)
        for j in range(stop - start):
            if j % group == 0:
                upcoming = slice(j, j + group)
                keep[:, upcoming] = mask((part[:, upcoming] / factor.diagonal()[upcoming]).abs(), pattern)
            error = torch.where(keep[:, j], 0.0, part[:, j]) / factor[j, j]
            part[:, j:] -= error[:, None] * factor[j, j:]
            errors[:, j] = error
        W[:, stop:] -= errors @ R[start:stop, stop:]
    return W * kept, kept


def _inverse_factor(
    gram: torch.Tensor | SymmetricMatrix, damping: float, order: torch.Tensor | None, scales: torch.Tensor | None
) -> torch.Tensor:
    """The upper Cholesky factor of the inverse [in, in] float32, in the memory of one such matrix."""
    H = (gram if isinstance(gram, SymmetricMatrix) else SymmetricMatrix.of(gram.float())).dense(order)
    diagonal = H.diagonal()
    if scales is not None and order is not None:
        scales = scales[order]
    diagonal += damping_of(diagonal, damping, scales)
    diagonal[diagonal == 0] = 1.0
    H = inverted_in_place(H)
    return torch.linalg.cholesky(H, upper=True, out=H)
