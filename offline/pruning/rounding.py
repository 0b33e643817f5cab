"""Rounding as a part of the reconstruction: kept weights become integers, or e4m3, times scales, and make up for each
other.

A row q of the rounded weight should minimise q A q^T - 2 b q^T, where A is the damped Gram matrix of the input and b
the row's target times A: the least squares of `ria_vllm.offline.pruning.admm`, with q on a grid. Coordinate descent
does this. With all other entries fixed, the best value of entry j on any grid is the one nearest to
q_j - (q A - b)_j / A_jj; with all values fixed, the best scale of a group is a quotient, rounded to one that can be
stored. No step raises the error.
(Coordinate descent for dense weights: Behdin et al., "QuantEase", 2023; Nair and Suggala, "CDQuant", 2024.)

A GPTQ sweep makes all later columns compensate for each rounded one. Here half of these are pruned, in each row others,
so a sweep can do worse than plain rounding. docs/lab/quality.md has the figures for this and for the number of passes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ria_vllm.format import permutation
from ria_vllm.format.formats import RoundedFormat, wide_scales
from ria_vllm.offline.pruning.admm import DAMPING, DENSE_WIDTH, damping_of
from ria_vllm.offline.pruning.symmetric import SymmetricMatrix

# Entries of the rows that are rounded together, but no fewer rows than that. Each column is a step: with fewer rows,
# steps are too short to be fast, most of all on a GPU.
ENTRIES_AT_ONCE, ENTRIES_AT_ONCE_ON_GPUS, LEAST_ROWS = 1 << 20, 1 << 24, 256
# Columns of a block if scales are per row. The gradient of the others is updated once for each block.
BLOCK = 64
PASSES = 3
# Scales are searched for from the one that fits the largest magnitude down to this part of it, in so many steps; those
# of int4 groups among the multiples of their unit.
SMALLEST, STEPS = 0.4, 25


@dataclass(frozen=True)
class Objective:
    """What the rounded weight of a linear should minimise.

    Attributes:
        gram: X^T X [in, in].
        cross_term: [out, in] float32, see `ria_vllm.offline.pruning.admm`; None: the target is X W^T.
        damping, divided_by: of the Gram matrix, as ADMM does it; see `damping_of`, where the latter is `scales`.
    """

    gram: SymmetricMatrix
    cross_term: torch.Tensor | None = None
    damping: float = DAMPING
    divided_by: torch.Tensor | None = None


def round_on_mask(
    weight: torch.Tensor,
    solved: torch.Tensor,
    mask: torch.Tensor,
    objective: Objective,
    weight_format: RoundedFormat,
    p: torch.Tensor | None = None,
    passes: int = PASSES,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round the kept weights of a linear so that its output stays closest to its target.

    Besides its arguments it takes some rows' worth of temporaries and a copy of the Gram matrix, in the stored order.

    Args:
        weight: W [out, in], the dense weight in the model's own order, any floating dtype.
        solved: W' [out, in], zero outside the mask: where the descent starts.
        mask: bool [out, in], True = kept.
        p: int64 [in], the order in which columns are stored; None: the model's own.

    Returns:
        (W'' [out, in] float32, values times scales, zero outside the mask; the scales [out, 1] or
        [out, in / group_size], in the format's `scale_dtype`.) If `solved` is float32, W'' takes its place in memory.
        No row has a larger damped error than W' rounded to the nearest values, be it by `nearest_scales` or by the
        scales that fit its largest magnitudes.
    """
    solved = solved.float()
    gram, cross_term = objective.gram, objective.cross_term
    added = damping_of(gram.diagonal(), objective.damping, objective.divided_by).expand(gram.width)
    system = _System(gram, p, added, weight_format.group_size or BLOCK)
    back = None if p is None else permutation.invert(p)
    scales = []
    for rows in _some_rows(weight):
        target = system.product(_take(weight[rows].float(), p))
        if cross_term is not None:
            target += _take(cross_term[rows], p)
        W, kept = _take(solved[rows], p), _take(mask[rows], p)
        fitting, searched = weight_format.scales_of(W), nearest_scales(W, weight_format, system.diagonal)
        units = weight_format.units_of(fitting)
        found = _Rows(W, searched, system, target, weight_format, units)
        found.replace_where_worse(_Rows(W, fitting, system, target, weight_format, units))
        del W
        for _ in range(passes):
            found.descend(kept, system, target)
        solved[rows] = _take(found.weight(), back)
        scales.append(found.scales.to(searched.dtype))
    return solved, torch.cat(scales)


