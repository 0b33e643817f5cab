"""Prune the linears of one stage: orders of the input channels, masks, and the weights that stay."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ria_vllm import permutation
from ria_vllm.errors import RiaError
from ria_vllm.offline import permute, prune, scores
from ria_vllm.offline.capture import Statistics
from ria_vllm.offline.ranks import Ranks
from ria_vllm.offline.reconstruct import admm_solver, output_error
from ria_vllm.offline.recipe import Recipe
from ria_vllm.offline.sparsegpt import sparsegpt
from ria_vllm.offline.topology import Group


@dataclass(frozen=True)
class Pruned:
    """One pruned linear, in the model's own order of channels.

    weight: [out, in] in the checkpoint's dtype, zero outside `mask`; mask: bool [out, in], the pattern in order p;
    p: int64 [in] or None for the model's own order; record: what the report says of it.
    """

    weight: torch.Tensor
    mask: torch.Tensor
    p: torch.Tensor | None
    record: dict[str, Any]


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
    owners = ranks.divide([weights[names[0]].shape[1] ** 2 * sum(len(weights[n]) for n in names) for _, names in problems])
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
    where: str,
) -> dict[str, Pruned]:
    """Prune and reconstruct the linears `names`, divided over the ranks. Results are on the CPU, weights in `dtype`.

    Raises:
        RiaError: a result is not finite in `dtype`; `where` names the layer.
    """
    owners = ranks.divide([weights[n].shape[1] * weights[n].numel() for n in names])
    solved: dict[str, Pruned] = {}
    prepared: tuple[torch.Tensor | None, Any] = (None, None)
    for name, owner in zip(names, owners, strict=True):
        if owner != ranks.rank:
            continue
        S = score(weights[name], statistics[name], recipe)
        gram = statistics[name].gram
        if recipe.reconstruct != "none" and prepared[0] is not gram:
            prepared = (None, None)  # let the old one go first: they are large
            with one_thread():
                prepared = (gram, admm_solver(gram))
        solved[name] = _prune(weights[name], gram, S, orders[name], dtype, recipe, prepared[1])
        if not bool(solved[name].weight.isfinite().all()):
            raise RiaError(f"{where}{name}: NaN or infinite values after pruning; try --reconstruct none.")
    return {name: ranks.from_owner(solved.get(name), owner) for name, owner in zip(names, owners, strict=True)}


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
    S = torch.cat([score(weights[name], statistics[name], recipe) for name in names])
    n, m = recipe.pattern.n, recipe.pattern.m
    if group.heads is None:
        p = permute.search(S, n, m, recipe.permute, seed=recipe.seed)
    elif group.heads.head_dim % m == 0:
        heads = group.heads
        p = permute.search_heads(
            S, heads.num_heads, heads.num_kv_heads, heads.head_dim, n, m, recipe.permute, seed=recipe.seed
        )
    else:
        return None  # groups would straddle heads, whose channels must not mix
    return None if permutation.is_identity(p) else p.cpu()


def _prune(
    weight: torch.Tensor,
    gram: torch.Tensor | None,
    S: torch.Tensor,
    p: torch.Tensor | None,
    dtype: torch.dtype,
    recipe: Recipe,
    solver: Any,
) -> Pruned:
    pattern = recipe.pattern
    order = torch.arange(S.shape[1], device=S.device) if p is None else p.to(S.device)
    back = permutation.invert(order)
    if recipe.method == "sparsegpt":
        with one_thread():
            W, mask = sparsegpt(weight[:, order], gram[order][:, order], pattern)
        W, mask = W[:, back], mask[:, back]
    else:
        mask = prune.mask(S[:, order], pattern)[:, back]
        W = weight.float() * mask
    masked = weight.float() * mask
    if recipe.reconstruct != "none":
        W = solver.solve(weight, mask)
    W = W.to(dtype)
    whole = S.sum(dtype=torch.float64).clamp(min=1e-300)
    record = {
        "shape": list(weight.shape),
        "permuted": p is not None,
        "retained_before": float(S[prune.mask(S, pattern)].sum(dtype=torch.float64) / whole),
        "retained_after": float(S[mask].sum(dtype=torch.float64) / whole),
    }
    if gram is not None:
        record["error_before"] = output_error(weight, masked, gram)
        record["error_after"] = output_error(weight, W, gram)
    return Pruned(W.cpu(), mask.cpu(), None if p is None else p.cpu(), record)
