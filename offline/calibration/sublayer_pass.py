"""One sublayer over all chunks: the statistics of what its linears read, and the streams after it."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from ria_vllm.errors import RiaError
from ria_vllm.offline.calibration.activations import Activations, Streams
from ria_vllm.offline.calibration.arguments import Arguments
from ria_vllm.offline.calibration.statistics import Statistics, StatisticsSum
from ria_vllm.offline.calibration.sublayer import SublayerRunner
from ria_vllm.offline.model.experiments.norms import rms_factors
from ria_vllm.offline.model.run.layer_call import LayerCall, Left
from ria_vllm.offline.model.topology import Group
from ria_vllm.progress import Monitor


@dataclass(frozen=True)
class SublayerPass:
    """Takes the residual streams through one sublayer.

    arguments: what the layer reads besides them.
    streams: those before the sublayer; `advance` replaces one by the stream after it.
    place: a linear's name relative to the layer -> what an error about it begins with.
    gains: of the norms that read the stream, in the layer as it was loaded: [hidden] float32 each.
    """

    runner: SublayerRunner
    arguments: Arguments
    streams: Streams
    monitor: Monitor
    place: Callable[[str], str]
    gains: Sequence[torch.Tensor] = ()

    @property
    def stages(self) -> tuple[tuple[Group, ...], ...]:
        return self.runner.sublayer.stages

    def statistics(
        self,
        number: int,
        groups: Sequence[Group],
        with_gram: bool,
        with_drift: bool = True,
        rounded: Collection[str] = (),
    ) -> list[Statistics]:
        """The statistics of the groups of one stage.

        Where the dense model is followed, two stages have a drift, unless none is asked for. For the first one, ask
        before anything of the sublayer is pruned and before the dense stream is advanced. For the last one, if its
        linear adds to the stream, ask when everything else of the sublayer is pruned and the dense stream is advanced.
        If there is only one stage, ask as for the first; its drift is that of the last one where its linear adds.

        Args:
            number: of the stage, counted from 0.
            groups: its groups, with only the linears that are to be pruned or rounded.
            rounded: those that are only rounded. One that the layer does not use has statistics of zeros.

        Raises:
            RiaError: NaN or infinite activations, or a linear that is to be pruned, and that the layer does not use.
        """
        dense = self.streams.dense if with_drift else None
        first, joins = number == 0, self.runner.sublayer.factor != 0 and number == len(self.stages) - 1
        linears = [group.linears[0] for group in groups]
        sums = {
            name: StatisticsSum(self.runner.linear(name).in_features, with_gram, self.runner.device, self.runner.dtype)
            for name in linears
        }
        alone = frozenset(group.linears[0] for group in groups if len(group.linears) == 1)
        needed = [group.linears[0] for group in groups if not set(group.linears) <= set(rounded)]
        for index in self._steps(self.streams.fitted):
            self._check_used(needed, self._add_chunk(index, sums, alone, dense, first, joins))
        return [sums.pop(name).finish(self.place(name)) for name in linears]

    def advance(self, stream: Activations, chunks: range | None = None) -> None:
        """Replace the stream before the sublayer by the one after it.

        Args:
            chunks: only these; None: all.
        """
        for index in self._steps(range(len(stream)) if chunks is None else chunks):
            left: Left = {}
            stream[index] = self.run(stream, index, left)
            self.arguments.put(self._is_dense(stream), index, left)

    def run(self, stream: Activations, index: int, left: Left | None = None) -> torch.Tensor:
        """One chunk of a stream after the sublayer.

        Args:
            stream: one of the two before it.
            left: what the sublayer leaves for later layers is added here.
        """
        return self.runner.run(*self._read(stream, index), left)

    def _read(
        self, stream: Activations, index: int, dtype: torch.dtype | None = None
    ) -> tuple[torch.Tensor, LayerCall]:
        """A chunk of a stream, and how the model calls the layer for it."""
        chunk = stream[index].to(self.runner.device, dtype)
        return chunk, self.arguments.call(chunk, self._is_dense(stream), index)

    def _is_dense(self, stream: Activations) -> bool:
        return stream is self.streams.dense

    def input_and_call(self, index: int) -> tuple[torch.Tensor, LayerCall]:
        """A chunk of the pruned stream, float32 on the device, and how the layer is called for it."""
        return self._read(self.streams.pruned, index, torch.float32)

    def held_out(self) -> Iterator[tuple[torch.Tensor, LayerCall, torch.Tensor]]:
        """Of each held-out chunk the pruned stream before the sublayer, how the layer is called for it, and the dense
        stream after the sublayer, if that one is advanced."""
        for index in self.streams.measured:
            assert self.streams.dense is not None
            stream, call = self._read(self.streams.pruned, index)
            yield stream, call, self.streams.dense[index].to(self.runner.device)

    def _steps(self, chunks: range) -> Iterator[int]:
        return self.monitor.steps(chunks, "calibration passes", len(chunks))

    def _add_chunk(
        self,
        index: int,
        sums: Mapping[str, StatisticsSum],
        alone: frozenset[str],
        dense: Activations | None,
        first: bool,
        joins: bool,
    ) -> list[str]:
        """Add one chunk to the sums. (A method of its own, so that nothing of a chunk outlives it.) Returns the linears
        that the layer used.

        Args:
            index: of the chunk.
            sums: by the first linear of each group.
            alone: the linears that are the only one of their group.
            dense: the dense stream, before the sublayer if this is its first stage, else after it; None: no drift.
            first: whether this is the first stage.
            joins: whether the only linear's output joins the stream: the drift is then that of the stream.
        """
        adds = joins and dense is not None
        after, inputs = self.runner.watch(*self._read(self.streams.pruned, index), list(sums), to_the_end=adds)
        used = list(inputs)
        of_dense: dict[str, torch.Tensor] = {}
        goal: torch.Tensor | None = None
        if dense is not None and first:
            goal, of_dense = self.runner.watch(*self._read(dense, index), list(sums), to_the_end=adds)
        elif dense is not None and adds:
            goal = dense[index].to(self.runner.device)
        with self.monitor.phase("statistics"):
            for name in used:
                total = sums[name]
                X, linear = _tokens(inputs.pop(name)), self.runner.linear(name)
                if joins and self.runner.sublayer.norm is not None:
                    X = X * rms_factors(linear(X.to(linear.weight.dtype)).float())  # as the norm does with the output
                total.add(X)
                if adds:
                    total.add_output_drift(X, self.runner.missing_output(_tokens(goal) - _tokens(after)))
                # Where one linear alone reads a wide input, the drift of its output is the smaller one to keep.
                elif name in of_dense and name in alone and linear.out_features < linear.in_features:
                    total.add_output_drift(X, (_tokens(of_dense.pop(name)) - X) @ linear.weight.float().T)
                elif name in of_dense:
                    total.add_input_drift(X, _tokens(of_dense.pop(name)))
        return used

    def _check_used(self, linears: Sequence[str], used: Collection[str]) -> None:
        for name in linears:
            if name not in used:
                place = self.place(name)
                ending = ".".join(place.split(".")[-len(name.split(".")) :])  # as the files have it
                raise RiaError(
                    f"{place}: not used in this layer, but in others like it. Leave it dense: --ignore {ending}"
                )


def _tokens(stream: torch.Tensor) -> torch.Tensor:
    """[..., channels] -> [tokens, channels] float32."""
    return stream.reshape(-1, stream.shape[-1]).float()
