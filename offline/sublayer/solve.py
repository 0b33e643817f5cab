"""Prune the linears of one stage: the permutation of their input channels, their masks and their kept weights."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ria_vllm.errors import RiaError
from ria_vllm.format import permutation, sparse24
from ria_vllm.format.formats import RoundedFormat
from ria_vllm.format.pattern import Pattern
from ria_vllm.offline.calibration.statistics import Statistics
from ria_vllm.offline.model.topology import Group
from ria_vllm.offline.pruning import masks, permute, scores
from ria_vllm.offline.pruning.admm import DAMPING, AdmmSolver, Choice, admm_solver, output_error
from ria_vllm.offline.pruning.rounding import Objective, round_on_mask
from ria_vllm.offline.pruning.symmetric import SymmetricMatrix
from ria_vllm.offline.recipe import Recipe
from ria_vllm.offline.sublayer.pruned_linear import DENSE, Pruned, packed, stored_weight

# With up to this many ranks of tensor parallelism, a permutation that no fold absorbs stays within each rank.
RANKS = (8, 4, 2)


@contextmanager
def one_thread() -> Iterator[None]:
    """Run LAPACK in one thread: its factorisations round differently with more, and masks must not depend on that."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def find_permutations(
    groups: Sequence[Group],
    weights: Mapping[str, torch.Tensor],
    statistics: Mapping[str, Statistics],
    recipe: Recipe,
) -> dict[str, torch.Tensor | None]:
    """Search a permutation of the input channels of each linear.

    Args:
        groups: linears with a common input, which share a permutation.
        weights: linear -> [out, in] on the device.
        statistics: linear -> statistics of its input.

    Returns:
        linear -> int64 [in] on the CPU; None for the model's own order.
    """
    permutations: dict[str, torch.Tensor | None] = {}
    for group in groups:
        p = None if recipe.permute == "none" else _find_permutation(group, weights, statistics, recipe)
        permutations |= dict.fromkeys(group.linears, p)
    return permutations


@dataclass(frozen=True)
class ToPrune:
    """A linear's weight [out, in] on the device, the statistics of its input, and what `find_permutations` found.

    kept: it has the pattern already in the model's own order, and keeps its mask and its zeros.
    dense: it keeps all of its weights, and is only rounded.
    """

    weight: torch.Tensor
    statistics: Statistics
    permutation: torch.Tensor | None
    kept: bool = False
    dense: bool = False


def solve(
    linears: Mapping[str, ToPrune],
    recipe: Recipe,
    dtype: torch.dtype,
    place: Callable[[str], str],
    damping: float = DAMPING,
) -> dict[str, Pruned]:
    """Prune and reconstruct linears.

    Args:
        linears: those with the same statistics follow each other.
        dtype: of the result, the checkpoint's.
        place: linear -> what an error about it begins with.
        damping: ADMM's, see `admm_solver`.

    Returns:
        linear -> result, on the CPU.

    Raises:
        RiaError: a result is not finite in `dtype`.
    """
    solved: dict[str, Pruned] = {}
    solvers = _Solvers((one.statistics.gram for one in linears.values() if not (one.kept or one.dense)), damping)
    for name, one in linears.items():
        if one.kept or one.dense:
            solved[name] = _keep(one.weight, one.statistics, dtype, recipe, one.dense)
        else:
            solved[name] = _prune(one.weight, one.statistics, one.permutation, dtype, recipe, solvers)
        if not bool(solved[name].weight.isfinite().all()):
            raise RiaError(f"{place(name)}: NaN or infinite values after pruning; give --reconstruct none.")
    return solved


class _Solvers:
    """Keeps the solver for a Gram matrix until its last linear; they are large, so no two are in memory at once."""

    def __init__(self, grams: Iterable[SymmetricMatrix | None], damping: float) -> None:
        """`grams`: those of the linears, in the order in which they are solved; equal ones follow each other."""
        self.damping = damping
        self.uses = Counter(map(id, grams))
        self.gram: SymmetricMatrix | None = None
        self.last: AdmmSolver | None = None

    def of(self, gram: SymmetricMatrix, scales: torch.Tensor | None) -> AdmmSolver:
        if self.last is None or self.gram is not gram:
            self.gram, self.last = gram, None
            with one_thread():
                self.last = admm_solver(gram, self.damping, scales=scales)
        found = self.last
        self.uses[id(gram)] -= 1
        if not self.uses[id(gram)]:
            self.gram = self.last = None
        return found


def score(
    weight: torch.Tensor, statistics: Statistics, recipe: Recipe, column_sums: torch.Tensor | None = None
) -> torch.Tensor:
    """The scores S [out, in] float32 of the model's own weights, whatever scales have migrated into them: RIA's would
    change.

    Args:
        column_sums: [in], of the magnitudes of the dense weight; None: of `weight`.
    """
    norm, scales = statistics.norm, statistics.scales
    if scales is not None:
        weight, norm = weight.to(torch.float32, copy=True).div_(scales), norm * scales
    return scores.score(recipe.method, weight, norm, column_sums)


