"""The pruned model in training: its kept weights, and the tensors that are written when it is finished."""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ria_vllm.errors import RiaError
from ria_vllm.formats import IntFormat
from ria_vllm.hf_inputs import round_inputs
from ria_vllm.offline.distill.divergence import Top, divergence
from ria_vllm.offline.distill.foreign import ForeignStart
from ria_vllm.offline.distill.layouts import Kept, Whole
from ria_vllm.offline.distill.logits import TwoPart
from ria_vllm.offline.distill.loss import Loss, in_chunks, next_token, relative_error
from ria_vllm.offline.distill.parameters import AdamW, Pace, TrainedExpert, TrainedParameter, step_in_backward
from ria_vllm.offline.distill.places import places_of, routers
from ria_vllm.offline.distill.rounding import StraightThrough, scaled
from ria_vllm.offline.distill.sharding import gathered, local, rows_here, shard
from ria_vllm.offline.distill.start import Start
from ria_vllm.offline.distill.teacher import CHUNK, Answer, Teacher, captured
from ria_vllm.offline.model.names import Names
from ria_vllm.placement import Placement
from ria_vllm.sparse_linear import SparseLinear

# The learning rate of the logarithms of scales, in that of weights, which are some hundredths large.
SCALES_SPEED = 10.0


class Student:
    """A model whose kept weights are trained.

    Args:
        start: the folder that training starts from.
        model: loaded from it; its parameters' data is trained in place.
        also: of `recipe.ALSO`, what is trained besides pruned linears.
        save_memory: keep only the input of each decoder layer in the forward pass, and compute the rest again.
        rows_on: the device of this process's rows, if the model is to be divided among processes.

    Attributes:
        trained: written name of a linear, or of another tensor -> what is trained.

    Raises:
        RiaError: see `places_of`.
    """

    def __init__(
        self,
        start: Start | ForeignStart,
        model: TwoPart,
        adamw: AdamW,
        pace: Pace,
        also: Iterable[str] = (),
        save_memory: bool = True,
        rows_on: torch.device | None = None,
    ):
        self.two = model
        model.model.requires_grad_(False)
        self.trained: dict[str, TrainedParameter] = {}
        # What is stored beside what is trained and where that lies; the files may be others when training ends.
        self._linears: dict[str, SparseLinear] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        names = Names(model.model, start.dense_names(), start.folder)
        places = places_of(model.model, start, names)
        for inside, placement in places.items():
            for name, weight in placement.split(model.model.get_parameter(inside).detach()):
                linear = start.linear(name)
                _check_same(linear, weight, start)
                self._linears[name] = replace(linear, parts={})
        if isinstance(start, ForeignStart) and start.schema.input_dtype is not None:
            # As `load_model` does for a folder of ours.
            round_inputs(model.model, places, start.folder, start.schema.input_dtype)
        if rows_on is not None:
            shard(model, rows_on)
        for inside, placement in places.items():
            parameter = model.model.get_parameter(inside)
            parts = _trained_linears(start, placement, parameter, adamw, pace, "scales" in also)
            step_in_backward(parameter, list(parts.values()))
            self.trained |= parts
        for name, parameter in _others(model, also, routers(model.model, places)):
            written = names.direct.get(name)
            if written in start.others:
                # From the file: the model may hold them rounded to the dtype that it computes in.
                stored = start.others[written]
                values = stored[rows_here(parameter)].to(local(parameter).device, torch.float32).clone()
                self._dtypes[written] = stored.dtype
                self.trained[written] = TrainedParameter(parameter, Whole(values.shape), values, adamw, pace)
                step_in_backward(parameter, [self.trained[written]])
        if save_memory:
            for layer in model.layers:
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)

    def loss(self, tokens: torch.Tensor, answer: Answer, teacher: Any, loss: Loss) -> tuple[torch.Tensor, ...]:
        """The loss of some windows, summed over their tokens, and its terms.

        Args:
            tokens: int64 [windows, tokens].
            answer: the teacher's, of these windows.
            teacher: a `Teacher`, if its logits are to be computed from its hidden states.

        Returns:
            The weighted sum of the terms, with a gradient; each term without its weight: kl, hidden, text. All are sums
            over tokens.
        """
        with captured(self.two.layers if loss.hidden else []) as layers:
            hidden = self.two.hidden(tokens).flatten(0, 1)
        following = torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], -1)], dim=1).flatten()
        terms = torch.zeros(3, dtype=torch.float64)

        def compared(part: torch.Tensor, rows: slice) -> torch.Tensor:
            logits = self.two.logits(part)
            if loss.kl and loss.text:
                logits = logits.float()  # so that two gradients are added up in float32
            value = torch.zeros((), device=logits.device)
            if loss.kl:
                kl = divergence(_of_teacher(answer, teacher, rows, loss), logits, loss.temperature).sum()
                terms[0] += float(kl.detach())
                value = value + loss.kl * kl
            if loss.text:
                text = next_token(logits, following[rows]).sum()
                terms[2] += float(text.detach())
                value = value + loss.text * text
            return value

        total = in_chunks(compared, hidden, CHUNK) if loss.kl or loss.text else hidden.new_zeros(())
        if loss.hidden:
            error = relative_error(layers, answer.layers) * tokens.numel()
            terms[1] = float(error.detach())
            total = total + loss.hidden * error
        return total, terms

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """What is stored of one of `trained`, as it is now, on the CPU: all tensors of a linear, or one.

        If the model is divided among processes, all of them must call.
        """
        trained = self.trained[name]
        values = gathered(trained.rounded(), trained.parameter).cpu()
        if name in self._dtypes:
            return {name: values.to(self._dtypes[name])}
        linear, layout, scales = self._linears[name], trained.layout, None
        assert isinstance(layout, Kept)
        if isinstance(trained.rounding, StraightThrough):
            scales = gathered(trained.rounding.scales, trained.parameter).cpu()
        bitmask = gathered(layout.bitmask, trained.parameter).cpu()
        return replace(linear, parts=linear.format.encode_kept(values.to(linear.dtype), bitmask, scales)).tensors()


