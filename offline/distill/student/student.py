"""The pruned model in training: its kept weights, and the tensors that are written when it is finished."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ria_vllm.checkpoint.reader import Reader
from ria_vllm.checkpoint.sparse_linear import SparseLinear
from ria_vllm.format.formats import RoundedFormat
from ria_vllm.hf.placement import ORIGIN_ATTRIBUTE
from ria_vllm.offline.distill.student.layouts import Kept, Part
from ria_vllm.offline.distill.student.parameters import DEFAULTS, AdamW, Pace, TrainedParameter, step_in_backward
from ria_vllm.offline.distill.student.rounding import StraightThrough
from ria_vllm.offline.model.run.architecture import find_decoder


class Student:
    """A model whose kept weights, and the scales of quantized ones, are trained.

    Args:
        reader: of the folder that training starts from.
        model: loaded from it; its parameters' data is trained in place.
        save_memory: keep only the input of each decoder layer in the forward pass, and compute the rest again.

    Attributes:
        trained: name of a linear -> what is trained.
    """

    def __init__(self, reader: Reader, model: Any, save_memory: bool = True, adamw: AdamW = DEFAULTS):
        self.model, self.pace = model, Pace()
        model.requires_grad_(False)
        self.trained: dict[str, TrainedParameter] = {}
        # What is stored beside what is trained; the files may be others when training ends.
        self._linears: dict[str, SparseLinear] = {}
        for inside, placement in sorted(getattr(model, ORIGIN_ATTRIBUTE).placements.items()):
            parameter = model.get_parameter(inside)
            parts = {}
            for expert, names in enumerate(placement.experts):
                for number, name in enumerate(names):
                    linear = reader.linear(name)
                    part = partial(placement.part, expert=expert, number=number)
                    parts[name] = _trained(linear, part, parameter, adamw, self.pace)
                    self._linears[name] = replace(linear, parts={})
            step_in_backward(parameter, list(parts.values()))
            self.trained |= parts
        if save_memory:
            for layer in model.get_submodule(find_decoder(model, reader.folder)[1]):
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """[tokens of all sequences, vocabulary], for int64 [sequences, tokens]. In their backward pass, all that is
        trained takes its step."""
        return self.model(input_ids=tokens, use_cache=False).logits.flatten(0, 1)

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """All that is stored of a linear, as it is now, on the CPU."""
        trained, linear = self.trained[name], self._linears[name]
        values, bitmask = trained.rounded().cpu(), trained.layout.bitmask.cpu()
        scales = None if trained.rounding is None else trained.rounding.scales.cpu()
        return replace(linear, parts=linear.format.encode_kept(values.to(linear.dtype), bitmask, scales)).tensors()


def _trained(linear: SparseLinear, part: Part, parameter: nn.Parameter, adamw: AdamW, pace: Pace) -> TrainedParameter:
    """What is trained of a linear, which is a part of a parameter."""
    parts = {name: tensor.to(parameter.device) for name, tensor in linear.parts.items()}
    layout = Kept(parts["bitmask"], linear.input_permutation, part)
    rounding = None
    if isinstance(linear.format, RoundedFormat):
        rounding = StraightThrough(linear.format, parts["weight_scale"], linear.dtype)
    return TrainedParameter(parameter, layout, linear.format.values(parts, torch.float32), adamw, pace, rounding)
