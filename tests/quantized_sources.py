"""Tiny models as they are published quantized only, each with its plain twin.

Quantized by hand, and made plain by formulas in float64 or by transformers: nothing here uses ours.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)
Parts = dict[str, torch.Tensor]


def to_mxfp4(weight: torch.Tensor) -> Parts:
    """[experts, in, out] -> blocks uint8 [experts, out, in/32, 16] and scales uint8 [experts, out, in/32]."""
    groups = weight.double().transpose(1, 2).unflatten(-1, (-1, 32))
    exponents = groups.abs().amax(-1).clamp(min=1e-30).log2().floor() - 2
    scaled = groups / exponents[..., None].exp2()
    codes = (scaled.abs()[..., None] - E2M1).abs().argmin(-1) + 8 * (scaled < 0)
    return {
        "_blocks": (codes[..., 0::2] + 16 * codes[..., 1::2]).to(torch.uint8),
        "_scales": (exponents + 127).to(torch.uint8),
    }


def from_mxfp4(parts: Parts) -> torch.Tensor:
    """By transformers: bfloat16 [experts, in, out]."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    return convert_moe_packed_tensors(parts["_blocks"], parts["_scales"], dtype=torch.bfloat16)


def grid_of(scales: torch.Tensor, block: tuple[int, int], shape: tuple[int, ...]) -> torch.Tensor:
    """The scale of each weight, [out, in] in float64."""
    rows, columns = (torch.arange(size) // length for size, length in zip(shape, block, strict=True))
    return scales.double()[rows][:, columns]


def to_fp8(weight: torch.Tensor, block: tuple[int, int] = (128, 128), suffix: str = "_scale_inv") -> Parts:
    """[out, in] -> float8_e4m3fn [out, in] and a float32 scale for each block."""
    strips = [strip.split(block[1], 1) for strip in weight.float().split(block[0])]
    scales = torch.stack([torch.stack([part.abs().max() / 448 for part in strip]) for strip in strips])
    values = weight.double() / grid_of(scales, block, tuple(weight.shape))
    return {"": values.to(torch.float8_e4m3fn), suffix: scales}


def from_fp8(parts: Parts, block: tuple[int, int] = (128, 128), suffix: str = "_scale_inv") -> torch.Tensor:
    """Multiplied in float64, where the product is exact, then rounded to float32 and to bfloat16."""
    values = parts[""].double() * grid_of(parts[suffix], block, tuple(parts[""].shape))
    return values.float().bfloat16()


def save_pair(
    dense: Path,
    is_quantized: Callable[[str, torch.Tensor], bool],
    there: Callable[[torch.Tensor], Parts],
    back: Callable[[Parts], torch.Tensor],
    words: dict[str, Any],
    **config: Any,
) -> tuple[Path, Path]:
    """(the quantized folder, its twin) beside `dense`, a bfloat16 model. Scales lie in another file than values.

    Args:
        words: config.json's `quantization_config`.
        config: what else of config.json differs from `dense`, in both; None: is not there.
    """
    quantized, plain = dense.with_name("quantized"), dense.with_name("plain")
    twin, values, scales = load_file(dense / "model.safetensors"), {}, {}
    for name, tensor in list(twin.items()):
        if is_quantized(name, tensor):
            parts = {suffix: part.contiguous() for suffix, part in there(tensor).items()}
            twin[name] = back(parts)
            for suffix, part in parts.items():
                (scales if "scale" in suffix else values)[name + suffix] = part
        else:
            values[name] = tensor
    assert scales
    for folder, more in ((quantized, {"quantization_config": words}), (plain, {})):
        shutil.copytree(dense, folder)
        content = json.loads((folder / "config.json").read_text()) | config | more
        content = {key: value for key, value in content.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(content))
    save_file(twin, plain / "model.safetensors", metadata={"format": "pt"})
    (quantized / "model.safetensors").unlink()
    index = {}
    for number, tensors in enumerate((values, scales), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file(tensors, quantized / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    (quantized / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return quantized, plain


def mxfp4_pair(dense: Path) -> tuple[Path, Path]:
    """A gpt-oss as on the hub, where config.json names no dtype."""
    words = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    stacked = ("experts.gate_up_proj", "experts.down_proj")
    return save_pair(
        dense, lambda name, _: name.endswith(stacked), to_mxfp4, from_mxfp4, words, dtype=None, torch_dtype=None
    )


def fp8_pair(dense: Path, block: tuple[int, int] = (128, 128)) -> tuple[Path, Path]:
    """All linears of the layers but routers, as in DeepSeek-V3."""
    words = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [*block]}

    def is_linear(name: str, tensor: torch.Tensor) -> bool:
        return ".layers." in name and tensor.dim() == 2 and not name.endswith("mlp.gate.weight")

    return save_pair(dense, is_linear, lambda w: to_fp8(w, block), lambda parts: from_fp8(parts, block), words)
