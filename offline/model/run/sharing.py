"""What decoder layers leave for later ones, such as the keys and values that Gemma 3n's and Gemma 4's last layers read.

The model passes its layers a mapping, into which some put tensors and out of which others take them. Which layers do is
found out by running all of them, one after the other, on the meta device, which takes no memory and no time.
"""

from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from ria_vllm.hf.experts_layout import experts_modules
from ria_vllm.offline.model.run.layer_call import Entry, LayerCall, Left, random_like, tensors_of

META = torch.device("meta")


@dataclass(frozen=True)
class Sharing:
    """What layers leave for later ones.

    left: for each layer, what it puts into the model's mappings and a later one reads: tensors on the meta device, of
        the shapes for the text that was run.
    read: for each layer, the entries that it reads.
    """

    left: tuple[Left, ...]
    read: tuple[frozenset[Entry], ...]

    def before(self, index: int) -> Left:
        """What layer `index` reads of earlier layers."""
        found: Left = {}
        for left in self.left[:index]:
            found |= left
        return {entry: value for entry, value in found.items() if entry in self.read[index]}

    def kept(self, index: int) -> list[Entry]:
        """What layer `index` leaves that a later one reads."""
        return list(self.left[index])

    def done(self, index: int) -> set[Entry]:
        """What no layer reads after layer `index`."""
        entries = {entry for left in self.left for entry in left}
        return entries - {entry for read in self.read[index + 1 :] for entry in read}


def find_sharing(layers: Sequence[nn.Module], calls: Sequence[LayerCall], stream: torch.Tensor) -> Sharing:
    """What each layer leaves for later ones, and what it reads.

    Args:
        layers: their weights may be on any device.
        calls: how the model calls each of them.
        stream: into the first one, of the shape for which it is called so.

    Raises:
        RiaError: layers that are passed a mapping cannot be run on the meta device, or leave something else than
            tensors.
    """
    nothing = Sharing(({},) * len(layers), (frozenset(),) * len(layers))
    if not any(call.mappings for call in calls):
        return nothing
    put: list[Left] = []
    read: list[frozenset[Entry]] = []
    there: Left = {}
    stream = stream.to(META)
    for layer, call in zip(layers, calls, strict=True):
        left: Left = {}
        watched = {slot: _watched(call[slot], number) for slot, number in call.mappings.items()}
        own = call.replaced(watched).mapped(lambda tensor: tensor.to(META)).with_left(there)
        on_meta = _OnMeta(layer)
        with _experts_skipped(layer):
            stream = own(on_meta, stream, left)
        put.append(left)
        read.append(frozenset(on_meta.read & there.keys()))
        there = {entry: value for entry, value in there.items() if entry not in on_meta.removed} | left
    later = [frozenset().union(*read[index + 1 :]) for index in range(len(layers))]
    kept = [{entry: value for entry, value in left.items() if entry in after} for left, after in zip(put, later)]
    for left, call in zip(kept, calls, strict=True):
        for value in left.values():
            list(tensors_of(value, call.place))
    return Sharing(tuple(kept), tuple(read))


def with_what_is_left(
    layers: Sequence[nn.Module], stream: torch.Tensor, calls: Sequence[LayerCall]
) -> tuple[torch.Tensor, list[LayerCall]]:
    """The stream, and the calls with random tensors in the place of what earlier layers leave; `leaves` is known."""
    sharing, draw = find_sharing(layers, calls, stream), torch.Generator().manual_seed(0)
    filled = [call.with_left(random_like(sharing.before(index), draw, stream)) for index, call in enumerate(calls)]
    return stream, [replace(call, leaves=frozenset(sharing.kept(index))) for index, call in enumerate(filled)]


class _OnMeta:
    """Runs a layer with all its tensors on the meta device, and leaves it as it is."""

    def __init__(self, layer: nn.Module):
        self.layer = layer
        named = [*layer.named_parameters(remove_duplicate=False), *layer.named_buffers(remove_duplicate=False)]
        self.tensors = {name: tensor.detach().to(META) for name, tensor in named}
        self.read: set[Entry] = set()
        self.removed: set[Entry] = set()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        watched = [value for value in (*args, *kwargs.values()) if isinstance(value, _Watched)]
        before = [mapping.numbered() for mapping in watched]
        for mapping in watched:
            mapping.read = self.read
        try:
            return functional_call(self.layer, self.tensors, args, kwargs)
        finally:
            for mapping, entries in zip(watched, before, strict=True):
                mapping.read = None
                self.removed |= entries - mapping.numbered()


@contextmanager
def _experts_skipped(layer: nn.Module) -> Iterator[None]:
    """Let routed experts return zeros: which of them are run depends on numbers, and there are none."""
    modules = [layer.get_submodule(path) for path in experts_modules(layer)]
    before = [module.__dict__.get("forward") for module in modules]
    for module in modules:
        module.forward = lambda X, *_, **__: torch.zeros_like(X)
    try:
        yield
    finally:
        for module, forward in zip(modules, before, strict=True):
            del module.forward
            if forward is not None:
                module.forward = forward


def _noting_one(name: str) -> Any:
    """The method `name` of a mapping, whose first argument is a key."""

    def method(self: Any, key: Any, *others: Any, **named: Any) -> Any:
        self._note(key)
        return getattr(super(_Watched, self), name)(key, *others, **named)

    return method


def _noting_all(name: str) -> Any:
    """The method `name` of a mapping, which reads all of it."""

    def method(self: Any, *others: Any) -> Any:
        self._note_all()
        return getattr(super(_Watched, self), name)(*others)

    return method


class _Watched:
    """Mixed into a mapping: adds the entries that are read to a set, if it has one."""

    number: int
    read: set[Entry] | None = None

    def numbered(self) -> set[Entry]:
        """The entries that are there now."""
        return {(self.number, key) for key in super().__iter__()}  # type: ignore[misc]

    def _note(self, key: Any) -> None:
        if self.read is not None:
            self.read.add((self.number, key))

    def _note_all(self) -> None:
        if self.read is not None:
            self.read |= self.numbered()

    def __iter__(self) -> Iterator[Any]:
        keys = list(super().__iter__())  # type: ignore[misc]
        self._note_all()
        return iter(keys)

    __getitem__, __contains__ = _noting_one("__getitem__"), _noting_one("__contains__")
    get, pop, setdefault = _noting_one("get"), _noting_one("pop"), _noting_one("setdefault")
    keys, values, items = _noting_all("keys"), _noting_all("values"), _noting_all("items")
    popitem, copy, __reversed__ = _noting_all("popitem"), _noting_all("copy"), _noting_all("__reversed__")
    __or__, __ror__ = _noting_all("__or__"), _noting_all("__ror__")


def _watched(mapping: MutableMapping, number: int) -> MutableMapping:
    """The same mapping, of a class that notes what is read."""
    kind = type(f"Watched{type(mapping).__name__}", (_Watched, type(mapping)), {"number": number})
    if isinstance(mapping, dict):
        return kind(mapping)
    made = kind.__new__(kind)
    made.__dict__.update(vars(copy(mapping)))
    return made
