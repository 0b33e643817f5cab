"""The update of the weights that stay, from the layer's own Gram matrix.

X is [tokens, in] and the Gram matrix X^T X [in, in]: all that ||X W^T - X W'^T||_F depends on. Where the output is to be
another Y than X W^T, its pull (Y - X W^T)^T X [out, in] comes in as well; see `ria_vllm.offline.pruning.drift`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ria_vllm.offline.pruning.drift import Drift
from ria_vllm.offline.pruning.symmetric import BlockInverse, SymmetricMatrix, inverted_in_place

# Inputs up to this width have their Gram matrix and its inverse dense: products are a little faster (5% at 1536), and
# 16 MB each are little beside what a layer takes anyway. For wider ones half of each is kept.
DENSE_WIDTH = 2048
# Rows of W at a time; what the iterations need besides the Gram matrix stays small.
ROWS_AT_ONCE = 128
# Of the iterations, those in which the mask may still change.
CHOOSING = 12
# Measured on SmolLM2: with less, errors that few tokens make pull too hard; with more, the update does too little.
DAMPING = 0.2

# [rows, in] weights -> bool [rows, in], those that stay.
Choice = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class AdmmSolver:
    """Everything that linears with the same input share; make it with `admm_solver`.

    Columns are normalised: W is multiplied, and the Gram matrix divided, by `scale`, so that every input channel has
    norm 1 and one rho suits them all.
    """

    scale: torch.Tensor  # [in]
    gram: torch.Tensor | SymmetricMatrix  # [in, in]
    ridge: torch.Tensor  # [in] the damping, on the diagonal of the normalised matrix
    inverse: torch.Tensor | BlockInverse  # [in, in] (normalised gram + ridge + rho)^-1
    rho: float

    def solve(
        self,
        weight: torch.Tensor,
        mask: torch.Tensor,
        iterations: int = 20,
        pull: torch.Tensor | None = None,
        choose: Choice | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `admm`, with the mask that came of it.

        Args:
            choose: chooses the mask anew in each of the first iterations, from the weights that ADMM would have there
                if all of them stayed; then the mask stays. None: it stays from the start.
        """
        solved, kept = torch.empty(weight.shape, device=weight.device), torch.empty_like(mask)
        for start in range(0, len(weight), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            wanted = None if pull is None else pull[rows]
            solved[rows], kept[rows] = self._solve_rows(weight[rows].float(), mask[rows], iterations, wanted, choose)
        return solved, kept

    def _solve_rows(
        self, weight: torch.Tensor, mask: torch.Tensor, iterations: int, pull: torch.Tensor | None, choose: Choice | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        W = weight * self.scale
        target = weight @ self.gram / self.scale + W * self.ridge
        if pull is not None:
            target += pull / self.scale
        Z = W * mask
        U = torch.zeros_like(W)
        keep = mask
        for iteration in range(iterations):
            free = (target + self.rho * (Z - U)) @ self.inverse
            U += free
            if choose is not None and iteration < CHOOSING:
                keep = choose(U / self.scale)
            Z = U * keep
            U -= Z
        plain, updated = weight * mask, Z / self.scale
        better = self._row_errors(updated - weight, pull) < self._row_errors(plain - weight, pull)
        better = better[:, None]
        return torch.where(better, updated, plain), torch.where(better, keep, mask)

    def _row_errors(self, D: torch.Tensor, pull: torch.Tensor | None) -> torch.Tensor:
        """[out] squared output errors of the rows of W + D, less what no D can change."""
        change = D @ self.gram
        return ((change if pull is None else change - 2 * pull) * D).sum(1)


def admm_solver(gram: torch.Tensor | SymmetricMatrix, damping: float = DAMPING, rho: float = 1.0) -> AdmmSolver:
    """Prepare the reconstruction of all linears that read one input.

    For a wide input the solver takes half the room of a dense [in, in] matrix besides `gram`, and no more on the way.

    Args:
        gram: [in, in] X^T X; channels that are always zero are allowed.
        damping: added to the diagonal, in units of its mean.
        rho: ADMM's penalty, in units of a normalised channel.

    Raises:
        torch.linalg.LinAlgError: the damped matrix is not positive definite.
    """
    gram = _suited(gram)
    diagonal = gram.diagonal()
    mean = diagonal.mean()
    added = damping * (mean if mean > 0 else 1.0)  # no input at all: any weights do
    scale = (diagonal + added).sqrt()
    # With no damping a dead channel has no scale; it has no say in the output either.
    scale = torch.where(scale > 0, scale, 1.0)
    ridge = added / scale**2
    return AdmmSolver(scale, gram, ridge, _inverse(gram, scale, ridge + rho), rho)


def _suited(gram: torch.Tensor | SymmetricMatrix) -> torch.Tensor | SymmetricMatrix:
    """The matrix as it is best multiplied by: dense if it is narrow, half of it if it is wide; float32."""
    if isinstance(gram, SymmetricMatrix):
        return gram.dense() if gram.width <= DENSE_WIDTH else gram
    gram = gram.float()
    return gram if len(gram) <= DENSE_WIDTH else SymmetricMatrix.of(gram)


def _inverse(
    gram: torch.Tensor | SymmetricMatrix, scale: torch.Tensor, added: torch.Tensor
) -> torch.Tensor | BlockInverse:
    """The inverse of gram, divided by `scale` [in] on both sides and with `added` [in] on the diagonal."""
    if isinstance(gram, SymmetricMatrix):
        half = gram.normalised(scale)
        half.add_to_diagonal(added)
        return half.into_inverse()
    system = gram / scale[:, None]
    system /= scale
    system.diagonal().add_(added)
    return inverted_in_place(system)


def admm(
    weight: torch.Tensor,
    gram: torch.Tensor | SymmetricMatrix,
    mask: torch.Tensor,
    iterations: int = 20,
    damping: float = DAMPING,
    rho: float = 1.0,
    pull: torch.Tensor | None = None,
) -> torch.Tensor:
    """The weights on the mask that bring the layer's output closest to Y: min ||Y - X W'^T||_F (Boza, 2024).

    Args:
        weight: [out, in], any floating dtype.
        gram: [in, in] X^T X.
        mask: bool [out, in], True = kept.
        damping, rho: see `admm_solver`; the damping pulls towards `weight`.
        pull: [out, in] float32 (Y - X W^T)^T X; None for Y = X W^T.

    Returns:
        W' [out, in] float32, zero outside the mask; no row of it serves worse than the masked weight.
    """
    return admm_solver(gram, damping, rho).solve(weight, mask, iterations, pull)[0]


def output_error(
    weight: torch.Tensor,
    approximation: torch.Tensor,
    gram: torch.Tensor | SymmetricMatrix,
    drift: Drift | None = None,
) -> float:
    """||Y - X W'^T||_F / ||Y||_F, with Y = X W^T where there is no drift; 0 where Y is zero anyway."""
    gram = gram if isinstance(gram, SymmetricMatrix) else gram.float()
    pull = None if drift is None else drift.pull(weight)
    lost = whole = 0.0 if drift is None else drift.gap(weight)
    for start in range(0, len(weight), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        W = weight[rows].float()
        D = approximation[rows].float() - W
        kept, change = W @ gram, D @ gram
        if pull is not None:
            kept += 2 * pull[rows]
            change -= 2 * pull[rows]
        whole += float((kept * W).sum(dtype=torch.float64))
        lost += float((change * D).sum(dtype=torch.float64))
    return math.sqrt(max(lost, 0.0) / whole) if whole > 0 else 0.0
