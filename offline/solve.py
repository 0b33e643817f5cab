"""Prune the linears of one stage: orders of the input channels, masks, and the weights that stay."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ria_vllm import permutation
from ria_vllm.errors import RiaError
from ria_vllm.offline.calibration.capture import Statistics
from ria_vllm.offline.model.topology import Group
from ria_vllm.offline.pruning import masks as prune
from ria_vllm.offline.pruning import permute, scores
from ria_vllm.offline.pruning.admm import AdmmSolver, Choice, admm_solver, output_error
from ria_vllm.offline.pruning.sparsegpt import sparsegpt
from ria_vllm.offline.pruning.symmetric import SymmetricMatrix
from ria_vllm.offline.recipe import Recipe
from ria_vllm.offline.runtime.ranks import Ranks


@dataclass(frozen=True)
class Pruned:
    """One pruned linear, in the model's own order of channels.

    weight: [out, in] in the checkpoint's dtype, zero outside the mask; kept: the mask, a bit for each of its entries
    row by row, uint8 (all of a layer's masks are in memory until the layer is written); p: int64 [in] or None for the
    model's own order; record: what the report says of it; scale: float32 [out, 1] where the weight is int8 times that,
    rounded to the dtype.
    """

    weight: torch.Tensor
    kept: torch.Tensor
    p: torch.Tensor | None
    record: dict[str, Any]
    scale: torch.Tensor | None = None

    @property
    def mask(self) -> torch.Tensor:
        """bool [out, in], the pattern in order p."""
        bits = np.unpackbits(self.kept.numpy(), count=self.weight.numel(), bitorder="little")
        return torch.from_numpy(bits.view(np.bool_)).view(self.weight.shape)


def _packed(mask: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.packbits(mask.cpu().numpy(), axis=None, bitorder="little"))


def stored_weight(
    weight: torch.Tensor, p: torch.Tensor | None, dtype: torch.dtype, recipe: Recipe
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`weight`, columns in the model's own order, as it will be read back, and its scales if it has any; on the CPU."""
    if p is None or recipe.weight_format.group_size is None:
        weight, scale = recipe.weight_format.quantize(weight, dtype)
    else:
        p = p.to(weight.device)
        weight, scale = recipe.weight_format.quantize(weight[:, p], dtype)
        weight = weight[:, permutation.invert(p)]
    return weight.cpu(), None if scale is None else scale.cpu()


@contextmanager
def one_thread() -> Iterator[None]:
    """LAPACK's factorisations round differently with other numbers of threads; masks must not depend on that."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def find_orders(
    groups: Sequence[Group],
    weights: Mapping[str, torch.Tensor],
    statistics: Mapping[str, Statistics],
    recipe: Recipe,
    ranks: Ranks,
) -> dict[str, torch.Tensor | None]:
    """The input order of every linear: one problem a group (or a linear), divided over the ranks.

    Args:
        weights: linear -> [out, in] on the device.
        statistics: linear -> statistics of its input.

    Returns:
        linear -> int64 [in] on the CPU, None where it is the model's own order.
    """
    problems = [(group, names) for group in groups for names in recipe.shared_orders(group.linears)]
    costs = [weights[names[0]].shape[1] ** 2 * sum(len(weights[n]) for n in names) for _, names in problems]
    owners = ranks.divide(costs)
    orders = {}
    for (group, names), owner in zip(problems, owners, strict=True):
        p = None
        if owner == ranks.rank and recipe.pattern.structured and recipe.permute != "none":
            p = _find_order(group, names, weights, statistics, recipe)
        p = ranks.from_owner(p, owner)
        orders |= {name: p for name in names}
    return orders


def solve(
    names: Sequence[str],
    weights: Mapping[str, torch.Tensor],
    statistics: Mapping[str, Statistics],
    orders: Mapping[str, torch.Tensor | None],
    dtype: torch.dtype,
    recipe: Recipe,
    ranks: Ranks,
    named: Callable[[str], str],
) -> dict[str, Pruned]:
    """Prune and reconstruct the linears `names`, divided over the ranks. Results are on the CPU, weights in `dtype`.

    Raises:
        RiaError: a result is not finite in `dtype`; `named` gives the linear's name in the files.
    """
    owners = ranks.divide([weights[n].shape[1] * weights[n].numel() for n in names])
    solved: dict[str, Pruned] = {}
    solvers = _Solvers()
    for name, owner in zip(names, owners, strict=True):
        if owner != ranks.rank:
            continue
        solved[name] = _prune(weights[name], statistics[name], orders[name], dtype, recipe, solvers)
        if not bool(solved[name].weight.isfinite().all()):
            raise RiaError(f"{named(name)}: NaN or infinite values after pruning; give --reconstruct none.")
    return {name: ranks.from_owner(solved.get(name), owner) for name, owner in zip(names, owners, strict=True)}


class _Solvers:
    """The solver of the Gram matrix at hand; another one's is let go first, for they are large."""

    def __init__(self) -> None:
        self.gram: SymmetricMatrix | None = None
        self.last: AdmmSolver | None = None

    def of(self, gram: SymmetricMatrix) -> AdmmSolver:
        if self.last is None or self.gram is not gram:
            self.gram, self.last = gram, None
            with one_thread():
                self.last = admm_solver(gram)
        return self.last


def score(weight: torch.Tensor, statistics: Statistics, recipe: Recipe) -> torch.Tensor:
    """[out, in] float32. SparseGPT judges weights as it goes; channels are ordered for it by RIA."""
    method = "ria" if recipe.method == "sparsegpt" else recipe.method
    return scores.score(method, weight, statistics.norm, recipe.exponent)


def _find_order(
    group: Group,
    names: Sequence[str],
    weights: Mapping[str, torch.Tensor],
    statistics: Mapping[str, Statistics],
    recipe: Recipe,
) -> torch.Tensor | None:
    S = _stacked_scores(names, weights, statistics, recipe)
    n, m = recipe.pattern.n, recipe.pattern.m
    if group.heads is None:
        p = permute.search(S, n, m, recipe.permute, seed=recipe.seed, dtype=recipe.product_dtype)
    elif group.heads.head_dim % m == 0:
        heads = group.heads
        p = permute.search_heads(
            S, heads.num_heads, heads.num_kv_heads, heads.head_dim, n, m, recipe.permute, seed=recipe.seed,
            dtype=recipe.product_dtype,
        )  # fmt: skip
    else:
        return None  # groups would straddle heads, whose channels must not mix
    return None if permutation.is_identity(p) else p.cpu()


def _stacked_scores(
    names: Sequence[str], weights: Mapping[str, torch.Tensor], statistics: Mapping[str, Statistics], recipe: Recipe
) -> torch.Tensor:
    """[all the linears' rows, in] float32, laid out by columns: the search works on those, and needs no copy then."""
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
    solvers: "_Solvers",
) -> Pruned:
    W = None
    if recipe.method == "sparsegpt":
        W, mask = _sparsegpt(weight, statistics.gram, p, recipe)
        record = _retained(score(weight, statistics, recipe), mask, recipe)
    else:
        S = score(weight, statistics, recipe)
        mask = _mask(S, p, recipe)
        record = _retained(S, mask, recipe)
        del S  # one of several matrices of the weight's size; memory is counted in them
    start = mask
    if recipe.reconstruct != "none":
        pull = statistics.drift and statistics.drift.pull(weight)
        choose = None if recipe.method == "sparsegpt" else _choice(weight, statistics, p, recipe)
        W, mask = solvers.of(statistics.gram).solve(weight, mask, pull=pull, choose=choose)
        del pull
    W = weight * mask if W is None else W
    W, scale = stored_weight(W, p, dtype, recipe)
    record |= {"shape": list(weight.shape), "permuted": p is not None}
    if statistics.gram is not None:
        record["error_before"] = output_error(weight, weight * start, statistics.gram, statistics.drift)
        record["error_after"] = output_error(weight, W.to(weight.device), statistics.gram, statistics.drift)
    return Pruned(W, _packed(mask), p, record, scale)


