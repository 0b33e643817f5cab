"""Finds out by experiment what decoder layers look like: the `Topology` of each kind of layer.

One layer of each kind is run by itself in float64, with random parameters. That shows

- which linears read the same tensor, and which depend on which;
- where the residual stream can be cut: the layer, run from the stream there with what comes before returning zeros,
  must give the same output;
- which folds hold: random permutations must change nothing but rounding;
- what can absorb the scales of an input's channels: random scales must change nothing but rounding;
- where the channels of heads can be rotated: random orthogonal matrices must change nothing but rounding.

What cannot be shown is not claimed. At worst a linear then gathers its own input, or a layer is one sublayer.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ria_vllm.format.layer_schema import Fold
from ria_vllm.hf.experts_layout import experts_modules
from ria_vllm.offline.model.experiments.experiment import Batch, Experiment, Seen
from ria_vllm.offline.model.experiments.folds import confirmed, find_folds
from ria_vllm.offline.model.experiments.migrations import find_migrations
from ria_vllm.offline.model.experiments.norms import is_rms_norm
from ria_vllm.offline.model.experiments.rotations import find_rotations
from ria_vllm.offline.model.experiments.split import find_cut, how_it_adds
from ria_vllm.offline.model.topology import Group, Heads, Sublayer, Topology, linears_of
from ria_vllm.vllm_quirks import served_dense


def describe(config: Any, layer: nn.Module, short: Batch, long: Batch, changes: bool = True) -> Topology:
    """The topology of a layer, found by experiment.

    Args:
        config: the text model's configuration.
        layer: its weights may be on the meta device.
        short: a call, and a residual stream [1, tokens, hidden], with which everything is tried.
        long: the same with more tokens, with which all that was found is tried once more.
        changes: also find out where scales can migrate, and heads be rotated, which takes half of the time.

    Raises:
        RiaError: a copy of the layer in float64 with random parameters cannot be run by itself.
    """
    experiment = Experiment(layer, *short)
    dense = served_dense(layer)
    seen = experiment.watch()
    groups = _groups(layer, seen, dense)
    depends = _dependencies(experiment, seen, groups)
    order = [name for group in groups for name in group.linears]
    order.sort(key=[call.name for call in seen].index)
    sets = [set(group.linears) for group in groups if group.linears]
    folds = find_folds(experiment, order, sets, config)
    sublayers = _sublayers(experiment, groups, depends, seen)
    with_many_tokens = experiment.with_batch(*long)
    folds = confirmed(with_many_tokens, folds)
    sublayers = tuple(_constrained(sublayer, layer, folds, experiment.stream.shape[-1]) for sublayer in sublayers)
    migrations = find_migrations(experiment, with_many_tokens, seen, groups, folds) if changes else ()
    rotations = find_rotations(experiment, with_many_tokens, folds) if changes else ()
    return Topology(
        sublayers, tuple(folds), _all_dense(layer, dense, order), _together(groups), migrations, rotations,
        _norms_of_stream(experiment, seen, sublayers),
    )  # fmt: skip


def _norms_of_stream(experiment: Experiment, seen: Sequence[Seen], sublayers: Sequence[Sublayer]) -> tuple[str, ...]:
    """The RMS norms that read the residual stream, at the layer's start or at its cut."""
    cuts = {sublayer.ends_before for sublayer in sublayers}
    readers = [call for call in seen if call.name in cuts or _alike(call.read, experiment.stream)]
    return tuple(dict.fromkeys(call.name for call in readers if is_rms_norm(experiment.layer, call)))


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
        read: list[str | None] = [name for name in names if name in experts]
        first, *more = read or [None]
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


def _constrained(sublayer: Sublayer, layer: nn.Module, folds: Sequence[Fold], hidden: int) -> Sublayer:
    """The sublayer's groups with the structure that their permutations need."""
    of = {fold.consumer: fold for fold in folds}

    def within(group: Group, number: int) -> Group:
        if len(group.linears) != 1:
            return group
        fold, linear = of.get(group.linears[0]), layer.get_submodule(group.linears[0])
        if fold is not None and fold.num_heads and fold.num_kv_heads:
            return replace(group, heads=Heads(fold.num_heads, fold.num_kv_heads, linear.in_features // fold.num_heads))
        # What the first stage reads is the stream, which all ranks have. What writes to it is row-parallel in vLLM.
        reads_part = number > 0 and linear.out_features == hidden and not group.experts
        return replace(group, within_ranks=fold is None and reads_part)

    stages = enumerate(sublayer.stages)
    return replace(sublayer, stages=tuple(tuple(within(group, number) for group in stage) for number, stage in stages))


def _sublayers(
    experiment: Experiment, groups: Sequence[Group], depends: Sequence[set[int]], seen: Sequence[Seen]
) -> tuple[Sublayer, ...]:
    cut = find_cut(experiment, seen, [name for group in groups for name in _members(group)])
    if cut is None:
        stages = _stages(groups, depends, range(len(groups)))
        return (Sublayer("layer", stages, **how_it_adds(experiment, seen, stages, None, None)),)
    is_first = [_members(group)[0] in cut.before for group in groups]
    first, second = (
        _stages(groups, depends, [number for number, early in enumerate(is_first) if early == part])
        for part in (True, False)
    )
    return (
        Sublayer("attention", first, cut.ends_before, **how_it_adds(experiment, seen, first, None, cut)),
        Sublayer("mlp", second, stand_ins=cut.stand_ins, **how_it_adds(experiment, seen, second, cut, None)),
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