def _check_same(linear: SparseLinear, weight: torch.Tensor, start: Start | ForeignStart) -> None:
    """Check that transformers has loaded this linear into this weight, and changed nothing."""
    if weight.shape != linear.shape or not torch.equal(weight.cpu(), linear.dense().to(weight.dtype)):
        raise RiaError(
            f"{start.folder}: {linear.name}: transformers' model holds another weight than the folder. Please report "
            "this bug in ria-vllm."
        )


def _trained_linears(
    start: Start | ForeignStart,
    placement: Placement,
    parameter: nn.Parameter,
    adamw: AdamW,
    pace: Pace,
    train_scales: bool,
) -> dict[str, TrainedParameter]:
    """Name -> what is trained, for the linears in one parameter."""
    kind = TrainedExpert if placement.stacked else TrainedParameter
    rows = slice(None) if placement.stacked else rows_here(parameter)
    found: dict[str, TrainedParameter] = {}
    for expert, names in enumerate(placement.experts):
        for number, name in enumerate(names):
            linear, device = start.linear(name), local(parameter).device
            parts = {part: tensor[rows].to(device) for part, tensor in linear.parts.items()}
            values, scales = linear.format.values(parts, torch.float32), parts.get("weight_scale")
            place = partial(placement.part, expert=expert, number=number)
            layout = Kept(parts["bitmask"], linear.input_permutation, place)
            trained = _trained_scales(kind, scales, adamw, pace) if scales is not None and train_scales else None
            rounding = None
            if scales is not None:
                read = scales if trained is None else trained.parameter.data
                rounding = StraightThrough(linear.format, read, linear.dtype, _smallest(linear))
            found[name] = kind(parameter, layout, values, adamw, pace, rounding, trained)
    return found


def _smallest(linear: SparseLinear) -> int | None:
    """-128 for integers that hold it already; None: the smallest value is that of the format."""
    form = linear.format
    if isinstance(form, IntFormat) and int(form.integers(linear.parts).min()) < form.smallest:
        return form.lowest
    return None


def _trained_scales(kind: type[TrainedParameter], scales: torch.Tensor, adamw: AdamW, pace: Pace) -> TrainedParameter:
    first = scales.float()
    adamw = replace(adamw, speed=SCALES_SPEED, weight_decay=0.0)
    read = nn.Parameter(scales.clone(), requires_grad=False)
    return kind(read, Whole(scales.shape), torch.zeros_like(first), adamw, pace, partial(scaled, first))


def _others(model: TwoPart, also: Iterable[str], left: Iterable[str]) -> list[tuple[str, nn.Parameter]]:
    """The norms' parameters and the biases of the text decoder, as far as they are asked for.

    Nothing of the head, which is called outside of the backward pass, or of other towers, which no text goes through,
    or of the modules `left` as they are.
    """
    found, head = [], model.model.get_output_embeddings()
    for path, module in model.model.named_modules():
        if module is head or (model.decoder and not f"{path}.".startswith(f"{model.decoder}.")):
            continue
        if any(f"{path}.".startswith(f"{one}.") for one in left):
            continue
        own = dict(module.named_parameters(recurse=False))
        is_norm = bool(own) and not isinstance(module, nn.Linear) and "norm" in type(module).__name__.lower()
        for name, parameter in own.items():
            kind = "norms" if is_norm else "biases" if name == "bias" else None
            if kind in also and parameter.dim() == 1:
                found.append((f"{path}.{name}", parameter))
    return found


def _of_teacher(answer: Answer, teacher: Teacher | None, rows: slice, loss: Loss) -> Any:
    if answer.top is not None:
        return answer.top[rows]
    assert teacher is not None and answer.hidden is not None
    with torch.no_grad():
        logits = teacher.model.logits(answer.hidden[rows])
        return Top.of(logits, loss.top_k, loss.temperature) if loss.top_k else logits
