"""One forward pass of the model up to its first decoder layer, and how it calls each of its decoder layers.

`ria_vllm.offline.calibration.embed` runs it on all calibration tokens.
"""

from collections.abc import Callable, Mapping, MutableMapping
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ria_vllm.errors import RiaError
from ria_vllm.offline.model.hf import explained
from ria_vllm.offline.model.streaming import StreamedModel


@dataclass(frozen=True)
class LayerCall:
    """How the model calls a decoder layer for one batch shape: all arguments but the residual stream.

    by_name: the stream is passed as the keyword argument `hidden_states`.
    place: the model's folder and the layer, for errors.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    by_name: bool
    place: str = ""

    def __call__(self, layer: nn.Module, stream: torch.Tensor) -> torch.Tensor:
        kind = type(layer).__name__
        args, kwargs = _own((self.args, self.kwargs))
        with explained(f"{self.place}: transformers cannot run {kind} by itself; another version of it may"):
            if self.by_name:
                out = layer(*args, hidden_states=stream, **kwargs)
            else:
                out = layer(stream, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def same_as(self, other: "LayerCall") -> bool:
        """Whether both calls pass the same arguments, tensors compared by value."""
        return _equal((self.args, self.kwargs), (other.args, other.kwargs))


def first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """What a module reads: the first tensor among the arguments of a call."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), None)


class Reached(BaseException):
    """Stops a forward pass that has reached the point of interest. Not an Exception, so that no handler catches it."""


class _Shell(nn.Module):
    """Stands in for a decoder layer: records how the model calls it, and passes the stream on."""

    def __init__(
        self,
        layer: nn.Module,
        calls: list[LayerCall],
        streams: list[torch.Tensor],
        finish: bool,
        form: Callable,
        place: str,
    ):
        super().__init__()
        self.__dict__["layer"] = layer
        self.calls = calls
        self.streams = streams
        self.finish = finish
        self.form = form
        self.place = place

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["layer"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        by_name = "hidden_states" in kwargs
        stream = kwargs.pop("hidden_states") if by_name else args[0]
        self.streams.append(stream)
        args, kwargs = _own((args if by_name else args[1:], kwargs))
        self.calls.append(LayerCall(args, kwargs, by_name, self.place))
        if self.finish:
            raise Reached
        return self.form(stream)


class Embedder:
    """Runs the model up to its first decoder layer, and records how the model's own forward calls each layer.

    Call `learn_form` before anything else, and `close` at the end.
    """

    def __init__(self, model: StreamedModel):
        self.model = model
        self.base = model.load_base()
        kind = type(model.model).__name__
        self.unusable = f"{model.folder}: transformers cannot run {kind} as config.json describes it"
        self.tupled: int | None = None  # length of the tuple that a layer returns; 0: it returns a bare tensor

    def __call__(self, tokens: torch.Tensor) -> tuple[torch.Tensor, list[LayerCall]]:
        """Embed token ids [samples, tokens].

        Returns:
            (the stream into layer 0 [samples, tokens, hidden], the call of each layer).

        Raises:
            RiaError: the model does not run, does not call its layers one after another, or changes the stream between
                them.
        """
        return self.calls(self.base, self.model.layers, tokens.to(self.model.device))

    def calls(
        self, base: nn.Module, layers: nn.ModuleList, tokens: torch.Tensor
    ) -> tuple[torch.Tensor, list[LayerCall]]:
        """The same for another model of the same class.

        Args:
            base: the model without its head; what is outside its layers is on the device of `tokens`.
            layers: within it. None of them is called.
        """
        calls, streams, own = [], [], list(layers)
        for index, layer in enumerate(own):
            layers[index] = _Shell(layer, calls, streams, layer is own[-1], self._form, self._place(index))
        try:
            with explained(self.unusable):
                base(input_ids=tokens, use_cache=False)
        except Reached:
            pass
        finally:
            for index, layer in enumerate(own):
                layers[index] = layer
        if len(calls) != len(own):
            raise self._uncalled()
        for index, stream in enumerate(streams):
            if stream is not streams[0]:
                raise RiaError(
                    f"{self._place(index)}: {type(self.model.model).__name__} changes the residual stream before this "
                    "layer, so its layers cannot be pruned one by one."
                )
        return streams[0], calls

    def _uncalled(self) -> RiaError:
        return RiaError(
            f"{self.model.folder}: {type(self.model.model).__name__} does not call its decoder layers one after "
            "another, so they cannot be pruned one by one."
        )

    def learn_form(self, tokens: torch.Tensor) -> None:
        """Find out in layer 0 whether layers return a tensor or a tuple; without that, no later layer can be reached.

        Raises:
            RiaError: the model does not run, or does not call layer 0.
        """
        layer = self.model.load_layer(0)
        first: list[LayerCall] = []
        streams: list[torch.Tensor] = []
        self.model.layers[0] = _Shell(layer, first, streams, True, self._form, self._place(0))
        try:
            with explained(self.unusable):
                self.base(input_ids=tokens.to(self.model.device), use_cache=False)
        except Reached:
            pass
        finally:
            self.model.layers[0] = layer
        if not first:
            raise self._uncalled()
        call = first[0]
        kwargs = {**call.kwargs, "hidden_states": streams[0]} if call.by_name else call.kwargs
        with explained(self.unusable):
            out = layer(*(call.args if call.by_name else (streams[0], *call.args)), **kwargs)
        self.tupled = len(out) if isinstance(out, tuple) else 0
        self.model.free_layer(0)

    def _place(self, index: int) -> str:
        return f"{self.model.folder}: {self.model.layer_prefix(index).removesuffix('.')}"

    def _form(self, stream: torch.Tensor) -> Any:
        return (stream, *[None] * (self.tupled - 1)) if self.tupled else stream

    def close(self) -> None:
        """Free the weights outside the layers."""
        self.model.free_base()


def _own(value: Any) -> Any:
    """The same with mappings of its own: what a layer puts into them for later layers depends on the text."""
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        return type(value)(map(_own, value))
    if isinstance(value, MutableMapping):
        own = copy(value)
        own.update({key: _own(item) for key, item in value.items()})
        return own
    return value


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    return True
