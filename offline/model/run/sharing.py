"""What decoder layers leave for later ones, such as the keys and values that Gemma 3n's and Gemma 4's last layers read.

The model passes its layers a mapping, into which some put tensors and out of which others take them. Which layers do is
found out by running all of them, one after the other, on the meta device, which takes no memory and no time.
"""

from collections import UserDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from ria_vllm.errors import RiaError
from ria_vllm.hf.experts_layout import experts_modules
from ria_vllm.offline.model.run.layer_call import Entry, LayerCall, Left, random_like, replaced_forwards, tensors_of

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
        RiaError: layers that are passed a mapping cannot be run on the meta device, take something out of it, or leave
            something else than tensors.
    """
    if not any(call.mappings for call in calls):
        return Sharing(({},) * len(layers), (frozenset(),) * len(layers))
    put: list[Left] = []
    read: list[frozenset[Entry]] = []
    there: Left = {}
    stream = stream.to(META)
    for layer, call in zip(layers, calls, strict=True):
        left: Left = {}
        watched = {slot: _Watched(number, call[slot]) for slot, number in call.mappings.items()}
        own = call.replaced(watched).mapped(lambda tensor: tensor.to(META)).with_left(there)
        on_meta = _OnMeta(layer, call.place)
        with _experts_skipped(layer):
            stream = own(on_meta, stream, left)
        put.append(left)
        read.append(frozenset(on_meta.read & there.keys()))
        there |= left
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


class _Watched(UserDict):
    """A mapping of this number that notes the entries that are read out of it, while it has a set for them."""

    read: set[Entry] | None = None

    def __init__(self, number: int, content: Mapping[Any, Any]):
        super().__init__(content)
        self.number = number

    def _note(self, *keys: Any) -> None:
        if self.read is not None:
            self.read.update((self.number, key) for key in keys)

    def __getitem__(self, key: Any) -> Any:
        self._note(key)
        return super().__getitem__(key)

    def __contains__(self, key: Any) -> bool:
        self._note(key)
        return super().__contains__(key)

    def __iter__(self) -> Iterator[Any]:
        self._note(*self.data)
        return super().__iter__()

    def __or__(self, other: Any) -> Any:
        return {**self, **other}

    def __ror__(self, other: Any) -> Any:
        return {**other, **self}


class _OnMeta:
    """Runs a layer with all its tensors on the meta device, and leaves it as it is.

    Attributes:
        read: the entries of mappings that it has read.
    """

    def __init__(self, layer: nn.Module, place: str):
        self.layer, self.place = layer, place
        named = [*layer.named_parameters(remove_duplicate=False), *layer.named_buffers(remove_duplicate=False)]
        self.tensors = {name: tensor.detach().to(META) for name, tensor in named}
        self.read: set[Entry] = set()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        watched = [value for value in (*args, *kwargs.values()) if isinstance(value, _Watched)]
        before = [set(mapping.data) for mapping in watched]
        for mapping in watched:
            mapping.read = self.read
        out = functional_call(self.layer, self.tensors, args, kwargs)
        for mapping, keys in zip(watched, before, strict=True):
            mapping.read = None
            if keys - mapping.data.keys():
                raise RiaError(
                    f"{self.place}: takes something out of what earlier layers have left, so its layers cannot be "
                    "pruned one by one. Such a model cannot be compressed."
                )
        return out


def _experts_skipped(layer: nn.Module) -> AbstractContextManager[None]:
    """Let routed experts return zeros: which of them are run depends on numbers, and there are none."""
    modules = map(layer.get_submodule, experts_modules(layer))
    return replaced_forwards({module: lambda X, *_, **__: torch.zeros_like(X) for module in modules})