def nearest_scales(
    weight: torch.Tensor, weight_format: RoundedFormat, importance: torch.Tensor | None = None
) -> torch.Tensor:
    """The scales by which rounding to the nearest value costs least; they may clip the largest magnitudes.

    Args:
        weight: [out, in], columns in the stored order. Temporaries are several times as large, in float32.
        importance: [in], what a squared error in each column costs; None: the same in all.

    Returns:
        [out, 1] or [out, in / group_size], positive, in the format's `scale_dtype`.
    """
    fitting = weight_format.scales_of(weight)
    groups = (fitting.shape[1], -1)
    cost = None if importance is None else importance.float().view(groups)
    W = weight.float().unflatten(1, groups)
    found, least = fitting, torch.full(fitting.shape, torch.inf, device=fitting.device)
    for scales in _candidates(fitting, weight_format):
        wide = scales.float()[..., None]
        lost = weight_format.round_(W / wide).mul_(wide).sub_(W).square_()
        total = (lost if cost is None else lost.mul_(cost)).sum(-1)
        better = total < least
        least = torch.where(better, total, least)
        found = torch.where(better, scales, found)
    return found


def _candidates(fitting: torch.Tensor, weight_format: RoundedFormat) -> Iterator[torch.Tensor]:
    """Scales to choose from, each of `fitting`'s shape and dtype."""
    if weight_format.largest_multiple is not None:
        units = weight_format.units_of(fitting)
        assert units is not None
        for multiple in range(weight_format.largest_multiple, 0, -1):
            yield (units * multiple).to(fitting.dtype).expand_as(fitting)
        return
    for factor in torch.linspace(1.0, SMALLEST, STEPS).tolist():
        scales = (fitting.float() * factor).to(fitting.dtype)
        yield torch.where(scales > 0, scales, 1.0)


