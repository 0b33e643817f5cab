"""What layers read besides the residual stream, for each chunk: tensors made from the text, and what earlier
layers have left."""

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ria_vllm.offline.model.run.layer_call import LayerCall, Left, Slot, tensors_mapped
from ria_vllm.offline.model.run.sharing import Sharing


class OfChunks:
    """Tensors, and tuples of them, that each chunk has of its own.

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
    """How layer `index` is called, for each chunk."""

    every: AllArguments
    index: int

    def call(self, stream: torch.Tensor, dense: bool, chunk: int) -> LayerCall:
        """The call for a chunk of a stream; what only this chunk has gets the stream's device and dtype.

        Args:
            dense: in the dense model, or in the pruned one.
        """
        every = self.every
        made = every.made.of(chunk, every.made_for(self.index))
        left = every.left[dense].of(chunk, sorted(every.sharing.before(self.index), key=str))

        def fitting(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(stream.device, stream.dtype if tensor.is_floating_point() else tensor.dtype)

        own = tensors_mapped({slot: value for (_, slot), value in made.items()}, fitting)
        return every.calls[stream.shape][self.index].replaced(own).with_left(tensors_mapped(left, fitting))

    def put(self, dense: bool, chunk: int, left: Left) -> None:
        """Keep what the layer has left for a chunk, as far as later layers read it."""
        leaves = self.every.sharing.kept(self.index)
        self.every.left[dense].put(chunk, {entry: value for entry, value in left.items() if entry in leaves})
