"""The pruned model in training: its kept weights, and the tensors that are written when it is finished."""

from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from ria_vllm.checkpoint.placement import Placement
from ria_vllm.checkpoint.reader import Reader
from ria_vllm.checkpoint.sparse_linear import SparseLinear
from ria_vllm.errors import RiaError
from ria_vllm.format.formats import RoundedFormat
from ria_vllm.offline.distill.student.layouts import Kept, Whole
from ria_vllm.offline.distill.student.parameters import AdamW, Pace, TrainedExpert, TrainedParameter, step_in_backward
from ria_vllm.offline.distill.student.places import places_of
from ria_vllm.offline.distill.student.rounding import StraightThrough, scaled
from ria_vllm.offline.distill.teacher.divergence import divergence, in_chunks
from ria_vllm.offline.distill.teacher.two_part import CHUNK, TwoPart
from ria_vllm.offline.model.run.names import Names

# The learning rate of the logarithms of scales, in that of weights, which are some hundredths large.
SCALES_SPEED = 10.0
TERMS = ("kl", "text")  # of the loss


class Student:
    """A model whose kept weights, and the scales of quantized ones, are trained.

    Args:
        reader: of the folder that training starts from.
        model: loaded from it; its parameters' data is trained in place.
        save_memory: keep only the input of each decoder layer in the forward pass, and compute the rest again.

    Attributes:
        trained: name of a linear -> what is trained.

    Raises:
        RiaError: see `places_of`.
    """

    def __init__(
        self,
        reader: Reader,
        model: TwoPart,
        adamw: AdamW,
        pace: Pace,
        save_memory: bool = True,
    ):
        self.two, self.pace = model, pace
        model.model.requires_grad_(False)
        self.trained: dict[str, TrainedParameter] = {}
        # What is stored beside what is trained; the files may be others when training ends.
        self._linears: dict[str, SparseLinear] = {}
        places = places_of(model.model, reader, Names(model.model, reader.dense_tensors(), reader.folder))
        for inside, placement in places.items():
            for name, weight in placement.split(model.model.get_parameter(inside).detach()):
                linear = reader.linear(name)
                _check_same(linear, weight, reader)
                self._linears[name] = replace(linear, parts={})
        for inside, placement in places.items():
            parameter = model.model.get_parameter(inside)
            parts = _trained_linears(reader, placement, parameter, adamw, pace)
            step_in_backward(parameter, list(parts.values()))
            self.trained |= parts
        if save_memory:
            for layer in model.layers:
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)

    def loss(
        self, tokens: torch.Tensor, of_teacher: torch.Tensor, teacher: TwoPart, text_loss: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of some windows, summed over their tokens, and its terms.

        Args:
            tokens: int64 [windows, tokens].
            of_teacher: [tokens of all windows, hidden], what the teacher's head reads.
            text_loss: the weight of the cross entropy of the text's next tokens beside the divergence from the teacher.

        Returns:
            The weighted sum of the terms, with a gradient; float64 [2]: each of TERMS without its weight. All are sums
            over tokens.
        """
        hidden = self.two.hidden(tokens).flatten(0, 1)
        following = torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], -1)], dim=1).flatten()
        terms = torch.zeros(len(TERMS), dtype=torch.float64)

        def compared(part: torch.Tensor, rows: slice) -> torch.Tensor:
            logits = self.two.logits(part)
            if text_loss:
                logits = logits.float()  # so that two gradients are added up in float32
            with torch.no_grad():
                wanted = teacher.logits(of_teacher[rows])
            kl = divergence(wanted, logits).sum()
            terms[0] += float(kl.detach())
            if not text_loss:
                return kl
            text = F.cross_entropy(logits, following[rows], ignore_index=-1, reduction="none").sum()
            terms[1] += float(text.detach())
            return kl + text_loss * text

        return in_chunks(compared, hidden, CHUNK), terms

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """All that is stored of a linear, as it is now, on the CPU."""
        trained, linear = self.trained[name], self._linears[name]
        values, bitmask = trained.rounded().cpu(), trained.layout.bitmask.cpu()
        scales = None if trained.rounding is None else trained.rounding.scales.cpu()
        return replace(linear, parts=linear.format.encode_kept(values.to(linear.dtype), bitmask, scales)).tensors()


def _check_same(linear: SparseLinear, weight: torch.Tensor, reader: Reader) -> None:
    """Check that transformers has loaded this linear into this weight, and changed nothing."""
    if weight.shape != linear.shape or not torch.equal(weight.cpu(), linear.dense().to(weight.dtype)):
        raise RiaError(
            f"{reader.folder}: {linear.name}: transformers' model holds another weight than the folder. Please report "
            "this bug in ria-vllm."
        )


def _trained_linears(
    reader: Reader, placement: Placement, parameter: nn.Parameter, adamw: AdamW, pace: Pace
) -> dict[str, TrainedParameter]:
    """Name -> what is trained, for the linears in one parameter."""
    kind = TrainedExpert if placement.stacked else TrainedParameter
    found: dict[str, TrainedParameter] = {}
    for expert, names in enumerate(placement.experts):
        for number, name in enumerate(names):
            linear, device = reader.linear(name), parameter.device
            parts = {part: tensor.to(device) for part, tensor in linear.parts.items()}
            layout = Kept(
                parts["bitmask"], linear.input_permutation, partial(placement.part, expert=expert, number=number)
            )
            rounding, scales = None, None
            if "weight_scale" in parts:
                assert isinstance(linear.format, RoundedFormat)
                scales = _trained_scales(kind, linear.format, parts["weight_scale"], adamw, pace)
                rounding = StraightThrough(linear.format, scales.parameter.data, linear.dtype)
            values = linear.format.values(parts, torch.float32)
            found[name] = kind(parameter, layout, values, adamw, pace, rounding, scales)
    return found


def _trained_scales(
    kind: type[TrainedParameter], weight_format: RoundedFormat, scales: torch.Tensor, adamw: AdamW, pace: Pace
) -> TrainedParameter:
    first = scales.float()
    adamw = replace(adamw, speed=SCALES_SPEED, weight_decay=0.0)
    read = nn.Parameter(scales.clone(), requires_grad=False)
    return kind(read, Whole(scales.shape), torch.zeros_like(first), adamw, pace, partial(scaled, weight_format, first))
