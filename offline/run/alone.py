"""What each sublayer loses by itself, for a budget."""

import torch

from ria_vllm.offline.calibration.activations import Activations, Streams
from ria_vllm.offline.calibration.sublayer_pass import SublayerPass
from ria_vllm.offline.model.topology import Unit


class EachAlone:
    """The held-out stream of the dense model, and of each model with only one pruned sublayer.

    Attributes:
        streams: those of the pass over the layers; pruned and dense are still the same.
        start: the held-out chunks before the first layer.
        found: by the pruned sublayer, behind the last one that was passed. Others may be among them.
    """

    def __init__(self, streams: Streams):
        self.streams = streams
        self.start = self._copy()
        self.found: dict[Unit, Activations] = {}
        self._before = self.start

    def pass_dense(self, sublayer_pass: SublayerPass) -> None:
        """Take them through a sublayer which is still dense; the dense stream has to be before it."""
        self._before = self._copy()
        for stream in self.found.values():
            self._advance(stream, sublayer_pass)

    def pass_pruned(self, unit: Unit, sublayer_pass: SublayerPass) -> None:
        """Add the model of which only this sublayer is pruned, as it is now: the last one that was passed."""
        self.found[unit] = self._before
        self._advance(self.found[unit], sublayer_pass)

    def _advance(self, stream: Activations, sublayer_pass: SublayerPass) -> None:
        for index in self.streams.measured:
            stream[index] = sublayer_pass.run(stream, index)

    def _copy(self) -> Activations:
        dense = self.streams.dense
        assert dense is not None
        found = dense.copy()
        for index in self.streams.fitted:  # which are not to be kept alive
            found[index] = torch.empty(0)
        return found