def _choice(weight: torch.Tensor, statistics: Statistics, p: torch.Tensor | None, recipe: Recipe) -> Choice:
    """The mask of some rows by the method's own score, each of its sums over columns as in the dense weight."""
    column_sums = weight.abs().float().sum(0)

    def choose(rows: torch.Tensor) -> torch.Tensor:
        return _mask(scores.score(recipe.method, rows, statistics.norm, recipe.exponent, column_sums), p, recipe)

    return choose


def _mask(S: torch.Tensor, p: torch.Tensor | None, recipe: Recipe) -> torch.Tensor:
    """bool [out, in] in the model's own order: the pattern in order p."""
    if p is None:
        return prune.mask(S, recipe.pattern)
    p = p.to(S.device)
    return prune.mask(S[:, p], recipe.pattern)[:, permutation.invert(p)]


def _sparsegpt(
    weight: torch.Tensor, gram: SymmetricMatrix, p: torch.Tensor | None, recipe: Recipe
) -> tuple[torch.Tensor, torch.Tensor]:
    with one_thread():
        if p is None:
            return sparsegpt(weight, gram, recipe.pattern)
        p = p.to(weight.device)
        W, mask = sparsegpt(weight[:, p], gram, recipe.pattern, order=p)
    back = permutation.invert(p)
    return W[:, back], mask[:, back]


def _retained(S: torch.Tensor, mask: torch.Tensor, recipe: Recipe) -> dict[str, Any]:
    """The share of the score that stays: with the pattern in the model's own order, and with this mask."""
    whole = float(S.sum(dtype=torch.float64)) or 1.0
    kept = {"retained_before": prune.mask(S, recipe.pattern), "retained_after": mask}
    return {name: float(S.where(keep, 0.0).sum(dtype=torch.float64)) / whole for name, keep in kept.items()}
