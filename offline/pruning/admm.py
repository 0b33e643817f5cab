"""ADMM reconstruction: update the kept weights of a linear, from the Gram matrix of its input.

X is [tokens, in]. The error ||X W^T - X W'^T||_F depends on X only through its Gram matrix X^T X [in, in]. If the
output should be some Y other than X W^T, it also depends on the cross term (Y - X W^T)^T X [out, in]; see
`ria_vllm.offline.pruning.drift`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ria_vllm.offline.pruning.drift import Drift
from ria_vllm.offline.pruning.symmetric import BlockInverse, SymmetricMatrix, inverted_in_place

# Inputs up to this width have their Gram matrix and its inverse dense: products are a little faster (5% at 1536), and
# 16 MB each are little beside what a layer takes anyway. For wider ones only half of each is stored.
DENSE_WIDTH = 2048
# Rows of W that are solved together, so that temporaries stay small beside the Gram matrix.
ROWS_AT_ONCE = 128
# The mask may change in this many iterations, the first ones.
CHOOSING = 12
# Measured on SmolLM2: with less damping, errors on few tokens dominate; with more, the update does too little.
DAMPING = 0.2

# Chooses a mask: [rows, in] weights -> bool [rows, in], True = kept.
Choice = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class AdmmSolver:
    """What all linears with the same input share; made by `admm_solver`.

    Columns are normalised: W is multiplied, and the Gram matrix divided, by `scale`, so that every input channel has
    norm 1 and one rho, 1, suits them all.
    """

    scale: torch.Tensor  # [in]
    gram: torch.Tensor | SymmetricMatrix  # [in, in]
    ridge: torch.Tensor  # [in], the damping on the diagonal of the normalised matrix
    inverse: torch.Tensor | BlockInverse  # [in, in], (normalised gram + ridge + 1)^-1

    def solve(
        self,
        weight: torch.Tensor,
        mask: torch.Tensor,
        iterations: int = 20,
        cross_term: torch.Tensor | None = None,
        choose: Choice | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The weights on the mask that bring the layer's output closest to Y: min ||Y - X W'^T||_F (Boza, 2024).

        Args:
            weight: [out, in], any floating dtype; damping keeps W' close to it.
            mask: bool [out, in], True = kept.
            cross_term: [out, in] float32 (Y - X W^T)^T X; None for Y = X W^T.
            choose: chooses the mask anew in each of the first iterations, from the weights that ADMM would have then
                if none were pruned; afterwards the mask is fixed. None: the mask is fixed from the start.

        Returns:
            (W' [out, in] float32, mask bool [out, in]); W' is zero outside the mask, and no row has a larger error than
            the masked weight.
        """
        solved, kept = torch.empty(weight.shape, device=weight.device), torch.empty_like(mask)
        for start in range(0, len(weight), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            cross_term_rows = None if cross_term is None else cross_term[rows]
            solved[rows], kept[rows] = self._solve_rows(
                weight[rows].float(), mask[rows], iterations, cross_term_rows, choose
            )
        return solved, kept

    def _solve_rows(
        self,
        weight: torch.Tensor,
        mask: torch.Tensor,
        iterations: int,
        cross_term: torch.Tensor | None,
        choose: Choice | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        W = weight * self.scale
        target = weight @ self.gram / self.scale + W * self.ridge
        if cross_term is not None:
            target += cross_term / self.scale
        Z = W * mask
        U = torch.zeros_like(W)
        keep = mask
        for iteration in range(iterations):
            free = (target + (Z - U)) @ self.inverse
            U += free
            if choose is not None and iteration < CHOOSING:
                keep = choose(U / self.scale)
            Z = U * keep
            U -= Z
        plain, updated = weight * mask, Z / self.scale
        better = self._row_errors(updated - weight, cross_term) < self._row_errors(plain - weight, cross_term)
        better = better[:, None]
        return torch.where(better, updated, plain), torch.where(better, keep, mask)

    def _row_errors(self, D: torch.Tensor, cross_term: torch.Tensor | None) -> torch.Tensor:
        """[out]: the squared output error of each row of W + D, up to a term that does not depend on D."""
        change = D @ self.gram
        return ((change if cross_term is None else change - 2 * cross_term) * D).sum(1)


def damping_of(diagonal: torch.Tensor, damping: float, scales: torch.Tensor | None = None) -> torch.Tensor:
    """What is added to the diagonal of a Gram matrix X^T X: [in], or one number for all channels.

    Args:
        diagonal: [in], that of the matrix.
        damping: in units of its mean.
        scales: [in], by which the channels of X were divided. Units are those of before, so that this changes nothing.
    """
    mean = (diagonal if scales is None else diagonal * scales**2).mean()
    added = damping * torch.where(mean > 0, mean, 1.0)  # without any input, any weights will do
    return added if scales is None else added / scales**2


def admm_solver(gram: SymmetricMatrix, damping: float = DAMPING, scales: torch.Tensor | None = None) -> AdmmSolver:
    """Prepare the reconstruction of all linears that read one input.

    For a wide input the solver takes, besides `gram`, half the memory of a dense [in, in] matrix, and no more while it
    is made.

    Args:
        gram: [in, in] X^T X; channels that are always zero are allowed.
        damping, scales: see `damping_of`.

    Raises:
        torch.linalg.LinAlgError: the damped matrix is not positive definite.
    """
    diagonal = gram.diagonal()
    added = damping_of(diagonal, damping, scales)
    scale = (diagonal + added).sqrt()
    # Without damping a dead channel has scale 0; it does not matter for the output either.
    scale = torch.where(scale > 0, scale, 1.0)
    ridge = added / scale**2
    if gram.width > DENSE_WIDTH:
        half = gram.normalised(scale)
        half.add_to_diagonal(ridge + 1)
        return AdmmSolver(scale, gram, ridge, half.into_inverse())
    dense = gram.dense()
    system = dense / scale[:, None]
    system /= scale
    system.diagonal().add_(ridge + 1)
    return AdmmSolver(scale, dense, ridge, inverted_in_place(system))


def output_error(
    weight: torch.Tensor,
    approximation: torch.Tensor,
    gram: SymmetricMatrix,
    drift: Drift | None = None,
) -> float:
    """||Y - X W'^T||_F / ||Y||_F, where Y = X W^T if there is no drift; 0 if Y is zero.

    Args:
        weight: W [out, in].
        approximation: W' [out, in].
        gram: X^T X [in, in].
    """
    cross_term = None if drift is None else drift.cross_term(weight)
    lost = whole = 0.0 if drift is None else drift.squared_residual(weight)
    for start in range(0, len(weight), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        W = weight[rows].float()
        D = approximation[rows].float() - W
        kept, change = W @ gram, D @ gram
        if cross_term is not None:
            kept += 2 * cross_term[rows]
            change -= 2 * cross_term[rows]
        whole += float((kept * W).sum(dtype=torch.float64))
        lost += float((change * D).sum(dtype=torch.float64))
    return math.sqrt(max(lost, 0.0) / whole) if whole > 0 else 0.0
