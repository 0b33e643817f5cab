"""LoRA adapters in PEFT's format, and models with one merged."""

import copy
import json
from pathlib import Path

import tiny
import torch
from safetensors.torch import save_file

RANK = 8
Adapter = dict[str, tuple[torch.Tensor, torch.Tensor]]


def write_adapter(model: torch.nn.Module, folder: Path, ends: tuple[str, ...] = ("",)) -> Adapter:
    """Write an adapter of every linear whose name ends so; linear -> A [rank, in] and B [out, rank], scaled."""
    adapter, tensors = {}, {}
    torch.manual_seed(7)
    for name, linear in tiny.linears(model).items():
        if name.endswith(ends):
            a, b = torch.randn(RANK, linear.in_features) * 0.1, torch.randn(linear.out_features, RANK) * 0.1
            tensors |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
            adapter[name] = a, b
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    content = {
        "peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "bias": "none", "task_type": "CAUSAL_LM",
        "target_modules": sorted({name.rpartition(".")[2] for name in adapter}),
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return adapter


def merged(model: torch.nn.Module, adapter: Adapter) -> torch.nn.Module:
    """A copy of the model with B A added to its weights."""
    found = copy.deepcopy(model)
    for name, (a, b) in adapter.items():
        weight = found.get_submodule(name).weight
        weight.data = (weight.data.double() + b.double() @ a.double()).to(weight.dtype)
    return found
