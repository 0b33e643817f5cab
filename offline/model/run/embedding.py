"""One forward pass of the model up to its first decoder layer, and how it calls each of its decoder layers.

`ria_vllm.offline.calibration.embed` runs it on all calibration tokens.
"""

from collections.abc import Callable, Iterable, MutableMapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ria_vllm.errors import RiaError
from ria_vllm.format.weight_format import name_of
from ria_vllm.offline.model.run.hf import explained
from ria_vllm.offline.model.run.layer_call import LayerCall, Reached, Slot, replaced_forwards
from ria_vllm.offline.model.run.streaming import StreamedModel


class _Forward:
    """One forward pass in which layers compute nothing, but record how they are called, and pass the stream on.

    called: the layers; calls: how the model calls them; streams: into them; returned: behind them.

    Args:
        form: stream -> what the model takes for a layer's output.
        place: a layer's number -> what an error about it begins with.
        disturb: changes the stream behind each layer; None: it is passed on.
        last: the pass stops at so many calls; 0: it does not.
    """

    def __init__(
        self,
        form: Callable,
        place: Callable[[int], str],
        disturb: Callable[[torch.Tensor], torch.Tensor] | None = None,
        last: int = 0,
    ):
        self.form, self.place, self.disturb, self.last = form, place, disturb, last
        self.called: list[nn.Module] = []
        self.calls: list[LayerCall] = []
        self.streams: list[torch.Tensor] = []
        self.returned: list[torch.Tensor] = []
        self._mappings: list[MutableMapping] = []

    def __call__(self, layer: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        """In the place of a layer's own forward."""
        by_name = "hidden_states" in kwargs
        stream = kwargs.pop("hidden_states") if by_name else args[0]
        args = args if by_name else args[1:]
        given: Iterable[tuple[int | str, Any]] = (*enumerate(args), *kwargs.items())
        mappings = {slot: self._number(value) for slot, value in given if isinstance(value, MutableMapping)}
        call = LayerCall(args, kwargs, by_name, self.place(len(self.calls)), mappings=mappings)
        self.called.append(layer)
        self.streams.append(stream)
        self.calls.append(call.mapped(lambda tensor: tensor))  # what is in mappings now, whatever comes into them later
        if len(self.calls) == self.last:
            raise Reached
        self.returned.append(stream if self.disturb is None else self.disturb(stream))
        return self.form(self.returned[-1])

    def _number(self, mapping: MutableMapping) -> int:
        """The same for the same mapping."""
        known = [number for number, other in enumerate(self._mappings) if other is mapping]
        if not known:
            self._mappings.append(mapping)
        return known[0] if known else len(self._mappings) - 1


class Embedder:
    """Runs the model up to its first decoder layer, and records how the model's own forward calls each layer.

    Call `learn_form` and `learn_varying` before anything else, and `close` at the end.
    """

    varying: frozenset[Slot] = frozenset()  # the arguments of layers that depend on the text
    beside: tuple[Any, ...] = ()  # what layer 0 returns besides the stream, until `learn_varying` has read it

    def __init__(self, model: StreamedModel):
        self.model = model
        self.base = model.load_base()
        kind = type(model.model).__name__
        self.unusable = f"{model.folder}: transformers cannot run {kind} as config.json describes it"
        if model.dtype != torch.float32:  # some models do not run beside what transformers keeps in float32
            self.unusable += f", at least in {name_of(model.dtype)}: try --compute-dtype float32"
        self.tupled: int | None = None  # length of the tuple that a layer returns; 0: it returns a bare tensor

    def __call__(self, tokens: torch.Tensor) -> tuple[torch.Tensor, list[LayerCall]]:
        """Embed token ids [samples, tokens].

        Returns:
            (the stream into layer 0 [samples, tokens, hidden], the call of each layer).

        Raises:
            RiaError: the model does not run, does not call its layers one after another, or changes the stream between
                them.
        """
        passed = self._passed(tokens, self._form)
        calls = [replace(call, varying=self.varying.intersection(call.slots())) for call in passed.calls]
        return passed.streams[0], calls

    def logits(self, tokens: torch.Tensor, stream: torch.Tensor) -> torch.Tensor:
        """What the model predicts after these tokens if its last layer returns a given stream.

        Args:
            tokens: [samples, tokens]; stream: [samples, tokens, hidden].

        Returns:
            [samples, tokens, vocabulary].

        Raises:
            RiaError: the model does not run.
        """
        passed = _Forward(self._form, self._place, lambda _: stream)
        return self._run(passed, tokens, self.model.model).logits

    def _run(self, passed: _Forward, tokens: torch.Tensor, module: nn.Module | None = None) -> Any:
        """Run a module (None: the model without its head) whose layers only pass the stream on.

        Returns:
            Its output; None if the pass stopped before.
        """
        unusable = self.unusable if module is None else "the model's head does not run by itself"
        try:
            with replaced_forwards({layer: partial(passed, layer) for layer in self.model.layers}), explained(unusable):
                return (module or self.base)(input_ids=tokens.to(self.model.device), use_cache=False)
        except Reached:
            return None

    def _passed(
        self, tokens: torch.Tensor, form: Callable, disturb: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> _Forward:
        """A pass up to the last layer; for the arguments see `_Forward`."""
        own = list(self.model.layers)
        passed = _Forward(form, self._place, disturb, len(own))
        self._run(passed, tokens)
        if list(map(id, passed.called)) != list(map(id, own)):
            raise self._uncalled()
        for index, (stream, before) in enumerate(zip(passed.streams[1:], passed.returned, strict=True), 1):
            if stream is not before:
                raise RiaError(
                    f"{self._place(index)}: {type(self.model.model).__name__} changes the residual stream before this "
                    "layer, so its layers cannot be pruned one by one."
                )
        return passed

    def learn_varying(self, tokens: torch.Tensor, others: torch.Tensor) -> None:
        """Find out which arguments of layers depend on the text, such as Gemma's per-layer inputs.

        Args:
            tokens, others: two texts of the same shape.

        Raises:
            RiaError: one that is not a tensor, or that depends on what earlier layers compute.
        """
        calls, expected = self(tokens)[1], self(others)[1]
        varying = {slot for call, other in zip(calls, expected, strict=True) for slot in call.differences(other)}
        for index, (call, other) in enumerate(zip(calls, expected, strict=True)):
            for slot in varying.intersection([*call.slots(), *other.slots()]):
                both: list[Any] = [one.slots().count(slot) and one[slot] for one in (call, other)]
                if not all(isinstance(value, torch.Tensor) for value in both) or both[0].shape != both[1].shape:
                    raise RiaError(
                        f"{self._place(index)}: {type(self.model.model).__name__} passes its layers {_argument(slot)} "
                        "that differs between texts and is no tensor of one shape, so they cannot be pruned one by one."
                    )
        draw = torch.Generator().manual_seed(0)

        def disturb(before: torch.Tensor) -> torch.Tensor:
            noise = torch.rand(before.shape, generator=draw).to(before.device, before.dtype)
            return before * (1 + noise)

        for index, (call, other) in enumerate(zip(self._disturbed(others, disturb).calls, expected, strict=True)):
            if slots := call.differences(other):
                raise RiaError(
                    f"{self._place(index)}: {type(self.model.model).__name__} makes {_argument(slots[0])} of this "
                    "layer from what earlier layers compute, so its layers cannot be pruned one by one. Such a model "
                    "cannot be compressed."
                )
        self.varying, self.beside = frozenset(varying), ()

    def _disturbed(self, tokens: torch.Tensor, disturb: Callable[[torch.Tensor], torch.Tensor]) -> _Forward:
        """A pass in which layers change the stream, and return what layer 0 does besides it, or a tensor."""

        def form(stream: torch.Tensor) -> Any:
            return (stream, *(stream if value is None else value for value in self.beside)) if self.tupled else stream

        try:
            return self._passed(tokens, form, disturb)
        except RiaError as error:
            raise RiaError(
                f"{self.model.folder}: {type(self.model.model).__name__} does not run on what its layers return with "
                f"other numbers in it, so nothing shows whether they can be pruned one by one: {error}"
            ) from error

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
        layer, passed = self.model.load_layer(0), _Forward(self._form, self._place, last=1)
        self._run(passed, tokens)
        if passed.called[:1] != [layer]:
            raise self._uncalled()
        call, stream = passed.calls[0], passed.streams[0]
        kwargs = {**call.kwargs, "hidden_states": stream} if call.by_name else call.kwargs
        with explained(self.unusable):
            out = layer(*(call.args if call.by_name else (stream, *call.args)), **kwargs)
        self.tupled = len(out) if isinstance(out, tuple) else 0
        self.beside = out[1:] if isinstance(out, tuple) else ()
        self.model.free_layer(0)

    def _place(self, index: int) -> str:
        return f"{self.model.folder}: {self.model.layer_prefix(index).removesuffix('.')}"

    def _form(self, stream: torch.Tensor) -> Any:
        return (stream, *[None] * (self.tupled - 1)) if self.tupled else stream

    def close(self) -> None:
        """Free the weights outside the layers."""
        self.model.free_base()


def _argument(slot: Slot) -> str:
    return f"its argument {slot}" if isinstance(slot, str) else f"its argument number {slot + 1}"
