"""A layer's experts in torch operations alone, for any device, dtype and weight format: the fallback."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch

from ria_vllm.format.formats import FORMATS
from ria_vllm.format.pattern import PATTERNS, Pattern
from ria_vllm.serve.kernels import int8_inputs
from ria_vllm.serve.kernels.base import Activation, ExpertsLayerConfig, cannot_decode
from ria_vllm.serve.kernels.routing import of_expert, sum_of_experts, two_products

_library = torch.library.Library("ria", "FRAGMENT")
_library.define(
    "sparse24_experts.reference(Tensor x, Tensor topk_weights, Tensor topk_ids, Tensor[] packed, Tensor[] biases,"
    " Tensor? input_permutation, Tensor? expert_map, str format_name, bool rounds_input, str activation,"
    " bool is_gated, float alpha, float beta, float? limit) -> Tensor"
)


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
    """The operator. `fixed_shapes`: see `sum_of_experts`; on a GPU they are."""
    fixed_shapes = x.device.type != "cpu" if fixed_shapes is None else fixed_shapes
    weight_format, function = FORMATS[format_name], Activation(activation, is_gated, alpha, beta, limit)  # type: ignore[arg-type]
    names = [part.name for part in weight_format.parts]
    given = x if input_permutation is None else x.index_select(-1, input_permutation)

    def product(inputs: torch.Tensor, which: int, expert: int | torch.Tensor) -> torch.Tensor:
        tensors = packed[which * len(names) : (which + 1) * len(names)]
        parts = {name: of_expert(tensor, expert) for name, tensor in zip(names, tensors, strict=True)}
        bias = of_expert(biases[which], expert) if biases else None
        return int8_inputs.product(inputs, weight_format, parts, bias, rounds_input)

    experts, compute = len(packed[0]), two_products(function, product)
    return sum_of_experts(given, topk_weights, topk_ids, expert_map, experts, compute, fixed_shapes).to(x.dtype)


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
