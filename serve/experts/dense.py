"""DenseExpertsMethod: vLLM's own method for dense experts, without what it gets wrong."""

from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.platforms import current_platform

from ria_vllm.errors import RiaError


class DenseExpertsMethod(UnquantizedFusedMoEMethod):
    """The method of a layer whose prefix names no pruned experts, and of pruned ones that no kernel serves.

    vLLM's experts for CPUs ignore which experts a rank has, so the numbers are translated for them.

    Args:
        layer: under construction.

    Attributes:
        unserved: why vLLM cannot compute these experts, or would not compute them right; None if it can.
    """

    def __init__(self, layer: RoutedExperts):
        moe = layer.moe_config
        try:
            super().__init__(moe)
        except (NotImplementedError, ValueError) as error:  # vLLM has no experts for this layer on this platform
            self.experts_cls = None
            self.unserved: str | None = f"vLLM says: {error}"
            return
        self.unserved = None
        if current_platform.is_cpu():
            if moe.moe_parallel_config.use_all2all_kernels:
                self.unserved = (
                    "vLLM's experts for CPUs mix up the ranks' experts if these are spread over data parallel ranks; "
                    "start without --enable-expert-parallel"
                )
            elif layer.swiglu_limit is not None and layer.activation != MoEActivation.SWIGLUOAI:
                self.unserved = f"vLLM's experts for CPUs ignore swiglu_limit ({layer.swiglu_limit})"

    def check(self, name: str) -> None:
        """Check that vLLM can serve dense experts in the layer called `name`.

        Raises:
            RiaError: it cannot.
        """
        if self.unserved is not None:
            raise RiaError(f"{name}: the experts of this layer are dense, and cannot be served here: {self.unserved}.")

    def maybe_roundup_sizes(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        if self.experts_cls is None and self.unserved is not None:
            return FusedMoEMethodBase.maybe_roundup_sizes(self, *args, **kwargs)
        return super().maybe_roundup_sizes(*args, **kwargs)

    def create_weights(self, layer: RoutedExperts, *args: Any, **kwargs: Any) -> None:
        before = set(layer._parameters)
        super().create_weights(layer, *args, **kwargs)
        self.creation = kwargs
        self.created = [name for name in layer._parameters if name not in before]

    def apply(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any = None,
        shared_experts_input: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `FusedMoEMethodBase.apply`."""
        if current_platform.is_cpu() and layer.expert_map is not None:
            here = layer.expert_map[topk_ids.long()]
            topk_weights = topk_weights.masked_fill(here < 0, 0)
            topk_ids = here.clamp(min=0).to(topk_ids.dtype)
        return super().apply(layer, x, topk_weights, topk_ids, shared_experts, shared_experts_input)
