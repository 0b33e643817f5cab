"""The routed experts of one layer after another: what they read, their pruning, and running them pruned."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from ria_vllm.offline.calibration.activations import Activations, Streams
from ria_vllm.offline.calibration.sublayer_pass import SublayerPass
from ria_vllm.offline.experts.prune import prune_expert
from ria_vllm.offline.experts.routing import Reads, RoutedTokens, read_by
from ria_vllm.offline.experts.store import ExpertStore, RoutedExperts
from ria_vllm.offline.model.experts.run import set_weights
from ria_vllm.offline.runtime.memory import trim
from ria_vllm.progress import Monitor


class ExpertsPass:
    """The part of a pass over the layers that deals with experts, each named by the path of its module in the layer.

    Args:
        streams: the activations before the current sublayer.
        store: where pruned experts are kept.
    """

    def __init__(self, store: ExpertStore, streams: Streams, monitor: Monitor):
        self.store, self.model = store, store.model
        self.streams, self.monitor = streams, monitor
        self._kept: list[Reads] = []  # beside the streams, for the current layer

    @contextmanager
    def removed_after_layer(self) -> Iterator[None]:
        """What is kept for experts is needed only until their layer is pruned, and takes as much space as a stream."""
        try:
            yield
        finally:
            while self._kept:
                self._kept.pop().remove()

    def dense_reads(self, index: int, sublayer_pass: SublayerPass, paths: Iterable[str]) -> dict[str, Reads]:
        """What experts of a sublayer read in the dense model, if it is followed; before anything is pruned."""
        stream = self.streams.dense
        return {} if stream is None else {path: self._reads(index, sublayer_pass, path, stream) for path in paths}

    def of(self, index: int, sublayer_pass: SublayerPass, path: str, dense: Reads | None, kept: bool) -> RoutedExperts:
        """The experts at `path`, with what they read now, for the other methods.

        Args:
            dense: what they read in the dense model.
            kept: see `RoutedExperts`.
        """
        experts = self.store.of(index, path)
        pruned, layout = self._reads(index, sublayer_pass, path, self.streams.pruned), experts.layout
        routed = RoutedTokens(pruned, dense, max(layout.width, layout.inner), layout.num_experts)
        return replace(experts, routed=routed, kept=kept)

    def prune(self, experts: RoutedExperts, p: torch.Tensor | None) -> None:
        """Prune all experts that are not in the work folder, and put them there."""
        numbers = range(experts.layout.num_experts)
        for expert in self.monitor.steps(numbers, "experts", len(numbers)):
            if not experts.has(expert):
                experts.write(expert, prune_expert(experts, expert, p))
                trim()

    def use_pruned(self, index: int, path: str) -> None:
        """Let the experts of a loaded layer be run with their pruned weights."""
        experts = self.store.of(index, path)

        def weights(expert: int) -> dict[str, torch.Tensor]:
            found = experts.weights(expert)
            return {kind: weight.to(self.model.device, self.model.dtype) for kind, weight in found.items()}

        set_weights(experts.module, weights)

    def _reads(self, index: int, sublayer_pass: SublayerPass, path: str, stream: Activations) -> Reads:
        experts, reads = self.store.of(index, path), Reads(stream)
        self._kept.append(reads)
        read_by(experts.module, sublayer_pass, stream, reads, experts.place(experts.files.module))
        return reads
