"""A layer's experts in torch operations alone, for any device, dtype and weight format: the fallback."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch.nn import functional

from ria_vllm.format.formats import FORMATS
from ria_vllm.format.pattern import PATTERNS, Pattern
from ria_vllm.serve.kernels import int8_inputs
from ria_vllm.serve.kernels.base import Activation, ExpertsLayerConfig, cannot_decode

_library = torch.library.Library("ria", "FRAGMENT")
_library.define(
    "sparse24_experts.reference(Tensor x, Tensor topk_weights, Tensor topk_ids, Tensor[] packed, Tensor[] biases,"
    " Tensor? input_permutation, Tensor? expert_map, str format_name, bool rounds_input, str activation,"
    " bool is_gated, float alpha, float beta, float? limit) -> Tensor"
)


def activate(activation: Activation, gate_up: torch.Tensor) -> torch.Tensor:
    """[..., 2 I], the gates before the ups, or without a gate [..., I] -> [..., I], in the dtype that comes in."""
    if not activation.is_gated:
        return _function(activation, gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    limit = activation.limit
    if limit is not None:
        up = up.clamp(-limit, limit)
        if activation.name == "swiglustep":
            return _function(activation, gate).clamp(max=limit) * (up + activation.beta)
        gate = gate.clamp(max=limit)
    return _function(activation, gate) * (up + activation.beta)


def _function(activation: Activation, x: torch.Tensor) -> torch.Tensor:
    match activation.name:
        case "gelu":
            return functional.gelu(x)
        case "gelu_tanh":
            return functional.gelu(x, approximate="tanh")
        case "relu2":
            return functional.relu(x).square()
    return x * torch.sigmoid(activation.alpha * x)


def _check(ids: torch.Tensor, experts: int, name: str) -> None:
    """Check that all ids are less than `experts`, or -1. On a GPU, the check is part of what is captured."""
    message = f"ria::sparse24: {name} has an expert that does not exist"
    valid = ((ids >= -1) & (ids < experts)).all()
    if ids.device.type == "cpu":
        if not valid:
            raise RuntimeError(message)
    else:
        torch._assert_async(valid, message)


def _experts(  # noqa: PLR0913  # the schema of the operator
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    packed: list[torch.Tensor],
    biases: list[torch.Tensor],
    input_permutation: torch.Tensor | None,
    expert_map: torch.Tensor | None,
    format_name: str,
    rounds_input: bool,
    activation: str,
    is_gated: bool,
    alpha: float,
    beta: float,
    limit: float | None,
    fixed_shapes: bool | None = None,
) -> torch.Tensor:
    """The operator. With `fixed_shapes`, as on a GPU, a CUDA graph can capture it: all experts compute all tokens."""
    fixed_shapes = x.device.type != "cpu" if fixed_shapes is None else fixed_shapes
    weight_format, function = FORMATS[format_name], Activation(activation, is_gated, alpha, beta, limit)  # type: ignore[arg-type]
    names = [part.name for part in weight_format.parts]
    num_experts = len(packed[0])
    ids = topk_ids.long()
    _check(ids, num_experts if expert_map is None else len(expert_map), "topk_ids")
    if expert_map is not None:
        ids = torch.where(ids < 0, ids, expert_map.long()[ids.clamp(min=0)])
        _check(ids, num_experts, "expert_map")
    given = x if input_permutation is None else x.index_select(-1, input_permutation)
    y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)

    def product(inputs: torch.Tensor, which: int, expert: int) -> torch.Tensor:
        tensors = packed[which * len(names) : (which + 1) * len(names)]
        parts = {name: tensor[expert] for name, tensor in zip(names, tensors, strict=True)}
        bias = biases[which][expert] if biases else None
        return int8_inputs.product(inputs, weight_format, parts, bias, rounds_input)

    for expert in range(num_experts):
        chosen = ids == expert
        if fixed_shapes:
            share = torch.where(chosen, topk_weights, torch.zeros_like(topk_weights)).sum(1, keepdim=True)
            inner = activate(function, product(given, 0, expert)).to(x.dtype)
            y = torch.where(chosen.any(1, keepdim=True), y + product(inner, 1, expert) * share, y)
            continue
        tokens, slots = chosen.nonzero(as_tuple=True)
        if len(tokens):
            inner = activate(function, product(given[tokens], 0, expert)).to(x.dtype)
            y.index_add_(0, tokens, product(inner, 1, expert) * topk_weights[tokens, slots, None].float())
    return y.to(x.dtype)


_library.impl("sparse24_experts.reference", _experts, "CompositeExplicitAutograd")


@torch.library.register_fake("ria::sparse24_experts.reference")
def _fake_experts(x: torch.Tensor, *_: object) -> torch.Tensor:
    return x.new_empty(x.shape)


class ReferenceExpertsKernel:
    """See `ExpertsKernel`."""

    name: ClassVar[str] = "reference"
    is_fallback: ClassVar[bool] = True
    patterns: ClassVar[tuple[Pattern, ...]] = tuple(PATTERNS.values())

    @staticmethod
    def is_supported(device: torch.device) -> str | None:
        return None

    @staticmethod
    def can_implement(config: ExpertsLayerConfig) -> str | None:
        return cannot_decode(config)

    @staticmethod
    def pack(
        config: ExpertsLayerConfig,
        gate_up: Mapping[str, torch.Tensor],
        down: Mapping[str, torch.Tensor],
        gate_up_bias: torch.Tensor | None,
        down_bias: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ...]:
        """The format's own tensors: of gate and up, of down, and the biases."""
        names = [part.name for part in config.weight_format.parts]
        packed = [parts[name].clone() for parts in (gate_up, down) for name in names]
        return (*packed, *(bias.clone() for bias in (gate_up_bias, down_bias) if bias is not None))

    @staticmethod
    def apply(
        config: ExpertsLayerConfig,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        packed: Sequence[torch.Tensor],
        input_permutation: torch.Tensor | None,
        expert_map: torch.Tensor | None,
    ) -> torch.Tensor:
        x, topk_weights = config.weighted(x, topk_weights)
        count, activation = 2 * len(config.weight_format.parts), config.activation
        return torch.ops.ria.sparse24_experts.reference(
            x,
            topk_weights,
            topk_ids,
            list(packed[:count]),
            list(packed[count:]),
            input_permutation,
            expert_map,
            config.weight_format.name,
            config.input_dtype is not None,
            activation.name,
            activation.is_gated,
            activation.alpha,
            activation.beta,
            activation.limit,
        )
