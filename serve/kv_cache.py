"""An fp8 KV cache, with the scales that a checkpoint of compressed-tensors holds for it."""

import torch
from vllm.model_executor.layers.attention import Attention, MLAAttention
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsKVCacheMethod

from ria_vllm.errors import RiaError
from ria_vllm.serve.engine import EngineOptions


def kv_cache_method(layer: torch.nn.Module, config: QuantizationConfig) -> QuantizeMethodBase | None:
    """The method that loads the scales of `layer`, if that is an attention layer."""
    return KVCacheScales(config) if isinstance(layer, Attention | MLAAttention) else None


class KVCacheScales(CompressedTensorsKVCacheMethod):
    """vLLM's own method, except that a missing scale is an error instead of 1.

    The checkpoint has no scales for layers that read the cache of another layer, nor for the draft of a multi-token
    prediction, which is built after the model itself.
    """

    def create_weights(self, layer: torch.nn.Module) -> None:
        super().create_weights(layer)
        shares_cache = getattr(layer, "kv_sharing_target_layer_name", None) is not None
        layer.ria_needs_scales = not shares_cache and not self.quant_config.model_built
        if layer.ria_needs_scales:
            for part in ("k_scale", "v_scale"):
                getattr(layer, part).data.fill_(torch.nan)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        dummy_weights = EngineOptions.current().dummy_weights
        for part in ("k_scale", "v_scale"):
            scale = getattr(layer, part)
            if dummy_weights:
                scale.data.fill_(1)
            elif layer.ria_needs_scales and not bool(((scale > 0) & scale.isfinite()).all()):
                fault = "is in none of the weight files" if scale.isnan().all() else f"is {scale.squeeze().tolist()}"
                raise RiaError(
                    f"{layer.layer_name}.{part} {fault}, but config.json has a kv_cache_scheme. Get the model again, "
                    "or remove that key from config.json to serve with a cache in the model's dtype."
                )
        super().process_weights_after_loading(layer)
