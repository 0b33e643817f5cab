"""Sparse24MoEMethod: the pruned routed experts of one of vLLM's MoE layers."""

from typing import Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

from ria_vllm.errors import RiaError
from ria_vllm.format.stacks import LayerExperts
from ria_vllm.format.weight_scheme import Weights, WeightScheme, misfit, uneven_cut
from ria_vllm.serve.experts.choice import choose
from ria_vllm.serve.experts.dense import DenseExpertsMethod
from ria_vllm.serve.experts.loading import BIAS, DOWN, GATE_UP, ExpertSizes, ExpertsLoader
from ria_vllm.serve.experts.packing import LoadedExperts, fill_dense, pack_experts
from ria_vllm.serve.experts.stored import ExpertPermutations
from ria_vllm.serve.load.engine import EngineOptions
from ria_vllm.serve.load.load_report import LoadReport, warn_of_choice, warn_of_inputs

logger = init_logger("vllm.ria")


def check_count(layer: RoutedExperts, experts: LayerExperts) -> None:
    """Check that vLLM's layer has as many experts as the checkpoint.

    Raises:
        RiaError: it has not.
    """
    moe, count = layer.moe_config, experts.num_experts
    if count < moe.num_logical_experts:
        raise RiaError(
            f"{experts.linear('up', count)} is in none of the weight files: they hold {count} experts of this layer, "
            f"and vLLM's has {moe.num_logical_experts}. Get the files again."
        )
    if count > moe.num_logical_experts:
        raise RiaError(
            f"{experts.name}: the checkpoint has {count} experts, but vLLM's layer has {moe.num_logical_experts}. "
            "config.json belongs to another model; get the files again."
        )


