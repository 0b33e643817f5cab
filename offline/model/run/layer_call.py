"""How a model calls a decoder layer: everything that the layer reads and writes besides the residual stream."""

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ria_vllm.errors import RiaError
from ria_vllm.offline.model.run.hf import explained

# An argument of a call: its position among those without a name, or its name.
Slot = int | str
# An entry of a mapping that the model passes to its layers: the mapping's number, and the entry's key.
Entry = tuple[int, Any]
# What layers put into such mappings.
Left = dict[Entry, Any]


@dataclass(frozen=True)
class LayerCall:
    """How the model calls a decoder layer for one batch shape: all arguments but the residual stream.

    by_name: the stream is passed as the keyword argument `hidden_states`.
    place: the model's folder and the layer, for errors.
    varying: the arguments that are tensors made from the text, such as Gemma's per-layer inputs.
    mappings: the arguments that are mappings, into which layers may put something for later ones -> the number of the
        mapping. Calls that get the same mapping have the same number.
    leaves: what the layer puts into them that later layers read, if that is known.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    by_name: bool
    place: str = ""
    varying: frozenset[Slot] = frozenset()
    mappings: Mapping[Slot, int] = field(default_factory=dict)
    leaves: frozenset[Entry] = frozenset()

    def __call__(self, layer: nn.Module, stream: torch.Tensor, left: Left | None = None) -> torch.Tensor:
        """The stream after the layer.

        Args:
            left: what the layer puts into its mappings is added here, even if the call is interrupted.
        """
        kind = type(layer).__name__
        own = replace(self, args=_own(self.args), kwargs=_own(self.kwargs))
        before, nothing = own.entries(), object()
        try:
            with explained(f"{self.place}: transformers cannot run {kind} by itself; another version of it may"):
                if self.by_name:
                    out = layer(*own.args, hidden_states=stream, **own.kwargs)
                else:
                    out = layer(stream, *own.args, **own.kwargs)
        finally:
            if left is not None:
                now = own.entries()
                left.update({entry: value for entry, value in now.items() if before.get(entry, nothing) is not value})
        return out[0] if isinstance(out, tuple) else out

    def entries(self) -> Left:
        """What is in its mappings."""
        found: Left = {}
        for slot, number in self.mappings.items():
            found |= {(number, key): value for key, value in self[slot].items()}
        return found

    def __getitem__(self, slot: Slot) -> Any:
        return self.args[slot] if isinstance(slot, int) else self.kwargs[slot]

    def slots(self) -> list[Slot]:
        """All arguments."""
        return [*range(len(self.args)), *self.kwargs]

    def replaced(self, values: Mapping[Slot, Any]) -> "LayerCall":
        """The same call with other values of some arguments."""
        args = tuple(values.get(slot, value) for slot, value in enumerate(self.args))
        return replace(self, args=args, kwargs={name: values.get(name, value) for name, value in self.kwargs.items()})

    def with_left(self, left: Mapping[Entry, Any]) -> "LayerCall":
        """The same call with what earlier layers have put into its mappings."""
        values: dict[Slot, Any] = {}
        for slot, number in self.mappings.items():
            values[slot] = copy(self[slot])
            values[slot].update({key: value for (other, key), value in left.items() if other == number})
        return self.replaced(values)

    def mapped(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "LayerCall":
        """The same call with all tensors changed."""
        return replace(self, args=tensors_mapped(self.args, change), kwargs=tensors_mapped(self.kwargs, change))

    def differences(self, other: "LayerCall") -> list[Slot]:
        """The arguments that are not the same in both calls, tensors compared by value."""
        if len(self.args) != len(other.args) or self.kwargs.keys() != other.kwargs.keys():
            return list(dict.fromkeys([*self.slots(), *other.slots()]))
        return [slot for slot in self.slots() if not _equal(self[slot], other[slot])]


def first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """What a module reads: the first tensor among the arguments of a call."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), None)


class Reached(BaseException):
    """Stops a forward pass that has reached the point of interest. Not an Exception, so that no handler catches it."""


def read_at(module: nn.Module, run: Callable[[], Any]) -> torch.Tensor | None:
    """The first tensor that `module` reads during `run`, which stops there; None: it reads none."""
    found: list[torch.Tensor] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensor = first_tensor(args, kwargs)
        if tensor is not None:
            found.append(tensor)
            raise Reached

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        run()
    except Reached:
        if not found:
            raise  # another hook stopped the pass
    finally:
        handle.remove()
    return found[0] if found else None


@contextmanager
def replaced_forwards(forwards: Mapping[nn.Module, Callable]) -> Iterator[None]:
    """Let modules compute something else."""
    before = {module: module.__dict__.get("forward") for module in forwards}
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module, own in before.items():
            del module.forward
            if own is not None:
                module.forward = own


def random_like(left: Mapping[Entry, Any], draw: torch.Generator, like: torch.Tensor) -> Left:
    """Random tensors of the same shapes, with the dtype and device of `like`; zeros for integers, which may be places.

    Args:
        left: tensors on any device, the meta device too.
    """

    def drawn(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point():
            return torch.zeros(tensor.shape, dtype=tensor.dtype, device=like.device)
        return torch.randn(tensor.shape, generator=draw).to(like.device, like.dtype)

    return {entry: tensors_mapped(value, drawn) for entry, value in left.items()}


def tensors_mapped(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same with all tensors in it changed, and mappings and lists of its own."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, (tuple, list)):
        items = (tensors_mapped(item, change) for item in value)
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, MutableMapping):
        own = copy(value)
        own.update({key: tensors_mapped(item, change) for key, item in value.items()})
        return own
    return value


def tensors_of(value: Any, place: str) -> Iterator[torch.Tensor]:
    """The tensors in what a layer has left, in the order of `tensors_mapped`.

    Raises:
        RiaError: there is something else in it.
    """
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_of(item, place)
    else:
        raise RiaError(
            f"{place}: leaves a {type(value).__name__} for later layers, and only tensors are understood, so layers "
            "cannot be pruned one by one. Such a model cannot be compressed."
        )


def _own(value: Any) -> Any:
    """The same with mappings of its own: what a layer puts into them for later layers depends on the text."""
    return tensors_mapped(value, lambda tensor: tensor)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, (tuple, list)):
        return isinstance(other, (tuple, list)) and len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, Mapping):
        return isinstance(other, Mapping) and one.keys() == other.keys() and all(_equal(one[k], other[k]) for k in one)
    if isinstance(one, (bool, int, float, str)):
        return type(one) is type(other) and one == other
    return type(one) is type(other)  # None, or an object that the model makes anew in each pass
