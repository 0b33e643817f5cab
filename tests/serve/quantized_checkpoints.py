"""Quantized dense checkpoints, as compressed-tensors itself writes them: W8A8 and W4A16, rounded to nearest."""

from pathlib import Path

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel


def write(source: Path, out: Path, scheme: str, group_size: int | None = None) -> PreTrainedModel:
    """Write a quantized copy of the dense folder `source`; returns the model with the rounded weights, in float32.

    Args:
        scheme: "W8A8" (activations are rounded too, per token, when served) or "W4A16".
        group_size: columns per scale, instead of the scheme's.
    """
    settings = preset_name_to_scheme(scheme, targets=["Linear"])
    if group_size is not None:
        settings.weights.group_size = group_size
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    rounded = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    config = QuantizationConfig(config_groups={"group_0": settings}, ignore=["lm_head"])
    apply_quantization_config(model, config)
    for name, module in model.named_modules():
        if hasattr(module, "weight_scale"):
            rows, columns = module.weight.shape
            groups = module.weight.data.view(rows, -1, settings.weights.group_size or columns)
            scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), settings.weights)
            module.weight_scale.data = scale.to(module.weight_scale.dtype)
            largest = 2 ** (settings.weights.num_bits - 1) - 1
            scale = module.weight_scale.data.float()[..., None]
            whole = (groups.float() / scale).round().clamp(-largest - 1, largest) * scale
            rounded.get_submodule(name).weight.data = whole.view(rows, columns)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(out)
    compressor.update_config(str(out))
    AutoTokenizer.from_pretrained(source).save_pretrained(out)
    return rounded
