"""What layers read besides the residual stream, for this rank's chunks: tensors made from the text, and what earlier
layers have left."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ria_vllm.offline.calibration.activations import Activations
from ria_vllm.offline.model.run.layer_call import Entry, LayerCall, Left, Slot, tensors_mapped
from ria_vllm.offline.model.run.sharing import Sharing

# What one call of a layer needs besides what all calls of its shape have in common.
Given = tuple[dict[Slot, torch.Tensor], Left]


class LeftBehind:
    """What layers leave for later ones, for this rank's chunks of one residual stream.

    Args:
        stored_dtype: of its floats; None: as they come.
    """

    def __init__(self, stored_dtype: torch.dtype | None = None):
        self.stored_dtype = stored_dtype
        self.stored: dict[Entry, dict[int, Any]] = {}

    def of(self, chunk: int, entries: Sequence[Entry]) -> Left:
        """These entries, as they were left for a chunk, on the CPU."""
        return {entry: self.stored[entry][chunk] for entry in entries}

    def put(self, chunk: int, left: Mapping[Entry, Any]) -> None:
        """Keep what a layer has left for a chunk: tensors, and tuples of them."""
        for entry, value in left.items():
            self.stored.setdefault(entry, {})[chunk] = tensors_mapped(value, self._narrow)

    def drop(self, entries: set[Entry]) -> None:
        """Free what no layer reads any more."""
        for entry in entries & self.stored.keys():
            del self.stored[entry]

    def _narrow(self, tensor: torch.Tensor) -> torch.Tensor:
        # A copy, because it may be a view of something larger.
        return tensor.to("cpu", self.stored_dtype if tensor.is_floating_point() else None, copy=True)


@dataclass(frozen=True)
class Arguments:
    """How one layer is called, for each of this rank's chunks.

    calls: by the shape of the stream.
    made: what is made from the text, for each argument.
    reads, leaves: what the layer reads of earlier layers, and what it leaves that later ones read.
    left: what earlier layers have left, for the pruned stream and the dense one.
    """

    calls: Mapping[torch.Size, LayerCall]
    made: Mapping[Slot, Activations] = field(default_factory=dict)
    reads: Sequence[Entry] = ()
    leaves: Sequence[Entry] = ()
    left: Mapping[bool, LeftBehind] = field(default_factory=dict)

    def given(self, dense: bool, chunk: int) -> Given:
        """What a chunk has of its own.

        Args:
            dense: in the dense model, or in the pruned one.
        """
        made = {slot: stored[chunk] for slot, stored in self.made.items()}
        return made, self.left[dense].of(chunk, self.reads) if self.reads else {}

    def call(self, stream: torch.Tensor, given: Given | None = None) -> LayerCall:
        """The call for one stream, on its device; what is given has its dtype.

        Args:
            given: of the same chunk; None: nothing.
        """
        call = self.calls[stream.shape]
        if given is None:
            return call

        def fitting(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(stream.device, stream.dtype if tensor.is_floating_point() else tensor.dtype)

        made, left = given
        return call.replaced({slot: fitting(tensor) for slot, tensor in made.items()}).with_left(
            {entry: tensors_mapped(value, fitting) for entry, value in left.items()}
        )

    def put(self, dense: bool, chunk: int, left: Mapping[Entry, Any]) -> None:
        """Keep what the layer has left for a chunk, as far as later layers read it."""
        kept = {entry: value for entry, value in left.items() if entry in self.leaves}
        if kept:
            self.left[dense].put(chunk, kept)


@dataclass(frozen=True)
class AllArguments:
    """The arguments of all layers.

    calls: of each layer, by the shape of the stream.
    made: for each layer, what is made from the text.
    sharing: what layers leave for later ones.
    left: what they have left so far, for the pruned stream (False) and the dense one (True).
    """

    calls: Mapping[torch.Size, Sequence[LayerCall]]
    made: Sequence[Mapping[Slot, Activations]]
    sharing: Sharing
    left: Mapping[bool, LeftBehind]

    def of(self, index: int) -> Arguments:
        """Those of layer `index`."""
        calls = {shape: calls[index] for shape, calls in self.calls.items()}
        reads = sorted(self.sharing.before(index), key=str)
        return Arguments(calls, self.made[index], reads, self.sharing.kept(index), self.left)

    def free(self, index: int) -> None:
        """Free what no layer needs after layer `index`."""
        for stored in self.made[index].values():
            stored.remove()
        for left in self.left.values():
            left.drop(self.sharing.done(index))
