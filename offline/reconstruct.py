"""The update of the weights that stay, from the layer's own Gram matrix.

X is [tokens, in] and the Gram matrix X^T X [in, in]: all that ||X W^T - X W'^T||_F depends on.
"""

import math
from dataclasses import dataclass

import torch


# Rows of W at a time; what the iterations need besides the Gram matrix stays small.
ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class AdmmSolver:
    """Everything that linears with the same input share; make it with `admm_solver`.

    Columns are normalised: W is multiplied, and the Gram matrix divided, by `scale`, so that every input channel has
    norm 1 and one rho suits them all.
    """

    scale: torch.Tensor  # [in]
    gram: torch.Tensor  # [in, in] as given
    ridge: torch.Tensor  # [in] the damping, on the diagonal of the normalised matrix
    inverse: torch.Tensor  # [in, in] (normalised gram + ridge + rho)^-1
    rho: float

    def solve(self, weight: torch.Tensor, mask: torch.Tensor, iterations: int = 20) -> torch.Tensor:
        """As `admm`."""
        solved = torch.empty(weight.shape, device=weight.device)
        for out, rows, keep in zip(*(matrix.split(ROWS_AT_ONCE) for matrix in (solved, weight, mask)), strict=True):
            out.copy_(self._solve_rows(rows.float(), keep, iterations))
        return solved

    def _solve_rows(self, weight: torch.Tensor, mask: torch.Tensor, iterations: int) -> torch.Tensor:
        W = weight * self.scale
        target = weight @ self.gram / self.scale + W * self.ridge
        Z = W * mask
        U = torch.zeros_like(W)
        for _ in range(iterations):
            free = (target + self.rho * (Z - U)) @ self.inverse
            U += free
            Z = U * mask
            U -= Z
        plain, updated = weight * mask, Z / self.scale
        better = self._row_errors(weight - updated) < self._row_errors(weight - plain)
        return torch.where(better[:, None], updated, plain)

    def _row_errors(self, D: torch.Tensor) -> torch.Tensor:
        """[out] squared output errors of the rows."""
        return ((D @ self.gram) * D).sum(1)


def admm_solver(gram: torch.Tensor, damping: float = 0.01, rho: float = 1.0) -> AdmmSolver:
    """Prepare the reconstruction of all linears that read one input.

    Args:
        gram: [in, in] X^T X; channels that are always zero are allowed.
        damping: added to the diagonal, in units of its mean.
        rho: ADMM's penalty, in units of a normalised channel.
    """
    gram = gram.float()
    mean = gram.diagonal().mean()
    if not mean > 0:  # no input at all: any weights do, and these come out as they are
        gram, mean = torch.eye(gram.shape[0], device=gram.device), 1.0
    added = damping * mean
    scale = (gram.diagonal() + added).sqrt()
    # With no damping a dead channel has no scale; it has no say in the output either.
    scale = torch.where(scale > 0, scale, 1.0)
    ridge = added / scale**2
    system = gram / scale[:, None]
    system /= scale
    system.diagonal().add_(ridge + rho)
    # LAPACK works on columns; on the transpose of a symmetric matrix it does so in place.
    system = system.T
    torch.linalg.cholesky(system, out=system)
    return AdmmSolver(scale, gram, ridge, torch.cholesky_inverse(system, out=system), rho)


def admm(
    weight: torch.Tensor, gram: torch.Tensor, mask: torch.Tensor, iterations: int = 20, damping: float = 0.01,
    rho: float = 1.0,
) -> torch.Tensor:
    """The weights on the mask that keep the layer's output closest: min ||X W^T - X W'^T||_F (Boza, 2024).

    Args:
        weight: [out, in], any floating dtype.
        gram: [in, in] X^T X.
        mask: bool [out, in], True = kept.
        damping, rho: see `admm_solver`.

    Returns:
        W' [out, in] float32, zero outside the mask; no row of it serves worse than the masked weight.
    """
    return admm_solver(gram, damping, rho).solve(weight, mask, iterations)


def output_error(weight: torch.Tensor, approximation: torch.Tensor, gram: torch.Tensor) -> float:
    """||X (W - W')^T||_F / ||X W^T||_F; 0 where the output is zero anyway."""
    gram = gram.float()
    lost, whole = 0.0, 0.0
    for rows, other in zip(weight.split(ROWS_AT_ONCE), approximation.split(ROWS_AT_ONCE), strict=True):
        W, D = rows.float(), rows.float() - other.float()
        whole += float(((W @ gram) * W).sum(dtype=torch.float64))
        lost += float(((D @ gram) * D).sum(dtype=torch.float64))
    return math.sqrt(max(lost, 0.0) / whole) if whole > 0 else 0.0
