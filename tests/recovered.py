"""A tiny model of the very layout of Sparse-Llama-3.1-8B-2of4: bfloat16 with zeros, in several shards."""

from pathlib import Path

import torch
from compressed_tensors_writer import random_24
from families import save_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

LLAMA_31 = {
    "hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}  # fmt: skip


def is_linear(name: str) -> bool:
    return name.endswith("_proj.weight")


def save_recovered(folder: Path) -> Path:
    """Some groups of its linears have fewer than two non-zeros; one row is all zeros."""
    save_model(folder, "llama", torch.bfloat16, **LLAMA_31)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    with torch.no_grad():
        for seed, (name, weight) in enumerate(model.named_parameters()):
            if is_linear(name):
                weight.mul_(random_24(*weight.shape, seed=seed) != 0)
        model.get_parameter("model.layers.1.mlp.down_proj.weight")[3] = 0
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="400KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, by name."""
    return {name: one for path in sorted(folder.glob("model*.safetensors")) for name, one in load_file(path).items()}
