"""What layers read besides the residual stream, for this rank's chunks: tensors made from the text, and what earlier
layers have left."""

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ria_vllm.offline.model.run.layer_call import LayerCall, Left, Slot, tensors_mapped
from ria_vllm.offline.model.run.sharing import Sharing

# What one call of a layer needs besides what all calls of its shape have in common.
Given = tuple[dict[Slot, torch.Tensor], Left]


class OfChunks:
    """Tensors, and tuples of them, that each of this rank's chunks has of its own.

    Args:
        stored_dtype: of floats; None: as they come.
    """

    def __init__(self, stored_dtype: torch.dtype | None = None):
        self.stored_dtype = stored_dtype
        self.stored: dict[Hashable, dict[int, Any]] = {}

    def of(self, chunk: int, keys: Collection[Any]) -> dict[Any, Any]:
        """What was put there under these keys, on the CPU."""
        return {key: self.stored[key][chunk] for key in keys}

    def put(self, chunk: int, values: Mapping[Any, Any]) -> None:
        """Keep these values, in the place of earlier ones."""
        for key, value in values.items():
            self.stored.setdefault(key, {})[chunk] = tensors_mapped(value, self._narrow)

    def drop(self, keys: Collection[Any]) -> None:
        """Free what nothing reads any more."""
        for key in keys:
            self.stored.pop(key, None)

    def _narrow(self, tensor: torch.Tensor) -> torch.Tensor:
        # A copy, because it may be a view of something larger.
        return tensor.to("cpu", self.stored_dtype if tensor.is_floating_point() else None, copy=True)


@dataclass(frozen=True)
class AllArguments:
    """The arguments of all layers.

    calls: of each layer, by the shape of the stream.
    made: what is made from the text, by layer and argument.
    sharing: what layers leave for later ones.
    left: what they have left so far, for the pruned stream (False) and the dense one (True).
    """

    calls: Mapping[torch.Size, Sequence[LayerCall]]
    made: OfChunks
    sharing: Sharing
    left: Mapping[bool, OfChunks]

    def made_for(self, index: int) -> list[tuple[int, Slot]]:
        """What of `made` layer `index` reads."""
        call = next(iter(self.calls.values()))[index]
        return [(index, slot) for slot in sorted(call.varying, key=str)]

    def free(self, index: int) -> None:
        """Free what no layer needs after layer `index`."""
        self.made.drop(self.made_for(index))
        for left in self.left.values():
            left.drop(self.sharing.done(index))


@dataclass(frozen=True)
class Arguments:
    """How layer `index` is called, for each of this rank's chunks."""

    every: AllArguments
    index: int

    def given(self, dense: bool, chunk: int) -> Given:
        """What a chunk has of its own.

        Args:
            dense: in the dense model, or in the pruned one.
        """
        made = self.every.made.of(chunk, self.every.made_for(self.index))
        left = self.every.left[dense].of(chunk, sorted(self.every.sharing.before(self.index), key=str))
        return {slot: value for (_, slot), value in made.items()}, left

    def call(self, stream: torch.Tensor, given: Given | None = None) -> LayerCall:
        """The call for one stream, on its device; what is given has its dtype.

        Args:
            given: of the same chunk; None: nothing.
        """
        call = self.every.calls[stream.shape][self.index]
        if given is None:
            return call

        def fitting(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(stream.device, stream.dtype if tensor.is_floating_point() else tensor.dtype)

        made, left = (tensors_mapped(values, fitting) for values in given)
        return call.replaced(made).with_left(left)

    def put(self, dense: bool, chunk: int, left: Left) -> None:
        """Keep what the layer has left for a chunk, as far as later layers read it."""
        leaves = self.every.sharing.kept(self.index)
        self.every.left[dense].put(chunk, {entry: value for entry, value in left.items() if entry in leaves})
