"""Small checkpoints as compressed-tensors 0.12 wrote them: 2:4, packed or plain, floating point or quantized."""

import json
from pathlib import Path

import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from ria_vllm.format import sparse24

DTYPES = {"int": (torch.int8, 127), "float": (torch.float8_e4m3fn, 448)}


def quantize(values: torch.Tensor, kind: str, strategy: str) -> tuple[torch.Tensor, torch.Tensor]:
    dtype, largest = DTYPES[kind]
    scale = (values.abs().amax(1, keepdim=True) if strategy == "channel" else values.abs().amax()[None]) / largest
    values = values / scale
    return (values.round() if kind == "int" else values).to(dtype), scale


def write(
    out: Path, sparse_format: str, kind: str | None = None, strategy: str = "channel", static: bool = False,
    spoiled: str = "", rounded: bool = False,
) -> PreTrainedModel:  # fmt: skip
    """Write a checkpoint at `out`; returns the model that it stands for, in float32.

    Args:
        sparse_format: "sparse-24-bitmask" or "dense".
        kind: "int" or "float" for 8-bit weights, None for plain ones.
        static: the config has static activation scales; otherwise dynamic, per token.
        rounded: inputs of int8 layers are rounded to int8, too; those of fp8 layers always are, in the config.
        spoiled: ending of a linear that is not 2:4. The dense format claims that it is, the packed one ignores it.
    """
    model = tiny.write(tiny.FAMILIES["llama-gqa"], out, permuted=False)
    path = out / "model.safetensors"
    tensors = load_file(path)
    modules = dict(model.named_modules())
    for name in [n.removesuffix(".compressed") for n in tensors if n.endswith(".compressed")]:
        packed = {part: tensors.pop(f"{name}.{part}") for part in ("compressed", "bitmask", "shape")}
        values = packed["compressed"]
        if spoiled and name.endswith(spoiled):
            modules[name].weight.data += 0.01
            values = modules[name].weight.data.clone()
            if kind is not None:
                values, scale = quantize(values, kind, strategy)
                tensors[f"{name}.weight_scale"] = scale
                modules[name].weight.data = values.float() * scale
            tensors[f"{name}.weight"] = values
            continue
        if kind is not None:
            values, scale = quantize(values, kind, strategy)
            tensors[f"{name}.weight_scale"] = scale
            if static:
                tensors[f"{name}.input_scale"] = torch.tensor([0.1])
            modules[name].weight.data = sparse24.decompress(values.float() * scale, packed["bitmask"])
        if sparse_format == "dense":
            plain = sparse24.decompress(values.float(), packed["bitmask"])
            tensors[f"{name}.weight"] = plain.to(values.dtype)
        else:
            tensors |= {f"{name}.{part}": tensor for part, tensor in (packed | {"compressed": values}).items()}
    save_file(tensors, path)
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": {None: "dense", "int": "int-quantized", "float": "float-quantized"}[kind],
        "ignore": ["lm_head"],
        "sparsity_config": {
            "format": sparse_format, "sparsity_structure": "2:4", "global_sparsity": 0.5, "targets": ["Linear"],
            "ignore": ["lm_head", *([f"re:.*{spoiled}"] if spoiled and sparse_format != "dense" else [])],
        },
        "config_groups": {} if kind is None else {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 8, "type": kind, "strategy": strategy, "symmetric": True, "dynamic": False},
                "input_activations": None if kind == "int" and not rounded else {
                    "num_bits": 8, "type": kind, "symmetric": True, "dynamic": not static,
                    "strategy": "tensor" if static else "token",
                },
            }
        },
    }  # fmt: skip
    (out / "config.json").write_text(json.dumps(config))
    return model
