"""A layer's experts on NVIDIA GPUs: one after the other by the kernel for linears, from weights that stay compressed.

Preview: not measured. Each expert takes two launches and some operations of torch, so vLLM's own kernel, which takes
all experts at once, is preferred wherever it can serve them dense.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch.nn.functional import pad

from ria_vllm.format.sparse24 import IN_FEATURES_MULTIPLE
from ria_vllm.serve.kernels.base import Activation, ExpertsLayerConfig, LinearKernel, LinearLayerConfig
from ria_vllm.serve.kernels.cuda.backend import CutlassKernel, product
from ria_vllm.serve.kernels.routing import of_expert, sum_of_experts, two_products

_library = torch.library.Library("ria", "FRAGMENT")
_library.define(
    "sparse24_experts.cutlass(Tensor x, Tensor topk_weights, Tensor topk_ids, Tensor[] gate_up, Tensor[] down,"
    " Tensor[] biases, Tensor? input_permutation, Tensor? expert_map, str activation, bool is_gated, float alpha,"
    " float beta, float? limit) -> Tensor"
)


def _experts(  # noqa: PLR0913  # the schema of the operator
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    gate_up: list[torch.Tensor],
    down: list[torch.Tensor],
    biases: list[torch.Tensor],
    input_permutation: torch.Tensor | None,
    expert_map: torch.Tensor | None,
    activation: str,
    is_gated: bool,
    alpha: float,
    beta: float,
    limit: float | None,
    fixed_shapes: bool | None = None,
) -> torch.Tensor:
    """The operator. `fixed_shapes`: see `sum_of_experts`; by default, while a CUDA graph captures."""
    if fixed_shapes is None:
        fixed_shapes = x.is_cuda and torch.cuda.is_current_stream_capturing()
    function = Activation(activation, is_gated, alpha, beta, limit)  # type: ignore[arg-type]
    given = x if input_permutation is None else x.index_select(-1, input_permutation)

    def multiply(rows: torch.Tensor, which: int, expert: int | torch.Tensor) -> torch.Tensor:
        weight = [of_expert(part, expert) for part in (gate_up, down)[which]]
        rows = pad(rows, (0, 2 * weight[0].shape[1] - rows.shape[1]))
        return product(rows, weight, of_expert(biases[which], expert) if biases else None)

    experts, compute = len(gate_up[0]), two_products(function, multiply)
    return sum_of_experts(given, topk_weights, topk_ids, expert_map, experts, compute, fixed_shapes).to(x.dtype)


_library.impl("sparse24_experts.cutlass", _experts, "CompositeExplicitAutograd")


@torch.library.register_fake("ria::sparse24_experts.cutlass")
def _fake_experts(x: torch.Tensor, *_: object) -> torch.Tensor:
    return x.new_empty(x.shape)


class CutlassExpertsKernel:
    """See `ExpertsKernel`. Products are rounded to the activations' dtype; inputs as `CutlassKernel` does.

    Attributes:
        linears: the kernel that multiplies.
    """

    name: ClassVar[str] = CutlassKernel.name
    is_fallback: ClassVar[bool] = True
    linears: ClassVar[type[LinearKernel]] = CutlassKernel

    @staticmethod
    def is_supported(device: torch.device) -> str | None:
        return CutlassKernel.is_supported(device)

    @staticmethod
    def can_implement(config: ExpertsLayerConfig) -> str | None:
        reasons = (CutlassKernel.can_implement(linear) for linear in _linears(config))
        return next((reason for reason in reasons if reason is not None), None)

    @staticmethod
    def pack(
        config: ExpertsLayerConfig,
        gate_up: Mapping[str, torch.Tensor],
        down: Mapping[str, torch.Tensor],
        gate_up_bias: torch.Tensor | None,
        down_bias: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ...]:
        """What `CutlassKernel.pack` returns, of all experts: [E, ...] of gate and up, and of down; then the biases."""
        packed = []
        for linear, parts in zip(_linears(config), (gate_up, down)):
            of_each = [
                CutlassKernel.pack(linear, {name: part[expert] for name, part in parts.items()})
                for expert in range(config.num_experts)
            ]
            packed += [torch.stack(tensors) for tensors in zip(*of_each)]
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
        *weights, gate_up_bias, down_bias = packed if config.has_bias else (*packed, None, None)
        count, activation = len(weights) // 2, config.activation
        return torch.ops.ria.sparse24_experts.cutlass(
            x,
            topk_weights,
            topk_ids,
            weights[:count],
            weights[count:],
            [gate_up_bias, down_bias] if config.has_bias else [],
            input_permutation,
            expert_map,
            activation.name,
            activation.is_gated,
            activation.alpha,
            activation.beta,
            activation.limit,
        )


def _linears(config: ExpertsLayerConfig) -> tuple[LinearLayerConfig, LinearLayerConfig]:
    """An expert's products: of gate and up, and of down, whose columns are padded."""
    shapes = (config.gate_up_rows, config.hidden_size), (config.hidden_size, config.intermediate_size)
    gate_up, down = (
        LinearLayerConfig(
            config.device,
            config.act_dtype,
            config.weight_format,
            rows,
            columns + -columns % IN_FEATURES_MULTIPLE,
            config.input_dtype,
        )
        for rows, columns in shapes
    )
    return gate_up, down
