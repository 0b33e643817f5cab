"""From the loaded weights of an MoE layer's experts to what computes them."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

from ria_vllm.format import permutation
from ria_vllm.format.weight_scheme import Weights
from ria_vllm.serve.experts.loading import ExpertSizes
from ria_vllm.serve.kernels.base import Activation
from ria_vllm.serve.kernels.registry import ExpertsChoice
from ria_vllm.serve.linear.parameters import set_parameter


def activation_of(layer: RoutedExperts) -> Activation | None:
    """What the layer computes between an expert's products; None if `Activation` cannot say it."""
    kind, limit = layer.activation, layer.swiglu_limit
    if kind == MoEActivation.SILU:
        return Activation("silu", limit=limit)
    if kind == MoEActivation.SWIGLUOAI:
        return Activation("silu", alpha=1.702, beta=1.0, limit=7.0)
    if kind == MoEActivation.SWIGLUOAI_UNINTERLEAVE and limit is not None:
        alpha = 1.0 if layer.swiglu_alpha is None else layer.swiglu_alpha
        return Activation("silu", alpha=alpha, beta=layer.swiglu_beta or 0.0, limit=limit)
    plain = {
        MoEActivation.GELU: Activation("gelu"),
        MoEActivation.GELU_TANH: Activation("gelu_tanh"),
        MoEActivation.SWIGLUSTEP: Activation("swiglustep", limit=7.0),
        MoEActivation.SILU_NO_MUL: Activation("silu", is_gated=False),
        MoEActivation.GELU_NO_MUL: Activation("gelu", is_gated=False),
        MoEActivation.GELU_TANH_NO_MUL: Activation("gelu_tanh", is_gated=False),
        MoEActivation.RELU2_NO_MUL: Activation("relu2", is_gated=False),
    }
    return plain.get(kind) if limit is None else None


@dataclass(frozen=True)
class LoadedExperts:
    """The weights of a layer's experts on this rank.

    Attributes:
        gate_up: of a weight [E * rows, H]; an expert's rows of gate are followed by those of up, both permuted as
            the columns of its down projection.
        down: of a weight [E * H, I].
        gate_up_bias, down_bias: [E, rows] and [E, H], or None.
        input_permutation: int32 [H], of a token's channels, for all of them; None: they are not permuted.
    """

    gate_up: Weights
    down: Weights
    gate_up_bias: torch.Tensor | None
    down_bias: torch.Tensor | None
    input_permutation: np.ndarray | None


@dataclass(frozen=True)
class PackedExperts:
    """Experts as a kernel computes them. Tensors are named, because vLLM may move parameters.

    Attributes:
        choice: the kernel, and the layer as it serves it.
        packed: names of the layer's parameters that hold the packed weights.
        input_permutation: name of the parameter with the permutation by which the kernel gathers its input, or None.
    """

    choice: ExpertsChoice
    packed: tuple[str, ...]
    input_permutation: str | None

    @property
    def parameters(self) -> list[str]:
        """The names of all parameters of the layer that it needs."""
        return [name for name in (*self.packed, self.input_permutation) if name is not None]

    def apply(
        self, layer: RoutedExperts, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor
    ) -> torch.Tensor:
        """x [T, H] -> [T, H], what the experts of this rank add."""
        return self.choice.kernel.apply(
            self.choice.config,
            x,
            topk_weights.float(),  # some models' own routers give the activations' dtype
            topk_ids,
            [getattr(layer, name) for name in self.packed],
            None if self.input_permutation is None else getattr(layer, self.input_permutation),
            layer.expert_map,
        )


def pack_experts(layer: RoutedExperts, choice: ExpertsChoice, experts: LoadedExperts) -> PackedExperts:
    """Pack `experts`, which are pruned, and register what the kernel needs."""
    config = choice.config
    gate_up, down = (
        {name: part.unflatten(0, (config.num_experts, -1)) for name, part in _in_format(weights, choice).items()}
        for weights in (experts.gate_up, experts.down)
    )
    packed = choice.kernel.pack(config, gate_up, down, experts.gate_up_bias, experts.down_bias)
    names = tuple(f"experts_packed_{i}" for i in range(len(packed)))
    for name, tensor in zip(names, packed):
        set_parameter(layer, name, tensor)
    p = experts.input_permutation
    if p is None:
        return PackedExperts(choice, names, None)
    set_parameter(layer, "experts_input_permutation", torch.from_numpy(p).to(gate_up["bitmask"].device, copy=True))
    return PackedExperts(choice, names, "experts_input_permutation")


def _in_format(weights: Weights, choice: ExpertsChoice) -> Mapping[str, torch.Tensor]:
    if choice.widened_from is not None:
        weights = weights.widened(choice.config.act_dtype)
    return weights.parts


def fill_dense(
    layer: RoutedExperts, method: UnquantizedFusedMoEMethod, experts: LoadedExperts, sizes: ExpertSizes
) -> None:
    """Give `layer` the parameters of vLLM's own `method`, filled with the experts' weights in plain floating point.

    vLLM may have rounded the layer's sizes up; the rest stays zero.
    """
    count, here, device = sizes.local, sizes.here, experts.gate_up.device
    with device:
        method.create_weights(
            layer, count, layer.hidden_size, layer.intermediate_size_per_partition, layer.params_dtype
        )
    w13, w2 = layer.w13_weight.data.zero_(), layer.w2_weight.data.zero_()
    rows = rows_of_w13(layer, here, w13.shape[1], device)
    p = experts.input_permutation
    columns = None if p is None else permutation.invert(torch.from_numpy(p).long()).to(device)
    for expert in range(count):
        matrix = _dense(experts.gate_up, expert, len(rows) * here, w13.dtype)
        matrix = matrix if columns is None else matrix.index_select(1, columns)
        for i, places in enumerate(rows):
            w13[expert, places, : sizes.hidden] = matrix[i * here : (i + 1) * here]
        w2[expert, : sizes.hidden, :here] = _dense(experts.down, expert, sizes.hidden, w2.dtype)
    if experts.gate_up_bias is not None:
        for i, places in enumerate(rows):
            layer.w13_bias.data[:, places] = experts.gate_up_bias[:, i * here : (i + 1) * here]
        layer.w2_bias.data[:, : sizes.hidden] = experts.down_bias


def rows_of_w13(layer: RoutedExperts, here: int, rows: int, device: torch.device) -> list[torch.Tensor]:
    """Where vLLM's first product has the rows of gate and of up: each in a half, or alternating."""
    index = torch.arange(here, device=device)
    if not layer.moe_config.is_act_and_mul:
        return [index]
    if layer.activation == MoEActivation.SWIGLUOAI:
        return [2 * index, 2 * index + 1]
    return [index, rows // 2 + index]


def _dense(weights: Weights, expert: int, rows: int, dtype: torch.dtype) -> torch.Tensor:
    """[rows, in] of an expert, columns in the stored order, without their padding."""
    matrix = weights.format.decode(weights.rows(expert * rows, rows).parts, dtype)
    return matrix[:, : weights.in_features - weights.padding]