def _find_permutation(
    group: Group,
    weights: Mapping[str, torch.Tensor],
    statistics: Mapping[str, Statistics],
    recipe: Recipe,
) -> torch.Tensor | None:
    S = _stacked_scores(group.linears, weights, statistics, recipe)
    if group.within_ranks and (blocks := rank_blocks(S.shape[1], recipe.pattern.of)) > 1:
        p = permute.search_heads(S, blocks, blocks, S.shape[1] // blocks, recipe.of_search)
    elif group.heads is None:
        p = permute.search(S, **recipe.of_search)
    elif group.heads.head_dim % recipe.pattern.of == 0:
        heads = group.heads
        p = permute.search_heads(S, heads.num_heads, heads.num_kv_heads, heads.head_dim, recipe.of_search)
    else:
        return None  # groups would span two heads, whose channels must not mix
    return None if permutation.is_identity(p) else p.cpu()


def rank_blocks(width: int, size: int = 4) -> int:
    """How many equal blocks of an input with `width` channels a permutation has to keep to if no fold absorbs it. Each
    holds whole groups of `size`."""
    return next((count for count in RANKS if width % (size * count) == 0), 1)


def _stacked_scores(
    names: Sequence[str], weights: Mapping[str, torch.Tensor], statistics: Mapping[str, Statistics], recipe: Recipe
) -> torch.Tensor:
    """The scores of the linears, [sum of out, in] float32, stored by columns, as the search needs them."""
    counts = [len(weights[name]) for name in names]
    first = weights[names[0]]
    columns = torch.empty(first.shape[1], sum(counts), device=first.device)
    for name, part in zip(names, columns.split(counts, dim=1), strict=True):
        part.copy_(score(weights[name], statistics[name], recipe).T)
    return columns.T


def _prune(
    weight: torch.Tensor,
    statistics: Statistics,
    p: torch.Tensor | None,
    dtype: torch.dtype,
    recipe: Recipe,
    solvers: _Solvers,
) -> Pruned:
    S = score(weight, statistics, recipe)
    mask = _mask(S, p, recipe.pattern)
    record = _retained(S, mask, recipe.pattern)
    del S  # as large as the weight, so it would raise the peak memory
    W, start, scales, weight_format = None, mask, None, recipe.weight_format
    if recipe.reconstruct != "none":
        assert statistics.gram is not None
        cross_term = statistics.drift and statistics.drift.cross_term(weight)
        choose = _choice(weight, statistics, p, recipe)
        solver = solvers.of(statistics.gram, statistics.scales)
        W, mask = solver.solve(weight, mask, cross_term=cross_term, choose=choose)
        del solver
        if isinstance(weight_format, RoundedFormat):
            on_device = None if p is None else p.to(weight.device)
            objective = Objective(statistics.gram, cross_term, divided_by=statistics.scales)
            W, scales = round_on_mask(weight, W, mask, objective, weight_format, on_device)
            del objective
        del cross_term
    W = weight * mask if W is None else W
    W, scales = stored_weight(W, p, dtype, recipe, scales, statistics.norm**2)
    record |= {"shape": list(weight.shape), "permuted": p is not None}
    if statistics.gram is not None:
        record["error_before"] = output_error(weight, weight * start, statistics.gram, statistics.drift)
        record["error_after"] = output_error(weight, W.to(weight.device), statistics.gram, statistics.drift)
    return Pruned(W, packed(mask), p, record, scales)


def _keep(weight: torch.Tensor, statistics: Statistics, dtype: torch.dtype, recipe: Recipe, dense: bool) -> Pruned:
    """A linear that has the pattern already, or stays dense: only rounded, if its format has fewer bits. Zeros of the
    former stay, even where a group has more than it loses and some have to be stored. The latter are rounded to the
    nearest: in int8, errors that make up for each other bring nothing."""
    if dense:
        mask, recipe = torch.ones_like(weight, dtype=torch.bool), recipe.of_dense
    else:
        bitmask = sparse24.bitmask_of(weight, recipe.pattern)
        assert bitmask is not None
        mask = sparse24.mask_from_bitmask(bitmask)
    W, scales, weight_format, gram = weight, None, recipe.weight_format, statistics.gram
    if gram is not None and isinstance(weight_format, RoundedFormat) and not dense:
        cross_term = statistics.drift and statistics.drift.cross_term(weight)
        start = weight.to(torch.float32, copy=True)  # whose memory the result takes
        objective = Objective(gram, cross_term, divided_by=statistics.scales)
        W, scales = round_on_mask(weight, start, weight != 0, objective, weight_format)
    W, scales = stored_weight(W, None, dtype, recipe, scales, statistics.norm**2)
    record: dict[str, Any] = {DENSE: True} if dense else {"kept": True, "retained_before": 1.0, "retained_after": 1.0}
    record |= {"shape": list(weight.shape), "permuted": False}
    if scales is not None and gram is not None and not dense:
        record["rounding_error"] = output_error(weight, W.to(weight.device), gram)
    return Pruned(W, packed(mask), None, record, scales)


def _choice(weight: torch.Tensor, statistics: Statistics, p: torch.Tensor | None, recipe: Recipe) -> Choice:
    """Chooses the masks of some rows by the method's own score, with the column sums of the dense weight."""
    column_sums = weight.abs().float().sum(0)
    if statistics.scales is not None:
        column_sums = column_sums / statistics.scales

    def choose(rows: torch.Tensor) -> torch.Tensor:
        return _mask(score(rows, statistics, recipe, column_sums), p, recipe.pattern)

    return choose


def _mask(S: torch.Tensor, p: torch.Tensor | None, pattern: Pattern) -> torch.Tensor:
    """The mask bool [out, in], in the model's own order, that has the pattern in order p."""
    if p is None:
        return masks.mask(S, pattern)
    p = p.to(S.device)  # index_select is several times faster than indexing, and ADMM chooses masks often
    return masks.mask(S.index_select(1, p), pattern).index_select(1, permutation.invert(p))


def _retained(S: torch.Tensor, mask: torch.Tensor, pattern: Pattern) -> dict[str, Any]:
    """The retained score, as a share: with the pattern in the model's own order, and with this mask."""
    whole = float(S.sum(dtype=torch.float64)) or 1.0
    kept = {"retained_before": masks.mask(S, pattern), "retained_after": mask}
    return {name: float(S.where(keep, 0.0).sum(dtype=torch.float64)) / whole for name, keep in kept.items()}
