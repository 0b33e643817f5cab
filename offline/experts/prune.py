"""Prune the routed experts of one layer, one by one: no more than one of them is in memory."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from ria_vllm.format import permutation
from ria_vllm.hf.experts_layout import DOWN
from ria_vllm.offline.calibration.statistics import Statistics, StatisticsSum
from ria_vllm.offline.experts.store import RoutedExperts
from ria_vllm.offline.model.experts.run import inner
from ria_vllm.offline.model.topology import Group
from ria_vllm.offline.pruning import permute
from ria_vllm.offline.runtime.memory import trim
from ria_vllm.offline.sublayer.pruned_linear import Pruned
from ria_vllm.offline.sublayer.solve import ToPrune, find_permutations, score, solve

# The rows of all experts together have more scores than the search of one permutation needs, or memory should hold.
# This many are taken, evenly spread over the linears.
SEARCHED_ROWS = 8192


def shared_permutation(
    experts: RoutedExperts, beside: Mapping[str, tuple[torch.Tensor, Statistics]]
) -> torch.Tensor | None:
    """The permutation of the residual stream that the gate and up projections of all experts share.

    Args:
        beside: weights [out, in] and statistics of other linears that share it, those of the shared expert.

    Returns:
        int64 [width] on the CPU; None for the model's own order.
    """
    recipe, layout = experts.recipe, experts.layout
    if recipe.permute == "none":
        return None
    rows = len(layout.first) * layout.inner * layout.num_experts + sum(len(weight) for weight, _ in beside.values())
    step = -(-rows // SEARCHED_ROWS)
    parts = [score(*one, recipe)[::step] for one in beside.values()]
    for expert in range(layout.num_experts):
        found = experts.dense(expert)
        norms = _reads(experts, expert, with_gram=False)
        parts += [score(found[kind], norms, recipe)[::step].clone() for kind in layout.first]
        del found
    S = torch.cat([part.T for part in parts], dim=1).T  # by columns, as the search needs them
    p = permute.search(S, **recipe.of_search)
    return None if permutation.is_identity(p) else p.cpu()


def prune_expert(experts: RoutedExperts, expert: int, p: torch.Tensor | None) -> dict[str, Pruned]:
    """Prune one expert: gate and up, then down, which sees what the pruned gate and up produce.

    Args:
        p: from `shared_permutation`.

    Returns:
        Written name -> pruned linear.
    """
    layout, recipe, dense = experts.layout, experts.recipe, experts.dense(expert)
    weights = {name: dense[kind] for kind, name in experts.names(expert).items()}
    *first, down = weights
    permutations = dict.fromkeys(first, p)
    found = _solved(experts, first, weights, _reads(experts, expert, recipe.needs_gram), permutations)
    trim()
    pruned = {kind: found[name].weight.to(experts.model.device) for kind, name in zip(layout.first, first, strict=True)}
    found |= _solved(experts, [down], weights, _reads_of_down(experts, expert, dense, pruned))
    trim()
    counts = {"tokens": experts.tokens.counts[expert]} if recipe.reads_text else {}
    if recipe.reads_text and (missing := experts.tokens.missing(expert)):
        counts["borrowed"] = missing
    return {name: replace(linear, record=linear.record | counts) for name, linear in found.items()}


def _solved(
    experts: RoutedExperts,
    names: Sequence[str],
    weights: Mapping[str, torch.Tensor],
    read: Statistics,
    permutations: Mapping[str, torch.Tensor | None] | None = None,
) -> dict[str, Pruned]:
    """Linears of one expert with one input, pruned.

    Args:
        read: their input.
        permutations: of the input's channels; None: they are searched.
    """
    recipe, statistics = experts.recipe, dict.fromkeys(names, read)
    if experts.kept:
        permutations = dict.fromkeys(names)
    elif permutations is None:
        permutations = find_permutations([Group(tuple(names))], weights, statistics, recipe)
    linears = {name: ToPrune(weights[name], read, permutations[name], experts.kept) for name in names}
    return solve(linears, recipe, experts.model.stored_dtype, experts.place)


def _reads(experts: RoutedExperts, expert: int, with_gram: bool) -> Statistics:
    """The statistics of what gate and up read."""
    total = StatisticsSum(experts.layout.width, with_gram, experts.model.device, experts.model.dtype)
    for X, dense in experts.tokens.of(expert):
        X = X.to(experts.model.device)
        total.add(X)
        if with_gram and dense is not None:
            total.add_input_drift(X, dense.to(experts.model.device))
    return total.finish(experts.place(experts.files.linear(expert, experts.layout.first[0])))


def _reads_of_down(
    experts: RoutedExperts, expert: int, dense: Mapping[str, torch.Tensor], pruned: Mapping[str, torch.Tensor]
) -> Statistics:
    """The statistics of what down reads, and how far that is from what it reads in the dense model.

    Args:
        dense: the expert's weights by kind.
        pruned: those of gate and up.
    """
    layout, device, with_gram = experts.layout, experts.model.device, experts.recipe.needs_gram
    total = StatisticsSum(layout.inner, with_gram, device, experts.model.dtype)
    for X, in_dense in experts.tokens.of(expert):
        read = inner(experts.module, expert, X.to(device), pruned).float()
        total.add(read)
        if not with_gram or in_dense is None:
            continue
        wanted = inner(experts.module, expert, in_dense.to(device), dense).float()
        if layout.width < layout.inner:  # the smaller of the two drifts
            total.add_output_drift(read, (wanted - read) @ dense[DOWN].float().T)
        else:
            total.add_input_drift(read, wanted)
    return total.finish(experts.place(experts.files.linear(expert, DOWN)))
