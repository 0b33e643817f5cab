"""Small models whose linears compressed-tensors 0.12 itself stored."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny
import torch
from compressed_tensors_writer import Writer, random_24, scales_of
from safetensors.torch import save_file
from transformers import PreTrainedModel

# Rows in multiples of 64; half of any linear's columns are whole groups of 128.
SIZES = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 512}
IGNORED = ("lm_head", "re:.*lm_head")


def arguments(bits: int, size: int | None = None, kind: str = "int", strategy: str = "channel") -> dict[str, Any]:
    """What QuantizationArgs takes, for weights. `size`: of groups."""
    how = {"strategy": strategy} if size is None else {"strategy": "group", "group_size": size}
    return {"num_bits": bits, "type": kind, "symmetric": True} | how


@dataclass(frozen=True)
class Packed:
    """How a checkpoint is written.

    Attributes:
        form: `format` in config.json.
        weights: what QuantizationArgs takes; None: they are not quantized.
        inputs: the same for activations; None: they are not rounded.
        dtype: of the dense weights and of their scales.
        spoiled: ending of a linear that is not 2:4.
        spoiled_row: the only row of it that is not; None: none is.
        sparsity: config.json's `sparsity_config`.
        ignored: config.json's `ignore`.
    """

    form: str
    weights: dict[str, Any] | None
    inputs: dict[str, Any] | None = None
    dtype: torch.dtype = torch.bfloat16
    spoiled: str = "\0"
    spoiled_row: int | None = None
    sparsity: dict[str, Any] | None = None
    ignored: tuple[str, ...] = IGNORED

    def add(self, writer: Writer, name: str, shape: torch.Size, seed: int) -> None:
        """Have a random linear stored under this name, whose weights have about the size of 1/sqrt(in)."""
        weight = random_24(*shape, seed=seed, dtype=torch.float32)
        if name.endswith(self.spoiled):
            weight[slice(None) if self.spoiled_row is None else self.spoiled_row] += 0.1
        weight = (weight / weight.shape[1] ** 0.5).to(self.dtype)
        scale = None if self.weights is None else scales_of(weight, self.weights)
        sparse = (self.sparsity or {}).get("format") == "sparse-24-bitmask"
        writer.add(name, self.form, self.weights, weight, scale, sparse)


def write(folders: dict[Path, Packed]) -> list[PreTrainedModel]:
    """Write a checkpoint at each folder; returns the models that they stand for, in float32."""
    writer = Writer()
    models = [tiny.model_of(tiny.FAMILIES["llama-gqa"], **SIZES) for _ in folders]
    for number, (how, model) in enumerate(zip(folders.values(), models)):
        for seed, (name, module) in enumerate(tiny.linears(model).items()):
            how.add(writer, f"{number}/{name}", module.weight.shape, seed)
    stored = writer.run(next(iter(folders)).parent / "written")
    for number, ((out, how), model) in enumerate(zip(folders.items(), models)):
        model.save_pretrained(out)
        mine = {name.partition("/")[2]: tensor for name, tensor in stored.items() if name.startswith(f"{number}/")}
        for name, module in tiny.linears(model).items():
            module.weight.data = mine.pop(f"{name}.exact")
            del mine[f"{name}.dense"]
        others = {
            name: tensor for name, tensor in model.state_dict().items()
            if name.removesuffix(".weight") not in tiny.linears(model)
        }  # fmt: skip
        save_file(others | mine, out / "model.safetensors")
        config = json.loads((out / "config.json").read_text())
        config["quantization_config"] = quantization_config(how)
        (out / "config.json").write_text(json.dumps(config))
    return models


def quantization_config(how: Packed) -> dict[str, Any]:
    """As llm-compressor wrote it with compressed-tensors 0.12."""
    unused = {"actorder": None, "block_structure": None, "observer": "minmax", "observer_kwargs": {}}
    weights = unused | {"dynamic": False, "group_size": None} | (how.weights or {})
    return {
        "quant_method": "compressed-tensors",
        "format": how.form,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "ignore": list(how.ignored),
        "kv_cache_scheme": None,
        "config_groups": {} if how.weights is None else {
            "group_0": {
                "targets": ["Linear"], "weights": weights, "input_activations": how.inputs,
                "output_activations": None, "format": how.form,
            },
        },
        "sparsity_config": how.sparsity or {},
        "transform_config": {},
        "version": "0.12.2",
    }  # fmt: skip
