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

    gram: X^T X [in, in] float32, or None where only norms were asked for; norm: ||X_j|| [in] float32.
    """

    norm: torch.Tensor
    gram: torch.Tensor | None


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
) -> list[Statistics]:
    """The statistics of a stage's groups. Every pass ends as soon as the last of them has been reached.

    `calls` go by the shape of the stream.

    Chunk products are float32; their sums are float64, so that the order of the chunks, and with it the number of
    ranks, does not show in the rounded result.

    Raises:
        RiaError: NaN or infinite activations, naming the linear (`where` is the layer's name).
    """
    device = _device(layer)
    widths = [layer.get_submodule(group.linears[0]).in_features for group in stage]
    shapes = [(width, width) if with_gram else (width,) for width in widths]
    sums = [torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes]
    pending: set[int] = set()

    def listen(index: int) -> Callable:
        def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            with monitor.phase("statistics"):
                _add(sums[index], args[0].reshape(-1, args[0].shape[-1]).float())
            pending.discard(index)
            if not pending:
                raise Reached

        return hook

    hooks = [layer.get_submodule(g.linears[0]).register_forward_pre_hook(listen(i)) for i, g in enumerate(stage)]
    try:
        for chunk in monitor.steps(range(len(streams)), "calibration passes", len(streams)):
            pending.update(range(len(stage)))
            try:
                stream = streams[chunk].to(device)
                run_component(layer, component, calls[stream.shape], stream)
            except Reached:
                pass
    finally:
        for hook in hooks:
            hook.remove()
    return [_finish(sums.pop(0), group, ranks, where) for group in stage]


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


def _finish(total: torch.Tensor, group: Group, ranks: Ranks, where: str) -> Statistics:
    ranks.add_(total)
    squares = total.diagonal() if total.dim() == 2 else total
    if not bool(squares.isfinite().all()):  # where one entry of X is not finite, its channel's square is not
        raise RiaError(
            f"{where}{group.linears[0]}: NaN or infinite values in its input activations. The model overflows on this "
            "text in its own dtype; check that it works without pruning."
        )
    return Statistics(squares.sqrt().float(), _mirrored(total) if total.dim() == 2 else None)


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
            raise  # a hook further up wanted to stop
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