class _System:
    """A [in, in]: the Gram matrix, damped and in the stored order, by blocks of rows.

    diagonal: [in]; block: rows of a block; added: [in], to the diagonal, in the model's own order.
    """

    def __init__(self, gram: SymmetricMatrix, p: torch.Tensor | None, added: torch.Tensor, block: int):
        added = added if p is None else added[p]
        self.width, self.block = gram.width, block
        self.matrix: Any = gram.dense(p) if gram.width <= DENSE_WIDTH else gram.copy(p)
        if isinstance(self.matrix, SymmetricMatrix):
            self.matrix.add_to_diagonal(added)
        else:
            self.matrix.diagonal().add_(added)
        self.diagonal = self.matrix.diagonal()

    def blocks(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        """(first row, row after the last, rows [block, in]), one after the other."""
        for start in range(0, self.width, self.block):
            stop = min(start + self.block, self.width)
            half = isinstance(self.matrix, SymmetricMatrix)
            yield start, stop, self.matrix.neighbours(start, stop) if half else self.matrix[start:stop]

    def product(self, rows: torch.Tensor) -> torch.Tensor:
        """`rows` A, for rows [any, in]."""
        total = torch.zeros_like(rows)
        for start, stop, block in self.blocks():
            total.addmm_(rows[:, start:stop], block)
        return total


class _Rows:
    """Some rows of the rounded weight, in the stored order.

    values: float32 [rows, in], of the format; scales: float32 [rows, 1 or groups], such as can be stored; units: those
    of the scales, see `RoundedFormat.units_of`; gradient: half of it, q A - b [rows, in].
    """

    def __init__(
        self,
        W: torch.Tensor,
        scales: torch.Tensor,
        system: _System,
        target: torch.Tensor,
        weight_format: RoundedFormat,
        units: torch.Tensor | None,
    ):
        """At first they are W [rows, in], rounded to the nearest values."""
        self.format, self.round_, self.columns = weight_format, weight_format.round_, weight_format.group_size
        self.scales, self.units = scales.float().clone(), units
        self.values = self.round_(W / wide_scales(self.scales, W.shape[1]))
        self.gradient = system.product(self.weight()).sub_(target)

    def weight(self) -> torch.Tensor:
        """float32 [rows, in]."""
        return self.values * wide_scales(self.scales, self.values.shape[1])

    def replace_where_worse(self, other: "_Rows") -> None:
        """Take the rows of `other` that have a smaller error."""
        # The difference of the two errors, without the parts that would cancel out.
        change = (other.weight() - self.weight()).mul_(self.gradient + other.gradient).sum(1)
        better = (change < 0).nonzero()[:, 0]
        for own, others in zip(self._tensors(), other._tensors(), strict=True):
            own[better] = others[better]

    def descend(self, kept: torch.Tensor, system: _System, target: torch.Tensor) -> None:
        """Once over all columns. A group's scale follows its values; a row's comes at the end."""
        for start, stop, A in system.blocks():
            square = A[:, start:stop]
            group = 0 if self.columns is None else start // self.columns
            before = self.values[:, start:stop] * self.scales[:, group, None]
            self._round_columns(start, stop, square, group, kept)
            if self.columns is not None:
                q = self.values[:, start:stop] * self.scales[:, group, None]
                product = q @ square
                gradient = self.gradient[:, start:stop] + product - before @ square
                self._fit(group, (q * gradient).sum(1), (q * product).sum(1))
            change = self.values[:, start:stop] * self.scales[:, group, None] - before
            self.gradient.addmm_(change, A)
        if self.columns is None:
            q, product = self.weight(), self.gradient + target
            fitted = self._fit(0, (q * self.gradient).sum(1), q.mul_(product).sum(1))
            self.gradient = product.mul_(fitted[:, None]).sub_(target)

    def _round_columns(self, start: int, stop: int, square: torch.Tensor, group: int, kept: torch.Tensor) -> None:
        """Move the kept values of one block, column by column, each to its best one."""
        scales = self.scales[:, group]
        # By columns, so that each is contiguous.
        values, gradient = (x[:, start:stop].T.contiguous() for x in (self.values, self.gradient))
        movable = kept[:, start:stop].T.float()
        diagonal = square.diagonal()
        inverse = torch.where(diagonal > 0, 1 / diagonal, 0.0)[:, None] / scales
        for j in range(stop - start):
            best = self.round_(torch.addcmul(values[j], gradient[j], inverse[j], value=-1))
            change = best.sub_(values[j]).mul_(movable[j])
            values[j] += change
            gradient[j + 1 :].addr_(square[j, j + 1 :], change.mul_(scales))
        self.values[:, start:stop] = values.T

    def _fit(self, group: int, slope: torch.Tensor, curvature: torch.Tensor) -> torch.Tensor:
        """Fit a group's scale to its values: where it is 1 + e times as large, errors change by 2 slope e +
        curvature e^2; all are [rows]. Returns the factors 1 + e."""
        scales = self.scales[:, group]
        fitted = self.format.storable((scales * (1 - slope / curvature))[:, None], self.units)[:, 0].float()
        e = fitted / scales - 1
        better = (fitted > 0) & fitted.isfinite() & (e * (2 * slope + e * curvature) < 0)
        self.scales[:, group] = torch.where(better, fitted, scales)
        return torch.where(better, e + 1, 1.0)

    def _tensors(self) -> tuple[torch.Tensor, ...]:
        return self.values, self.scales, self.gradient


def _some_rows(weight: torch.Tensor) -> Iterator[slice]:
    entries = ENTRIES_AT_ONCE if weight.device.type == "cpu" else ENTRIES_AT_ONCE_ON_GPUS
    count = max(LEAST_ROWS, entries // weight.shape[1])
    for start in range(0, len(weight), count):
        yield slice(start, start + count)


def _take(rows: torch.Tensor, p: torch.Tensor | None) -> torch.Tensor:
    """The columns `p` of `rows`."""
    return rows if p is None else rows[:, p]
