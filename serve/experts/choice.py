"""Who computes an MoE layer's pruned experts: a kernel, from the weights as they are stored, or vLLM, dense."""

import os

import torch
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

from ria_vllm.errors import RiaError
from ria_vllm.format.formats import FLOAT
from ria_vllm.format.stacks import LayerExperts
from ria_vllm.format.weight_scheme import WeightScheme
from ria_vllm.serve.experts.dense import DenseExpertsMethod
from ria_vllm.serve.experts.loading import ExpertSizes
from ria_vllm.serve.experts.packing import activation_of
from ria_vllm.serve.experts.stored import WAY_OUT
from ria_vllm.serve.kernels import registry
from ria_vllm.serve.kernels.base import ExpertsLayerConfig
from ria_vllm.serve.kernels.choice import KERNEL_VARIABLE


def choose(
    layer: RoutedExperts, experts: LayerExperts, scheme: WeightScheme, sizes: ExpertSizes
) -> tuple[registry.ExpertsChoice | None, DenseExpertsMethod | None]:
    """A kernel if there is a fast one or one is forced, else vLLM's method if it can, else a slow kernel.

    Args:
        experts: those that the layer serves, for errors.

    Returns:
        The kernel, or vLLM's method; the other is None.

    Raises:
        RiaError: none can.
    """
    moe, activation, choice = layer.moe_config, activation_of(layer), None
    alone = moe.dp_size == 1 and moe.pcp_size == 1 and not moe.is_sequence_parallel
    if activation is not None and alone:
        config = ExpertsLayerConfig(
            device=torch.device(moe.device),
            act_dtype=moe.in_dtype,
            weight_format=scheme.format if scheme.keeps_format else FLOAT,
            num_experts=sizes.local,
            hidden_size=sizes.hidden,
            intermediate_size=sizes.here,
            activation=activation,
            has_bias=moe.has_bias,
            router_weight_on_input=layer.apply_router_weight_on_input,
            input_dtype=scheme.input_dtype,
            pattern=scheme.pattern,
        )
        choice = registry.choose(config)
        if not choice.kernel.is_fallback or os.environ.get(KERNEL_VARIABLE) == choice.kernel.name:
            return choice, None
    dense = DenseExpertsMethod(layer)
    if dense.unserved is None:
        return None, dense
    if choice is None:
        reason = (
            "with data, sequence or context parallel" if activation else f"with the activation {layer.activation.value}"
        )
        raise RiaError(
            f"{experts.name}: no kernel serves these experts {reason}, and they cannot be served dense either: "
            f"{dense.unserved}. {WAY_OUT}"
        )
    return choice, None
