"""Quantized dense checkpoints, as compressed-tensors itself writes them: W8A8, rounded to nearest."""

from pathlib import Path

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel


def write(source: Path, out: Path) -> PreTrainedModel:
    """Write a quantized copy of the dense folder `source`; returns the model with the rounded weights, in float32.

    Activations are rounded too, per token, when it is served.
    """
    settings = preset_name_to_scheme("W8A8", targets=["Linear"])
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    rounded = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    config = QuantizationConfig(config_groups={"group_0": settings}, ignore=["lm_head"])
    apply_quantization_config(model, config)
    for name, module in model.named_modules():
        if hasattr(module, "weight_scale"):
            rows = module.weight.data
            scale, _ = calculate_qparams(rows.amin(-1, True), rows.amax(-1, True), settings.weights)
            module.weight_scale.data = scale.to(module.weight_scale.dtype)
            scale = module.weight_scale.data.float()
            rounded.get_submodule(name).weight.data = (rows.float() / scale).round().clamp(-128, 127) * scale
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(out)
    compressor.update_config(str(out))
    AutoTokenizer.from_pretrained(source).save_pretrained(out)
    return rounded
