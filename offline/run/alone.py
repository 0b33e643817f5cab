"""What each sublayer loses by itself, for a budget."""

from dataclasses import replace

import torch

from ria_vllm.offline.calibration.activations import Activations, Streams
from ria_vllm.offline.calibration.sublayer_pass import SublayerPass
from ria_vllm.offline.model.topology import Unit

TOKENS = 512  # of the held-out ones, on which each sublayer is measured; see docs/lab/quality.md


class EachAlone:
    """The held-out stream of the dense model, and of each model with only one pruned sublayer.

    Attributes:
        streams: those of the pass over the layers, pruned and dense still the same, with so many held-out chunks, the
            last ones, that they have `TOKENS`, or all.
        start: all held-out chunks before the first layer.
        found: by the pruned sublayer, behind the last one that was passed. Others may be among them.
    """

    def __init__(self, streams: Streams):
        self.start = _held_out(streams)
        held_out, tokens = 0, 0
        while tokens < TOKENS and held_out < streams.held_out:
            held_out += 1
            tokens += streams.pruned[-held_out].shape[-3:-1].numel()
        self.streams = replace(streams, held_out=held_out)
        self.found: dict[Unit, Activations] = {}
        self._before = self.start

    def pass_dense(self, sublayer_pass: SublayerPass) -> None:
        """Take them through a sublayer which is still dense; the dense stream has to be before it."""
        self._before = _held_out(self.streams)
        for stream in self.found.values():
            self._advance(stream, sublayer_pass)

    def pass_pruned(self, unit: Unit, sublayer_pass: SublayerPass) -> None:
        """Add the model of which only this sublayer is pruned, as it is now: the last one that was passed."""
        self.found[unit] = self._before
        self._advance(self.found[unit], sublayer_pass)

    def _advance(self, stream: Activations, sublayer_pass: SublayerPass) -> None:
        for index in self.streams.measured:
            stream[index] = sublayer_pass.run(stream, index)


def _held_out(streams: Streams) -> Activations:
    """The dense model's held-out chunks, without the others, which are not to be kept alive."""
    assert streams.dense is not None
    found = streams.dense.copy()
    for index in streams.fitted:
        found[index] = torch.empty(0)
    return found
