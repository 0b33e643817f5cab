"""A layer's experts on CPUs: one call of our C++ kernels (csrc/experts.cpp) for all of them."""

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch

from ria_vllm.format.pattern import Pattern
from ria_vllm.serve.kernels.base import ExpertsLayerConfig
from ria_vllm.serve.kernels.cpu import backend

# Their numbers in csrc/kernels.h.
_ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu2", "swiglustep")

if backend.LOADED:

    @torch.library.register_fake("ria::sparse24_experts.cpu")
    def _fake_experts(x: torch.Tensor, *_: object) -> torch.Tensor:
        return x.new_empty(x.shape)


class CpuExpertsKernel:
    """See `ExpertsKernel`. int8 and int4 weights take activations of any dtype."""

    name: ClassVar[str] = "cpu"
    is_fallback: ClassVar[bool] = False
    patterns: ClassVar[tuple[Pattern, ...]] = backend.CpuKernel.patterns

    @staticmethod
    def is_supported(device: torch.device) -> str | None:
        return backend.CpuKernel.is_supported(device)

    @staticmethod
    def can_implement(config: ExpertsLayerConfig) -> str | None:
        if config.activation.name not in _ACTIVATIONS:
            return f"no activation {config.activation.name}; {', '.join(_ACTIVATIONS)} only"
        columns = max(config.hidden_size, config.intermediate_size)
        if config.input_dtype is not None and columns > backend.MAX_INT8_COLUMNS:
            return f"{columns} columns with inputs rounded to int8; at most {backend.MAX_INT8_COLUMNS}"
        return backend.unsupported(config)

    @staticmethod
    def pack(
        config: ExpertsLayerConfig,
        gate_up: Mapping[str, torch.Tensor],
        down: Mapping[str, torch.Tensor],
        gate_up_bias: torch.Tensor | None,
        down_bias: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ...]:
        """A uint8 stream for each expert, see csrc/layout.h: [E, bytes] of gate and up, and of down; then the biases.

        Raises:
            RuntimeError: shapes or dtypes do not fit, or a group does not keep exactly half of its values; it is named.
        """
        gated = config.activation.is_gated
        packed = [_pack(config, gate_up, gated), _pack(config, down, False)]
        if gate_up_bias is not None and down_bias is not None:
            if gated:  # 16 gates, their 16 ups, and so on, like the rows of the weight
                padding = -config.intermediate_size % 16
                halves = gate_up_bias.view(config.num_experts, 2, config.intermediate_size)
                strips = torch.nn.functional.pad(halves, (0, padding)).unflatten(2, (-1, 16))
                gate_up_bias = strips.transpose(1, 2).flatten(1)
            packed += [gate_up_bias.clone(), down_bias.clone()]
        return tuple(packed)

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
        activation = config.activation
        gate_up, down, gate_up_bias, down_bias = packed if config.has_bias else (*packed, None, None)
        return torch.ops.ria.sparse24_experts.cpu(
            x,
            topk_weights,
            topk_ids,
            gate_up,
            down,
            gate_up_bias,
            down_bias,
            input_permutation,
            expert_map,
            _ACTIVATIONS.index(activation.name),
            int(activation.is_gated),
            activation.alpha,
            activation.beta,
            math.inf if activation.limit is None else activation.limit,
        )


def _pack(config: ExpertsLayerConfig, parts: Mapping[str, torch.Tensor], gated: bool) -> torch.Tensor:
    arguments = backend.packing_arguments(config.weight_format, parts)
    return torch.ops.ria.sparse24_pack_experts.cpu(*arguments, int(gated), *backend.activation_arguments(config))
