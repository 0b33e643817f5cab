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
from ria_vllm.offline.progress import Monitor
from ria_vllm.offline.ranks import Ranks
from ria_vllm.offline.streaming import StreamedModel
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


@dataclass(frozen=True)
class LayerCall:
    """How the model calls a decoder layer for one batch shape: everything but the residual stream."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    by_name: bool

    def __call__(self, layer: nn.Module, stream: torch.Tensor) -> torch.Tensor:
        if self.by_name:
            out = layer(*self.args, hidden_states=stream, **self.kwargs)
        else:
            out = layer(stream, *self.args, **self.kwargs)
        return out[0] if isinstance(out, tuple) else out

    def same_as(self, other: "LayerCall") -> bool:
        return _equal((self.args, self.kwargs), (other.args, other.kwargs))


class _Reached(Exception):
    """Stops a forward pass once it has shown what it was run for."""


class _Shell(nn.Module):
    """Stands in for a decoder layer: notes how the model calls it and passes the stream on."""

    def __init__(self, layer: nn.Module, calls: list[LayerCall], streams: list[torch.Tensor], finish: bool, form: Callable):
        super().__init__()
        self.__dict__["layer"] = layer
        self.calls = calls
        self.streams = streams
        self.finish = finish
        self.form = form

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["layer"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        by_name = "hidden_states" in kwargs
        stream = kwargs.pop("hidden_states") if by_name else args[0]
        self.streams.append(stream)
        self.calls.append(LayerCall(args if by_name else args[1:], kwargs, by_name))
        if self.finish:
            raise _Reached
        return self.form(stream)


class Embedder:
    """The model up to its first decoder layer. It learns how each layer is to be called from the model's own forward."""

    def __init__(self, model: StreamedModel):
        self.model = model
        self.base = model.load_base()
        self.tupled: int | None = None  # entries of the tuple that a layer returns, 0 for a bare tensor

    def __call__(self, tokens: torch.Tensor) -> tuple[torch.Tensor, list[LayerCall]]:
        """Token ids [samples, tokens] -> the stream into layer 0 [samples, tokens, hidden], and the call of every layer."""
        model, calls, streams = self.model, [], []
        layers = list(model.layers)
        shells = [_Shell(layer, calls, streams, layer is layers[-1], self._form) for layer in layers]
        for index, shell in enumerate(shells):
            model.layers[index] = shell
        try:
            self.base(input_ids=tokens.to(model.device), use_cache=False)
        except _Reached:
            pass
        finally:
            for index, layer in enumerate(layers):
                model.layers[index] = layer
        if len(calls) != len(layers):
            raise RiaError(f"{type(model.model).__name__} does not call its decoder layers one after another: not supported.")
        return streams[0], calls

    def inputs_of_first_layer(self, tokens: torch.Tensor) -> list[tuple[str, int]]:
        """(linear, identity of the tensor it read) for a forward pass of layer 0, in the order of the calls.

        Also finds out whether layers return a tensor or a tuple, without which no later layer can be reached.
        """
        layer = self.model.load_layer(0)
        seen: list[tuple[str, torch.Tensor]] = []
        first: list[LayerCall] = []
        streams: list[torch.Tensor] = []
        self.model.layers[0] = _Shell(layer, first, streams, True, self._form)
        try:
            self.base(input_ids=tokens.to(self.model.device), use_cache=False)
        except _Reached:
            pass
        finally:
            self.model.layers[0] = layer
        hooks = [
            module.register_forward_pre_hook(lambda _, args, name=name: seen.append((name, args[0])))
            for name, module in layer.named_modules()
            if isinstance(module, nn.Linear)
        ]
        call = first[0]
        kwargs = {**call.kwargs, "hidden_states": streams[0]} if call.by_name else call.kwargs
        out = layer(*(call.args if call.by_name else (streams[0], *call.args)), **kwargs)
        for hook in hooks:
            hook.remove()
        self.tupled = len(out) if isinstance(out, tuple) else 0
        self.model.free_layer(0)
        return [(name, id(tensor)) for name, tensor in seen]  # `seen` keeps the tensors alive, so identities are unique

    def _form(self, stream: torch.Tensor) -> Any:
        return (stream, *[None] * (self.tupled - 1)) if self.tupled else stream

    def close(self) -> None:
        self.model.free_base()


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
    """The statistics of a stage's groups; `calls` by the shape of the stream. Every pass ends as soon as the last of them has been reached.

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
                raise _Reached

        return hook

    hooks = [layer.get_submodule(g.linears[0]).register_forward_pre_hook(listen(i)) for i, g in enumerate(stage)]
    try:
        for chunk in monitor.steps(range(len(streams)), "calibration passes", len(streams)):
            pending.update(range(len(stage)))
            try:
                stream = streams[chunk].to(device)
                run_component(layer, component, calls[stream.shape], stream)
            except _Reached:
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
        raise _Reached

    handle = module.register_forward_pre_hook(hook)
    try:
        run()
    except _Reached:
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


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    return True
