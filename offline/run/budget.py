"""`--max-loss`: which sublayers stay dense, so that the model loses no more than it may.

While everything is pruned, the held-out samples also go through the dense model with a single pruned sublayer, for each
one. So it is known what each loses by itself. The model is then measured with the first of them pruned, in the order of
loss for each weight, and a bisection finds how many it can bear. These are pruned once more, in a run of their own,
which makes up for what they lose and for no more.

Sublayers are taken as a whole, because permutations fold, scales migrate and weights are trained inside of them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ria_vllm.offline.calibration.activations import Activations, Streams
from ria_vllm.offline.calibration.sublayer_pass import SublayerPass

Unit = tuple[int, str]
"""Layer, and the name of its sublayer."""
REASON = "--max-loss"


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

    def with_pruned(self, stream: Activations) -> Streams:
        """The streams with another one in the place of the pruned model's."""
        return replace(self.streams, pruned=stream)

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


@dataclass(frozen=True)
class Choice:
    """What `--max-loss` has found.

    pruned: the sublayers that are pruned; all others stay dense.
    measured: how many are pruned -> perplexity and KL of the model.
    """

    pruned: frozenset[Unit]
    measured: Mapping[int, Mapping[str, Any]]


def choose(
    alone: Mapping[Unit, Mapping[str, Any]],
    weights: Mapping[Unit, int],
    measure: Callable[[frozenset[Unit]], Mapping[str, Any]],
    max_loss: float,
) -> Choice:
    """The most sublayers whose pruning multiplies the dense model's perplexity by at most 1 + `max_loss`.

    Args:
        alone: sublayer -> the loss of the model with only this one pruned.
        weights: how many are pruned: a step of decoding takes as long as it takes to read them.
        measure: the loss of the model with these pruned, as `held_out_loss` returns it.
    """
    order = sorted(alone, key=lambda unit: (alone[unit]["kl"] / weights[unit], unit))
    measured: dict[int, Mapping[str, Any]] = {}
    most, too_many = 0, len(order) + 1
    count = len(order)
    while most + 1 < too_many:
        found = measured[count] = measure(frozenset(order[:count]))
        if found["perplexity"] <= found["perplexity_dense"] * (1 + max_loss):
            most = count
        else:
            too_many = count
        count = (most + too_many) // 2
    return Choice(frozenset(order[:most]), measured)
