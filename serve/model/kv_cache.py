"""An fp8 KV cache, with the scales that a checkpoint of compressed-tensors holds for it."""

import torch
from vllm.model_executor.layers.attention import Attention, MLAAttention
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsKVCacheMethod
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from ria_vllm.errors import RiaError
from ria_vllm.serve.load.engine import EngineOptions


def kv_cache_method(layer: torch.nn.Module, config: QuantizationConfig) -> QuantizeMethodBase | None:
    """The method that loads the scales of `layer`, if that is an attention layer."""
    return KVCacheScales(config) if isinstance(layer, Attention | MLAAttention) else None


class KVCacheScales(CompressedTensorsKVCacheMethod):
    """vLLM's own method, except that a missing scale is an error instead of 1.

    The checkpoint has no scales for layers that read the cache of another layer, nor for the draft of a multi-token
    prediction, which is built after the model itself.
    """

    def create_weights(self, layer: torch.nn.Module) -> None:
        """vLLM calls it once more for each reload that brings a scale of the layer."""
        super().create_weights(layer)
        if not hasattr(layer, "ria_needs_scales"):
            shares_cache = getattr(layer, "kv_sharing_target_layer_name", None) is not None
            layer.ria_needs_scales = not shares_cache and not self.quant_config.model_built
        if layer.ria_needs_scales:
            for part in ("k_scale", "v_scale"):
                getattr(layer, part).data.fill_(torch.nan)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        reloaded = get_layerwise_info(layer).kernel_tensors is not None
        # The load format stays "dummy" when somebody sends real scales later.
        dummy_weights = EngineOptions.current().dummy_weights and not reloaded
        for part in ("k_scale", "v_scale"):
            scale = getattr(layer, part)
            if dummy_weights:
                scale.data.fill_(1)
            elif layer.ria_needs_scales and not bool(((scale > 0) & scale.isfinite()).all()):
                raise _fault(f"{layer.layer_name}.{part}", scale, reloaded)
        super().process_weights_after_loading(layer)


def _fault(name: str, scale: torch.Tensor, reloaded: bool) -> RiaError:
    """What is wrong with a scale. One that never came is NaN."""
    if reloaded and bool(scale.isnan().all()):
        return RiaError(
            f"{name} did not come with the other scales of this layer's KV cache in a reload. Start the server again, "
            "and send them together."
        )
    fault = "is in none of the weight files" if scale.isnan().all() else f"is {scale.squeeze().tolist()}"
    return RiaError(
        f"{name} {fault}, but config.json has a kv_cache_scheme. Get the model again, or remove that key from "
        "config.json to serve with a cache in the model's dtype."
    )