class Sparse24MoEMethod(FusedMoEMethodBase):
    """Loads experts in stored form, and a kernel serves them so; without one, vLLM's own method serves them dense.

    vLLM's router chooses the experts. Its model does not see their weights, see `experts_loading`.

    Args:
        layer: under construction.
        experts: what it serves, see `check_count`.
        scheme: how their weights are stored.
        permutations: of their channels.

    Attributes:
        choice: the kernel that serves the layer; None if there is none.
        dense: vLLM's method if it serves the layer; else None.

    Raises:
        RiaError: vLLM's layer is not that of these experts, or does something that is not served.
    """

    def __init__(
        self,
        layer: RoutedExperts,
        experts: LayerExperts,
        scheme: WeightScheme,
        permutations: ExpertPermutations,
    ):
        super().__init__(layer.moe_config)
        self.experts = experts
        self.scheme = scheme
        self.permutations = permutations
        moe, name = layer.moe_config, experts.name
        if EngineOptions.current().lora:
            raise RiaError(
                f"{name}: vLLM puts LoRA adapters on the experts, too, which is not served for pruned ones. Serve "
                "without --enable-lora, or serve the dense model."
            )
        # vLLM asks the method that a layer is built with, and would move whatever a later one has in as many pieces as
        # there are experts.
        if moe.moe_parallel_config.enable_eplb:
            raise RiaError(
                f"{name}: with --enable-eplb, vLLM moves experts between ranks, which is not served for pruned ones. "
                "Serve without it."
            )
        if layer.expert_map_manager.num_fused_shared_experts:
            raise RiaError(
                f"{name}: vLLM fuses the shared expert with these on this platform, which is not served pruned. Set "
                "VLLM_ROCM_USE_AITER_FUSION_SHARED_EXPERTS=0."
            )
        if moe.is_act_and_mul != experts.is_gated:
            raise RiaError(
                f"{name}: vLLM's experts have {'a' if moe.is_act_and_mul else 'no'} gate, unlike the checkpoint's. "
                "config.json belongs to another model; get the files again."
            )
        if moe.num_local_experts == 0:
            raise RiaError(
                f"{name}: {experts.num_experts} experts over {moe.ep_size} ranks leave this one without any. Use fewer "
                "ranks, or start without --enable-expert-parallel."
            )
        if layer.apply_router_weight_on_input and moe.experts_per_token != 1:
            raise RiaError(
                f"{name}: vLLM's model puts the router's weights on the experts' input, and each token has "
                f"{moe.experts_per_token} experts. That is served with one expert only."
            )
        self.sizes = ExpertSizes.of(moe)
        for columns in (self.sizes.hidden, moe.intermediate_size):
            if reason := misfit(scheme, columns):
                raise RiaError(f"{name}: {reason}")
        if reason := uneven_cut(scheme, moe.intermediate_size, moe.tp_size):
            raise RiaError(f"{name}: {reason} Or start with --enable-expert-parallel.")
        permutations.check(experts, self.sizes.hidden, self.sizes.intermediate)
        self.choice, self.dense = choose(layer, experts, scheme, self.sizes)
        if self.dense is not None:
            self.experts_cls = self.dense.experts_cls

    def maybe_roundup_sizes(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        if self.dense is not None:
            return self.dense.maybe_roundup_sizes(*args, **kwargs)
        return super().maybe_roundup_sizes(*args, **kwargs)

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> Any:
        return None if self.dense is None else self.dense.get_fused_moe_quant_config(layer)

    def create_weights(self, layer: RoutedExperts, *, params_dtype: torch.dtype, **others: Any) -> None:
        before = set(layer._parameters)
        self.creation = {"params_dtype": params_dtype, **others}
        self.loader = ExpertsLoader(
            self.experts, self.sizes, self.scheme.tensors(params_dtype), self.permutations.rows, self.moe.has_bias
        )
        self.loader.create_parameters(layer, params_dtype)
        self.created = [name for name in layer._parameters if name not in before]

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Check what was loaded, pack it for a kernel or for vLLM, and free it."""
        names = self.loader.parameter_names()
        if not all(name in layer._parameters for name in names):
            return  # it has been processed
        stored = {name: layer._parameters[name].data for name in names}
        for name in names:
            delattr(layer, name)
        self.loader.check_complete(layer.expert_map_manager.get_local_expert_ids())
        loaded = self._loaded(stored)
        if self.choice is None:
            assert self.dense is not None
            self._serve_dense(layer, self.dense, loaded)
        else:
            try:
                layer.ria_experts = pack_experts(layer, self.choice, loaded)
            except RuntimeError as error:
                raise RiaError(f"{self.experts.name}: {error}") from error

    def _serve_dense(self, layer: RoutedExperts, dense: DenseExpertsMethod, loaded: LoadedExperts) -> None:
        """Serve with vLLM's own method."""
        fill_dense(layer, dense, loaded, self.sizes)
        dense.process_weights_after_loading(layer)
        self.moe_kernel, self.moe_quant_config = dense.moe_kernel, dense.moe_quant_config
        layer.ria_experts = None

    def _loaded(self, stored: dict[str, torch.Tensor]) -> LoadedExperts:
        """What was loaded, as kernels take it."""
        return LoadedExperts(
            self._weights(stored, GATE_UP),
            self._weights(stored, DOWN),
            stored.get(GATE_UP + BIAS),
            stored.get(DOWN + BIAS),
            self.permutations.input,
        )

    def _weights(self, stored: dict[str, torch.Tensor], prefix: str) -> Weights:
        """The experts' matrices below each other, as one.

        Raises:
            RiaError: damaged scales or a damaged bitmask.
        """
        parts = {part: stored[prefix + part].flatten(0, 1) for part in self.loader.specs}
        sizes = [len(next(iter(parts.values())))]
        try:
            weights = self.scheme.weights(parts, sizes, self.moe.in_dtype, self.loader.scale_dtypes)
        except ValueError as error:
            raise RiaError(
                f"{self.experts.name}, {prefix.strip('_')}: {error}. The weight file is damaged; get it again."
            ) from None
        assert weights is not None  # only plain ones may not have the pattern
        return weights

    def report(self, layer: RoutedExperts, report: LoadReport) -> None:
        """Say how the layer is served, and count it."""
        moe, sizes, packed = self.moe, self.sizes, layer.ria_experts
        outputs = 3 if moe.is_act_and_mul else 2
        dense_bytes = sizes.local * outputs * sizes.hidden * sizes.here * moe.in_dtype.itemsize
        if packed is None:
            logger.warning_once(
                "Pruned experts are served dense: their weights were decompressed, because no fast kernel of "
                "ria-vllm serves them as they are on %s. The answers are right, without the savings; `ria-vllm doctor` "
                "says which slow one serves them compressed.", moe.device,
            )  # fmt: skip
            warn_of_inputs(self.scheme.activations, "the experts are served dense", self.scheme.format)
            kernel, bytes_here = f"dense experts ({type(self.moe_kernel.fused_experts).__name__})", dense_bytes
        else:
            warn_of_choice(packed.choice, self.scheme.activations)
            kernel = f"{packed.choice} experts"
            bytes_here = sum(getattr(layer, name).nbytes for name in packed.packed)
        gathered = packed is not None and packed.input_permutation is not None
        shapes = [(name, tuple(p.shape), str(p.dtype)) for name, p in layer.named_parameters(recurse=False)]
        report.add(
            kernel, self.permutations.folded, int(gathered), dense_bytes, bytes_here,
            f"{self.experts.name} {kernel} {shapes}",
        )  # fmt: skip

    def apply(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any = None,
        shared_experts_input: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x [tokens, H] -> [tokens, H]: the sum of each token's experts on this rank, weighted by vLLM's router."""
        if layer.ria_experts is not None:
            return layer.ria_experts.apply(layer, x, topk_weights, topk_ids)
        assert self.dense is not None
        return self.dense.apply(
            layer=layer, x=x, topk_weights=topk_weights, topk_ids=topk_ids, shared_experts=shared_experts,
            shared_experts_input=shared_experts_input,
        )  # fmt: skip

    def apply_monolithic(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        router_logits: torch.Tensor,
        input_ids: torch.Tensor | None = None,
    ) -> Any:
        """The same with vLLM's own router inside its kernel, where vLLM's method chose one of that kind."""
        assert self.dense is not None
        return self.dense.apply_monolithic(layer, x, router_logits, input_ids)
