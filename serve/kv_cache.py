"""An fp8 cache of keys and values, with the scales that a checkpoint of compressed-tensors brings for it."""

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.attention import Attention, MLAAttention
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsKVCacheMethod

from ria_vllm.errors import RiaError


def method_for(layer: torch.nn.Module, config: QuantizationConfig) -> QuantizeMethodBase | None:
    """What loads the scales of `layer`, where it is attention."""
    return KVCacheScales(config) if isinstance(layer, Attention | MLAAttention) else None


class KVCacheScales(CompressedTensorsKVCacheMethod):
    """vLLM's own, except that scales which do not come are an error, not 1.

    Layers that read another one's cache have no scales in the checkpoint, and neither has the draft of a multi-token
    prediction, which is built after the model itself.
    """

    def create_weights(self, layer: torch.nn.Module) -> None:
        super().create_weights(layer)
        layer.ria_needs_scales = (
            getattr(layer, "kv_sharing_target_layer_name", None) is None and not self.quant_config.settled
        )
        if layer.ria_needs_scales:
            for kind in ("k_scale", "v_scale"):
                getattr(layer, kind).data.fill_(torch.nan)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        current = get_current_vllm_config_or_none()
        made_up = current is not None and current.load_config.load_format == "dummy"
        for kind in ("k_scale", "v_scale"):
            scale = getattr(layer, kind)
            if made_up:
                scale.data.fill_(1)
            elif layer.ria_needs_scales and not bool(((scale > 0) & scale.isfinite()).all()):
                said = "is in none of the weight files" if scale.isnan().all() else f"is {scale.tolist()}"
                raise RiaError(
                    f"{layer.layer_name}.{kind} {said}, but config.json has a kv_cache_scheme. Get the model again, or "
                    "take that key out of config.json to serve with a cache in the model's dtype."
                )
        super().process_weights_after_loading(layer)
