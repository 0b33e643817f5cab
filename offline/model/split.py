"""Where a decoder layer can be cut in two, so that each part is run, pruned and reconstructed by itself."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from ria_vllm.errors import RiaError
from ria_vllm.offline.model.embedding import Reached
from ria_vllm.offline.model.experiment import Experiment, Seen, equal
from ria_vllm.offline.model.layer_call import Left
from ria_vllm.offline.model.topology import Group


@dataclass(frozen=True)
class Cut:
    """A place between two parts of a layer.

    ends_before: the module whose input is the residual stream there.
    zeroed: the module of the first part that returns zeros while the second part runs.
    zeroed_returns: the length of the tuple that it returns; 0: a bare tensor.
    before: every module that is called in the first part.
    stream: there, in the experiment [1, tokens, hidden].
    """

    ends_before: str
    zeroed: str
    zeroed_returns: int
    before: frozenset[str]
    stream: torch.Tensor


def find_cut(experiment: Experiment, seen: Sequence[Seen], linears: Sequence[str]) -> Cut | None:
    """The first place with linears on both sides from which the layer, with one module zeroed, gives its own output.

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
        for call in seen[:number]:
            if _may_be_zeroed(experiment, call, end):
                left = _left_before(experiment, end.name)
                with zeroed(experiment.layer, call.name, call.form, stream):
                    if _gives_output(experiment, stream, left):
                        return Cut(end.name, call.name, call.form, frozenset(before), stream)
    return None


def is_sum(
    experiment: Experiment, seen: Sequence[Seen], stages: Sequence[Sequence[Group]], begin: Cut | None, end: Cut | None
) -> bool:
    """Whether the stream after a part is the one before it plus the output of the last stage's only linear.

    Args:
        stages: of the part.
        begin, end: where it begins and ends; None: where the layer does.
    """
    last = stages[-1] if stages else ()
    if len(last) != 1 or len(last[0].linears) != 1 or last[0].experts:
        return False
    before = experiment.stream if begin is None else begin.stream
    after = experiment.output if end is None else end.stream
    added = [call.returned for call in seen if call.name == last[0].linears[0]]
    if len(added) != 1 or added[0] is None or added[0].numel() != before.numel():
        return False
    return equal(before + added[0].view_as(before), after)


@contextmanager
def zeroed(layer: nn.Module, name: str | None, returns: int, stream: torch.Tensor) -> Iterator[None]:
    """Let the module `name` return zeros of the stream's shape; None: no module.

    Args:
        returns: the length of the tuple that it returns, in which everything else is None; 0: a bare tensor.
    """
    if name is None:
        yield
        return
    module = layer.get_submodule(name)

    def forward(*args: object, **kwargs: object) -> object:
        zeros = torch.zeros_like(stream)
        return (zeros, *[None] * (returns - 1)) if returns else zeros

    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def _may_be_zeroed(experiment: Experiment, call: Seen, end: Seen) -> bool:
    module = experiment.layer.get_submodule(call.name)
    has_linears = not isinstance(module, nn.Linear) and any(isinstance(m, nn.Linear) for m in module.modules())
    same_shape = call.returned is not None and call.returned.shape == experiment.stream.shape
    return has_linears and same_shape and not f"{end.name}.".startswith(f"{call.name}.")


def _left_before(experiment: Experiment, end: str) -> Left:
    """What the layer has left for later ones when it comes to the module `end`."""
    left: Left = {}
    if not experiment.left:
        return left

    def stop(*_: object) -> None:
        raise Reached

    hook = experiment.layer.get_submodule(end).register_forward_pre_hook(stop)
    try:
        experiment.run(experiment.stream, left)
    except Reached:
        pass
    finally:
        hook.remove()
    return left


def _gives_output(experiment: Experiment, stream: torch.Tensor, left: Left) -> bool:
    """Whether the rest of the layer gives its own output, and leaves the rest of what it leaves."""
    left = dict(left)
    try:
        return experiment.same(experiment.run(stream, left), left)
    except RiaError:  # a layer that needs what the module really returns
        return False
