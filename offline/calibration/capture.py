"""Decoder layers, run one at a time over the calibration activations, and the statistics of what their linears read."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ria_vllm.errors import RiaError
from ria_vllm.offline.model.dtypes import name_of
from ria_vllm.offline.model.embedding import LayerCall, Reached
from ria_vllm.offline.model.topology import Component, Group
from ria_vllm.offline.pruning.drift import Drift, InputDrift, OutputDrift
from ria_vllm.offline.pruning.symmetric import BLOCK, SymmetricMatrix
from ria_vllm.offline.runtime.ranks import Ranks
from ria_vllm.progress import Monitor
from ria_vllm.writer import disk_errors


class Activations:
    """The residual stream between two layers: one tensor [samples, tokens, hidden] a chunk, in memory or in files.

    Args:
        dtype: of the tensors that it gives back; None: as they came.
        kept: what it keeps them in; None: as they came.
    """

    def __init__(
        self, folder: Path | None = None, dtype: torch.dtype | None = None, kept: torch.dtype | None = None
    ):
        self.folder, self.dtype, self.kept = folder, dtype, kept
        self.chunks: list[torch.Tensor | Path] = []
        if folder is not None:
            with disk_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, index: int) -> torch.Tensor:
        chunk = self.chunks[index]
        stream = chunk if isinstance(chunk, torch.Tensor) else load_file(chunk)["stream"]
        return stream.to(self.dtype or stream.dtype)

    def __setitem__(self, index: int, stream: torch.Tensor) -> None:
        self.chunks[index] = self._keep(index, stream)

    def append(self, stream: torch.Tensor) -> None:
        self.chunks.append(self._keep(len(self.chunks), stream))

    def _keep(self, index: int, stream: torch.Tensor) -> torch.Tensor | Path:
        stream = stream.to("cpu", self.kept or stream.dtype).contiguous()
        if self.folder is None:
            return stream
        path = self.folder / f"{index}.safetensors"
        with disk_errors(path):
            path.unlink(missing_ok=True)  # a mapping of the old content may be alive
            save_file({"stream": stream}, path)
        return path


@dataclass
class Statistics:
    """What a group's linears read, over all calibration tokens.

    gram: X^T X [in, in] float32, or None where only norms were asked for; norm: ||X_j|| [in] float32; drift: None where
    the dense model is not followed.
    """

    norm: torch.Tensor
    gram: SymmetricMatrix | None
    drift: Drift | None = None


class _GramSum(SymmetricMatrix):
    """The running X^T X [width, width], float64."""

    def __init__(self, width: int, device: torch.device):
        starts = range(0, width, BLOCK)
        sizes = [(min(BLOCK, width - start), width - start) for start in starts]
        super().__init__([torch.zeros(size, dtype=torch.float64, device=device) for size in sizes])

    def add(self, X: torch.Tensor) -> None:
        for start, stop, block in self.spans():
            block.add_(X[:, start:stop].T @ X[:, start:])

    def finish(self) -> SymmetricMatrix:
        """The matrix in float32; the sums are let go on the way."""
        blocks = []
        while self.blocks:
            blocks.append(self.blocks.pop(0).float())
        return SymmetricMatrix(blocks)


class _Sums:
    """The running sums of one group. Chunk products are float32, their sums float64: see `gather`."""

    def __init__(self, width: int, with_gram: bool, device: torch.device):
        self.width, self.device = width, device
        self.gram = _GramSum(width, device) if with_gram else None
        self.squares = None if with_gram else torch.zeros(width, dtype=torch.float64, device=device)
        # Of the drift: what comes of it depends on its kind.
        self.cross: torch.Tensor | None = None
        self.drift_gram: _GramSum | None = None
        self.drift_square = torch.zeros(1, dtype=torch.float64, device=device)

    def add(self, X: torch.Tensor) -> None:
        if self.gram is not None:
            self.gram.add(X)
        else:
            self.squares.add_(X.square().sum(0))

    def add_drift_of_input(self, X: torch.Tensor, dense: torch.Tensor) -> None:
        drift = dense - X
        if self.drift_gram is None:
            self.drift_gram = _GramSum(self.width, self.device)
        self.drift_gram.add(drift)
        self._add_cross(drift, X)

    def add_drift_of_output(self, X: torch.Tensor, missing: torch.Tensor) -> None:
        self.drift_square.add_(torch.linalg.vector_norm(missing).double() ** 2)
        self._add_cross(missing, X)

    def _add_cross(self, A: torch.Tensor, X: torch.Tensor) -> None:
        if self.cross is None:
            self.cross = torch.zeros(A.shape[1], self.width, dtype=torch.float64, device=self.device)
        for start in range(0, len(self.cross), BLOCK):  # the product is widened while it is added
            self.cross[start : start + BLOCK].add_(A[:, start : start + BLOCK].T @ X)

    def finish(self, group: Group, ranks: Ranks, named: Callable[[str], str], dtype: torch.dtype) -> Statistics:
        grams = [gram for gram in (self.gram, self.drift_gram) if gram is not None]
        for total in (self.squares, self.cross, self.drift_square, *(block for gram in grams for block in gram.blocks)):
            if total is not None:
                ranks.add_(total)
        squares = self.squares if self.gram is None else self.gram.diagonal()
        if not bool(squares.isfinite().all()):  # where one entry of X is not finite, its channel's square is not
            wider = "Check that it works without pruning."
            if dtype != torch.float32:
                wider = f"Give --compute-dtype float32. If that does not help: {wider[0].lower()}{wider[1:]}"
            raise RiaError(
                f"{named(group.linears[0])}: NaN or infinite values in its input activations. The model overflows on "
                f"this text in {name_of(dtype)}. {wider}"
            )
        # These are large: each float64 sum goes before the next float32 one is made.
        drift: Drift | None = None
        if self.cross is not None:
            cross, self.cross = self.cross.float(), None
            if self.drift_gram is not None:
                drift = InputDrift(cross, self.drift_gram.finish())
            else:
                drift = OutputDrift(cross, float(self.drift_square))
        return Statistics(squares.sqrt().float(), None if self.gram is None else self.gram.finish(), drift)


def run_component(layer: nn.Module, component: Component, call: LayerCall, stream: torch.Tensor) -> torch.Tensor:
    """The residual stream after a component, from the one before it."""
    with _silenced(layer, component.silenced, stream):
        if component.ends_before is None:
            return call(layer, stream)
        return _input_of(layer.get_submodule(component.ends_before), lambda: call(layer, stream)).view_as(stream)


def gather(
    layer: nn.Module,
    component: Component,
    stage: Sequence[Group],
    calls: Mapping[torch.Size, LayerCall],
    streams: Activations,
    with_gram: bool,
    ranks: Ranks,
    monitor: Monitor,
    named: Callable[[str], str],
    dense_before: Activations | None = None,
    dense_after: Activations | None = None,
) -> list[Statistics]:
    """The statistics of a stage's groups. A pass ends as soon as the last of them has been reached.

    `calls` go by the shape of the stream. To follow the dense model, give its stream before the component while nothing
    of the component is pruned, or its stream after it for a last linear that adds to the stream, everything else of the
    component pruned.

    Chunk products are float32; their sums are float64, so that the order of the chunks, and with it the number of
    ranks, does not show in the rounded result.

    Raises:
        RiaError: NaN or infinite activations, or a linear that is not called; `named` makes the name for the error of
            the one in the layer.
    """
    device, dtype = _device(layer), next(layer.parameters()).dtype
    names = [group.linears[0] for group in stage]
    # Where one linear alone reads a wide input, the drift of its output is the smaller to keep.
    narrowing = [g.linears[0] for g in stage if len(g.linears) == 1 and _narrows(layer.get_submodule(g.linears[0]))]
    sums = [_Sums(layer.get_submodule(name).in_features, with_gram, device) for name in names]

    def add(chunk: int) -> None:  # a function, so that nothing of a chunk outlives it
        stream = streams[chunk].to(device)
        call = calls[stream.shape]
        after, inputs = _watched(layer, component, call, stream, names, to_the_end=dense_after is not None)
        idle = next((name for name in names if name not in inputs), None)
        if idle is not None:
            what = ".".join(named(idle).split(".")[-len(idle.split(".")) :])
            raise RiaError(
                f"{named(idle)}: not used in this layer, as it is in the first. Leave it dense: --ignore {what}"
            )
        dense: dict[str, torch.Tensor] = {}
        if dense_before is not None:
            _, dense = _watched(layer, component, call, dense_before[chunk].to(device), names)
        with monitor.phase("statistics"):
            for name, total in zip(names, sums, strict=True):
                X = _tokens(inputs.pop(name))
                total.add(X)
                if name in dense and name in narrowing:
                    weight = layer.get_submodule(name).weight.float()
                    total.add_drift_of_output(X, (_tokens(dense.pop(name)) - X) @ weight.T)
                elif name in dense:
                    total.add_drift_of_input(X, _tokens(dense.pop(name)))
                if after is not None:
                    total.add_drift_of_output(X, _tokens(dense_after[chunk].to(device)) - _tokens(after))

    for chunk in monitor.steps(range(len(streams)), "calibration passes", len(streams)):
        add(chunk)
    return [total.finish(group, ranks, named, dtype) for total, group in zip(sums, stage, strict=True)]


def _narrows(linear: nn.Linear) -> bool:
    return linear.out_features < linear.in_features


def advance(
    layer: nn.Module, component: Component, calls: Mapping[torch.Size, LayerCall], streams: Activations, monitor: Monitor
) -> None:
    """Replace the stream before a component by the stream after it."""
    device = _device(layer)
    for chunk in monitor.steps(range(len(streams)), "calibration passes", len(streams)):
        stream = streams[chunk].to(device)
        streams[chunk] = run_component(layer, component, calls[stream.shape], stream)


def _watched(
    layer: nn.Module,
    component: Component,
    call: LayerCall,
    stream: torch.Tensor,
    names: Sequence[str],
    to_the_end: bool = False,
) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
    """What the linears read, and the stream after the component, or None if the pass may end once all were reached."""
    inputs: dict[str, torch.Tensor] = {}

    def watch(name: str) -> Callable:
        def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            inputs[name] = args[0]
            if len(inputs) == len(names) and not to_the_end:
                raise Reached

        return hook

    hooks = [layer.get_submodule(name).register_forward_pre_hook(watch(name)) for name in names]
    try:
        return run_component(layer, component, call, stream), inputs
    except Reached:
        return None, inputs
    finally:
        for hook in hooks:
            hook.remove()


def _tokens(stream: torch.Tensor) -> torch.Tensor:
    """[..., channels] -> [tokens, channels] float32."""
    return stream.reshape(-1, stream.shape[-1]).float()


def _input_of(module: nn.Module, run: Callable[[], Any]) -> torch.Tensor:
    """The first argument that `module` gets while `run` runs; what would follow is left out."""
    found: list[torch.Tensor] = []

    def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        found.append(args[0])
        raise Reached

    handle = module.register_forward_pre_hook(hook)
    try:
        run()
    except Reached:
        if not found:
            raise  # another hook wanted to stop
        return found[0]
    finally:
        handle.remove()
    raise RiaError(f"a decoder layer ran without its {type(module).__name__}: not supported.")


@contextmanager
def _silenced(layer: nn.Module, name: str | None, stream: torch.Tensor) -> Iterator[None]:
    """Let the attention `name` add exactly nothing."""
    if name is None:
        yield
        return
    module = layer.get_submodule(name)
    module.forward = lambda *args, **kwargs: (torch.zeros_like(stream), None)
    try:
        yield
    finally:
        del module.forward


def _device(layer: nn.Module) -> torch.device:
    return next(layer.parameters()).device
