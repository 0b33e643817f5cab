"""Finds out by experiment what decoder layers look like: the `Topology` of each kind of layer.

One layer of each kind is run by itself in float64, with random parameters. That shows

- which linears read the same tensor, and which depend on which;
- where the residual stream can be cut: the layer, run from the stream there with what comes before returning zeros,
  must give the same output;
- which folds hold: random permutations must change nothing but rounding.

What cannot be shown is not claimed. At worst a linear then gathers its own input, or a layer is one sublayer.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ria_vllm.offline.model.embedding import LayerCall
from ria_vllm.offline.model.experiment import Experiment, Seen, watch
from ria_vllm.offline.model.experts import experts_modules
from ria_vllm.offline.model.folds import find_folds
from ria_vllm.offline.model.split import find_cut, is_sum
from ria_vllm.offline.model.topology import Group, Heads, Sublayer, Topology, linears_of
from ria_vllm.offline.model.vllm_quirks import served_dense
from ria_vllm.schema import Fold

# Tensor parallelism of up to so many ranks keeps what no fold absorbs within each rank.
BLOCKS = (8, 4, 2)


def describe(config: Any, layer: nn.Module, call: LayerCall, stream: torch.Tensor) -> Topology:
    """The topology of a layer, found by experiment.

    Args:
        config: the text model's configuration.
        layer: its weights may be on the meta device.
        call: how the model calls it.
        stream: a residual stream [1, tokens, hidden] for this call.

    Raises:
        RiaError: a copy of the layer in float64 with random parameters cannot be run by itself.
    """
    experiment = Experiment(layer, call, stream)
    dense = served_dense(layer)
    seen = experiment.watch()
    groups = _groups(layer, seen, dense)
    depends = _dependencies(experiment, seen, groups)
    order = [name for group in groups for name in group.linears]
    order.sort(key=[call.name for call in seen].index)
    sets = [set(group.linears) for group in groups if group.linears]
    folds = find_folds(experiment, order, sets, config)
    reads = _first_reads(seen)
    groups = [_constrained(group, layer, folds, reads, experiment.stream) for group in groups]
    sublayers = _sublayers(experiment, groups, depends, seen)
    return Topology(sublayers, tuple(folds), _all_dense(layer, dense, order), _together(groups))


def describe_as_it_is(layer: nn.Module, run: Callable[[], Any]) -> Topology:
    """What one run of a layer with its own weights shows: linears that read the same tensor. There are no folds.

    Args:
        run: runs the layer.

    Raises:
        RiaError: it does not run.
    """
    dense = served_dense(layer)
    groups = _groups(layer, watch(layer, run), dense)
    order = [name for group in groups for name in group.linears]
    stages = (tuple(groups),)
    return Topology((Sublayer("layer", stages),), (), _all_dense(layer, dense, order), _together(groups))


def _all_dense(layer: nn.Module, dense: dict[str, str], pruned: Sequence[str]) -> dict[str, str]:
    unused = [name for name in linears_of(layer) if name not in dense and name not in pruned]
    return dense | dict.fromkeys(unused, "takes no part in a forward pass")


def _groups(layer: nn.Module, seen: Sequence[Seen], dense: dict[str, str]) -> list[Group]:
    """Linears and routed experts by the tensor that they read, in the order of the calls."""
    linears, experts = set(linears_of(layer)) - set(dense), set(experts_modules(layer))
    readers: dict[tuple, list[str]] = {}
    called: set[str] = set()
    for call in seen:
        # A linear that is called again counts for its first input.
        if call.name in linears | experts and call.name not in called:
            readers.setdefault(call.key, []).append(call.name)
            called.add(call.name)
    found = []
    for names in readers.values():
        first, *more = [name for name in names if name in experts] or [None]
        found.append(Group(tuple(name for name in names if name in linears), experts=first))
        found += [Group((), experts=name) for name in more]
    return found


def _together(groups: Sequence[Group]) -> tuple[frozenset[str], ...]:
    """The linears of each module that read the same tensor: vLLM may fuse them."""
    siblings: dict[tuple[int, str], set[str]] = {}
    for number, group in enumerate(groups):
        for name in group.linears:
            siblings.setdefault((number, name.rpartition(".")[0]), set()).add(name)
    return tuple(map(frozenset, siblings.values()))


def _members(group: Group) -> list[str]:
    return [*group.linears, *([group.experts] if group.experts else [])]


def _dependencies(experiment: Experiment, seen: Sequence[Seen], groups: Sequence[Group]) -> list[set[int]]:
    """For each group, the numbers of the groups on whose outputs its input depends."""
    reads = _first_reads(seen)
    depends: list[set[int]] = [set() for _ in groups]
    for number, group in enumerate(groups):
        with experiment.disturbed(_members(group)):
            disturbed = _first_reads(experiment.watch())
        for other, members in enumerate(map(_members, groups)):
            now = disturbed.get(members[0])
            if other != number and (now is None or not _alike(now, reads[members[0]])):
                depends[other].add(number)
    return depends


def _first_reads(seen: Sequence[Seen]) -> dict[str, torch.Tensor]:
    return {call.name: call.read for call in reversed(seen)}


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


def _constrained(
    group: Group, layer: nn.Module, folds: Sequence[Fold], reads: Mapping[str, torch.Tensor], stream: torch.Tensor
) -> Group:
    """The group with the structure that its permutation needs."""
    if len(group.linears) != 1 or group.experts:
        return group
    linear = layer.get_submodule(group.linears[0])
    fold = next((fold for fold in folds if fold.consumer == group.linears[0]), None)
    if fold is not None and fold.coupling == "heads":
        size = linear.in_features // fold.num_heads
        return replace(group, heads=Heads(fold.num_heads, fold.num_kv_heads, size))
    # What writes to the stream is row-parallel in vLLM: each rank has its own part of the input.
    if fold is not None or linear.out_features != stream.shape[-1] or _alike(reads[group.linears[0]], stream):
        return group
    return replace(group, blocks=next((n for n in BLOCKS if linear.in_features % (4 * n) == 0), 1))


def _sublayers(
    experiment: Experiment, groups: Sequence[Group], depends: Sequence[set[int]], seen: Sequence[Seen]
) -> tuple[Sublayer, ...]:
    cut = find_cut(experiment, seen, [name for group in groups for name in _members(group)])
    if cut is None:
        stages = _stages(groups, depends, range(len(groups)))
        return (Sublayer("layer", stages, additive=is_sum(experiment, seen, stages, None, None)),)
    is_first = [_members(group)[0] in cut.before for group in groups]
    first, second = (
        _stages(groups, depends, [number for number, early in enumerate(is_first) if early == part])
        for part in (True, False)
    )
    return (
        Sublayer("attention", first, cut.ends_before, additive=is_sum(experiment, seen, first, None, cut)),
        Sublayer(
            "mlp",
            second,
            zeroed=cut.zeroed,
            zeroed_returns=cut.zeroed_returns,
            additive=is_sum(experiment, seen, second, cut, None),
        ),
    )


def _stages(
    groups: Sequence[Group], depends: Sequence[set[int]], numbers: Sequence[int]
) -> tuple[tuple[Group, ...], ...]:
    """The groups `numbers`, each in the first stage after all those that it depends on."""
    level: dict[int, int] = {}
    for number in numbers:
        level[number] = 1 + max((level[other] for other in depends[number] if other in level), default=-1)
    levels = range(max(level.values(), default=-1) + 1)
    return tuple(tuple(groups[number] for number in numbers if level[number] == one) for one in levels)
