"""Where a decoder layer can be cut in two, so that each part is run, pruned and reconstructed by itself."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ria_vllm.errors import RiaError
from ria_vllm.offline.model.experiments.experiment import Experiment, Seen, equal
from ria_vllm.offline.model.experiments.norms import is_rms_norm
from ria_vllm.offline.model.run.layer_call import Left, read_at, replaced_forwards
from ria_vllm.offline.model.topology import Group, StandIn


@dataclass(frozen=True)
class Cut:
    """A place between two parts of a layer.

    ends_before: the module whose input is the residual stream there.
    stand_ins: for modules of the first part, while the second part runs.
    before: every module that is called in the first part.
    stream: there, in the experiment [1, tokens, hidden].
    """

    ends_before: str
    stand_ins: tuple[StandIn, ...]
    before: frozenset[str]
    stream: torch.Tensor


def find_cut(experiment: Experiment, seen: Sequence[Seen], linears: Sequence[str]) -> Cut | None:
    """The first place with linears on both sides from which the layer, with stand-ins before it, gives its own output.

    The first part is run until the first call of a module. So one that was called before the place cannot mark it.

    Args:
        seen: every call of a module, in order.
        linears: those that are pruned.
    """
    tried: set[tuple] = set()
    for number, end in enumerate(seen):
        before = [call.name for call in seen[:number]]
        if end.name in before:
            continue
        sides = [set(linears) & set(before), set(linears) - set(before)]
        if not all(sides) or end.key in tried or end.read.shape[-1:] != experiment.stream.shape[-1:]:
            continue
        tried.add(end.key)
        if end.read.numel() != experiment.stream.numel():
            continue
        stream = end.read.reshape(experiment.stream.shape)  # OPT's MLP has all tokens in one dimension
        if torch.equal(stream, experiment.stream):
            continue
        for stand_ins in _possible_stand_ins(experiment, seen[:number], end):
            left = _left_before(experiment, end.name)
            with replaced(experiment.layer, stand_ins, stream):
                if _gives_output(experiment, stream, left):
                    return Cut(end.name, stand_ins, frozenset(before), stream)
    return None


def how_it_adds(
    experiment: Experiment, seen: Sequence[Seen], stages: Sequence[Sequence[Group]], begin: Cut | None, end: Cut | None
) -> dict[str, Any]:
    """`Sublayer.factor` and `Sublayer.norm` of a part, as keywords: how the output of its last linear joins the stream.

    Args:
        stages: of the part.
        begin, end: where it begins and ends; None: where the layer does.
    """
    last = stages[-1] if stages else ()
    if len(last) != 1 or len(last[0].linears) != 1 or last[0].experts:
        return {}
    before = experiment.stream if begin is None else begin.stream
    after = experiment.output if end is None else end.stream
    outputs = [call.returned for call in seen if call.name == last[0].linears[0]]
    if len(outputs) != 1 or outputs[0] is None or outputs[0].numel() != before.numel():
        return {}
    output = outputs[0].reshape(before.shape)
    after_it = (call for call in seen if call.read.numel() == output.numel())
    after_it = (call for call in after_it if equal(call.read.reshape(output.shape), output))
    joins: dict[str | None, torch.Tensor] = {None: output}
    joins |= {call.name: call.returned for call in after_it if is_rms_norm(experiment.layer, call)}
    tensors = (*experiment.layer.parameters(), *experiment.layer.buffers())
    has_scalars = any(one.numel() == 1 and one.is_floating_point() for one in tensors)
    for norm, added in joins.items():
        added = added.reshape(before.shape)
        factor = float(((after - before) * added).sum() / added.square().sum())
        factor = round(factor, 12)  # 1 is 1
        if factor != 1 and has_scalars:
            continue  # one of which it may be: each layer has its own
        if factor and equal(before + factor * added, after):
            return {"factor": factor, "norm": norm}
    return {}


def replaced(layer: nn.Module, stand_ins: Sequence[StandIn], stream: torch.Tensor) -> AbstractContextManager[None]:
    """Let modules of the layer return what their stand-ins say, in the shape of `stream`, which the layer is run on."""
    return replaced_forwards({layer.get_submodule(one.module): partial(_returned, one, stream) for one in stand_ins})


def _returned(stand_in: StandIn, stream: torch.Tensor, *_: object, **__: object) -> object:
    tensor = stream.clone() if stand_in.passes_stream else torch.zeros_like(stream)
    return (tensor, *[None] * (stand_in.returns - 1)) if stand_in.returns else tensor


def _possible_stand_ins(experiment: Experiment, before: Sequence[Seen], end: Seen) -> Iterator[tuple[StandIn, ...]]:
    """For one module that was called before `end`, or for several that run side by side."""
    calls = {call.name: call.form for call in before if _may_be_replaced(experiment, call, end)}
    zeros = [StandIn(name, form) for name, form in calls.items()]
    for one in zeros:
        yield (one,)
        yield (replace(one, passes_stream=True),)
    outermost = [one for one in zeros if not any(one.module.startswith(f"{other}.") for other in calls)]
    if len(outermost) > 1:
        yield tuple(outermost)


def _may_be_replaced(experiment: Experiment, call: Seen, end: Seen) -> bool:
    module = experiment.layer.get_submodule(call.name)
    has_linears = not isinstance(module, nn.Linear) and any(isinstance(m, nn.Linear) for m in module.modules())
    same_shape = call.returned is not None and call.returned.shape == experiment.stream.shape
    return has_linears and same_shape and not f"{end.name}.".startswith(f"{call.name}.")


def _left_before(experiment: Experiment, end: str) -> Left:
    """What the layer has left for later ones when it comes to the module `end`."""
    left: Left = {}
    if experiment.left:
        read_at(experiment.layer.get_submodule(end), lambda: experiment.run(experiment.stream, left))
    return left


def _gives_output(experiment: Experiment, stream: torch.Tensor, left: Left) -> bool:
    """Whether the rest of the layer gives its own output, and leaves the rest of what it leaves."""
    left = dict(left)
    try:
        return experiment.same(experiment.run(stream, left), left)
    except RiaError:  # a layer that needs what the module really returns
        return False
