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
from ria_vllm.offline.drift import Drift, InputDrift, OutputDrift
from ria_vllm.offline.embedding import LayerCall, Reached
from ria_vllm.offline.progress import Monitor
from ria_vllm.offline.ranks import Ranks
from ria_vllm.offline.topology import Component, Group

# Rows of a Gram matrix that are computed at a time.
GRAM_BLOCK = 256


class Activations:
    """The residual stream between two layers: one tensor [samples, tokens, hidden] a chunk, in memory or in files."""

    def __init__(self, folder: Path | None = None):
        self.folder = folder
        self.chunks: list[torch.Tensor | Path] = []
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, index: int) -> torch.Tensor:
        chunk = self.chunks[index]
        return chunk if isinstance(chunk, torch.Tensor) else load_file(chunk)["stream"]

    def __setitem__(self, index: int, stream: torch.Tensor) -> None:
        self.chunks[index] = self._keep(index, stream)

    def append(self, stream: torch.Tensor) -> None:
        self.chunks.append(self._keep(len(self.chunks), stream))

    def _keep(self, index: int, stream: torch.Tensor) -> torch.Tensor | Path:
        stream = stream.cpu().contiguous()
        if self.folder is None:
            return stream
        path = self.folder / f"{index}.safetensors"
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
    gram: torch.Tensor | None
    drift: Drift | None = None


class _Sums:
    """The running sums of one group. Chunk products are float32, their sums float64: see `gather`."""

    def __init__(self, width: int, with_gram: bool, device: torch.device):
        self.new = lambda *shape: torch.zeros(shape, dtype=torch.float64, device=device)
        self.own = self.new(width, width) if with_gram else self.new(width)
        self.cross: torch.Tensor | None = None  # of the drift, made when it is first met
        self.square: torch.Tensor | None = None

    def add(self, X: torch.Tensor) -> None:
        _add(self.own, X)

    def add_drift_of_input(self, X: torch.Tensor, dense: torch.Tensor) -> None:
        if self.cross is None:
            self.cross, self.square = self.new(*self.own.shape), self.new(*self.own.shape)
        drift = dense - X
        self.cross.add_(drift.T @ X)
        _add(self.square, drift)

    def add_drift_of_output(self, X: torch.Tensor, missing: torch.Tensor) -> None:
        if self.cross is None:
            self.cross, self.square = self.new(missing.shape[1], X.shape[1]), self.new(1)
        self.cross.add_(missing.T @ X)
        self.square.add_(missing.square().sum())

    def finish(self, group: Group, ranks: Ranks, where: str) -> Statistics:
        for total in (self.own, self.cross, self.square):
            if total is not None:
                ranks.add_(total)
        squares = self.own.diagonal() if self.own.dim() == 2 else self.own
        if not bool(squares.isfinite().all()):  # where one entry of X is not finite, its channel's square is not
            raise RiaError(
                f"{where}{group.linears[0]}: NaN or infinite values in its input activations. The model overflows on "
                "this text in its own dtype; check that it works without pruning."
            )
        norm, gram = squares.sqrt().float(), _mirrored(self.own) if self.own.dim() == 2 else None
        self.own = None  # before more is made; these are large
        drift: Drift | None = None
        if self.cross is not None:
            cross, self.cross = self.cross.float(), None
            of_input = self.square.dim() == 2
            drift = InputDrift(cross, _mirrored(self.square)) if of_input else OutputDrift(cross, float(self.square))
            self.square = None
        return Statistics(norm, gram, drift)


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
    where: str,
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
        RiaError: NaN or infinite activations, naming the linear (`where` is the layer's name).
    """
    device = _device(layer)
    names = [group.linears[0] for group in stage]
    sums = [_Sums(layer.get_submodule(name).in_features, with_gram, device) for name in names]
    for chunk in monitor.steps(range(len(streams)), "calibration passes", len(streams)):
        stream = streams[chunk].to(device)
        call = calls[stream.shape]
        after, inputs = _watched(layer, component, call, stream, names, to_the_end=dense_after is not None)
        if dense_before is not None:
            _, dense = _watched(layer, component, call, dense_before[chunk].to(device), names)
        with monitor.phase("statistics"):
            for name, total in zip(names, sums, strict=True):
                X = _tokens(inputs[name])
                total.add(X)
                if dense_before is not None:
                    total.add_drift_of_input(X, _tokens(dense[name]))
                if after is not None:
                    total.add_drift_of_output(X, _tokens(dense_after[chunk].to(device)) - _tokens(after))
    return [total.finish(group, ranks, where) for total, group in zip(sums, stage, strict=True)]


def advance(
    layer: nn.Module, component: Component, calls: Mapping[torch.Size, LayerCall], streams: Activations, monitor: Monitor
) -> None:
    """Replace the stream before a component by the stream after it."""
    device = _device(layer)
    for chunk in monitor.steps(range(len(streams)), "calibration passes", len(streams)):
        stream = streams[chunk].to(device)
        streams[chunk] = run_component(layer, component, calls[stream.shape], stream)


def _add(total: torch.Tensor, X: torch.Tensor) -> None:
    """Add X^T X, or its diagonal, to a float64 sum. Of the symmetric matrix only blocks on and above the diagonal."""
    if total.dim() == 1:
        total.add_(X.square().sum(0))
        return
    for start in range(0, len(total), GRAM_BLOCK):
        total[start : start + GRAM_BLOCK, start:].add_(X[:, start : start + GRAM_BLOCK].T @ X[:, start:])


def _mirrored(total: torch.Tensor) -> torch.Tensor:
    """float32, with the blocks below the diagonal filled in."""
    gram = total.float()
    for start in range(0, len(gram), GRAM_BLOCK):
        stop = start + GRAM_BLOCK
        gram[stop:, start:stop] = gram[start:stop, stop:].T
    return gram


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
