"""A tiny Llama, pruned and stored by hand with the writer and plain torch, without the offline stage."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from damage import Damage
from families import save_tokenizer

# The hooks for runs in several processes.
from processes import pytest_collection_modifyitems, pytest_configure, pytest_xdist_auto_num_workers  # noqa: F401
from safetensors.torch import load_file

from ria_vllm.checkpoint.writer import CheckpointWriter
from ria_vllm.format import sparse24
from ria_vllm.format.permutation import invert

# TRL, once it is imported, would set it to ERROR for all tests after it.
os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO")

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, LAYERS = 128, 192, 4, 2, 2
HEAD_DIM = HIDDEN // HEADS


def pytest_runtest_setup() -> None:
    """A test that leaves torch without gradients spoils no other."""
    torch.set_grad_enabled(True)


@dataclass(frozen=True)
class PrunedLlama:
    """folder: the compressed model. source: its dense model. dense: what every tensor must be after export."""

    folder: Path
    source: Path
    dense: dict[str, torch.Tensor]
    permutations: dict[str, torch.Tensor]


def save_tiny_llama(folder: Path, seed: int = 0) -> None:
    """A random bf16 Llama with grouped-query attention and a byte-level tokenizer, as a Hugging Face folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=256,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    save_tokenizer(folder, chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}")


def head_permutation(generator: torch.Generator) -> torch.Tensor:
    """A permutation of o_proj's input that v_proj's rows can absorb: the same inside each kv head's query heads."""
    parts = []
    for head in range(HEADS):
        if head % (HEADS // KV_HEADS) == 0:
            inner = torch.randperm(HEAD_DIM, generator=generator)
        parts.append(head * HEAD_DIM + inner)
    return torch.cat(parts)


def prune_llama(source: Path, out: Path) -> PrunedLlama:
    """Magnitude 2:4 under random permutations: q, k, v share one (gathered), gate and up have none, o and down fold."""
    generator = torch.Generator().manual_seed(1)
    tensors = load_file(source / "model.safetensors")
    writer = CheckpointWriter(out)
    dense, permutations = dict(tensors), {}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        shared = torch.randperm(HIDDEN, generator=generator)
        of_layer = {f"self_attn.{x}_proj": shared for x in "qkv"}
        of_layer["self_attn.o_proj"] = head_permutation(generator)
        of_layer["mlp.down_proj"] = torch.randperm(INTERMEDIATE, generator=generator)
        unit = {}
        for name in [*of_layer, "mlp.gate_proj", "mlp.up_proj"]:
            weight = tensors.pop(f"{prefix}{name}.weight")
            p = of_layer.get(name, torch.arange(weight.shape[1]))
            compressed, bitmask = sparse24.compress(weight[:, p])
            unit[f"{prefix}{name}.compressed"], unit[f"{prefix}{name}.bitmask"] = compressed, bitmask
            unit[f"{prefix}{name}.shape"] = torch.tensor(weight.shape, dtype=torch.int64).view(2, 1)
            if name in of_layer:
                unit[f"{prefix}{name}.input_permutation"] = p.to(torch.int32)
                permutations[prefix + name] = p
            # The oracle, by definition: of each four permuted columns, the two largest survive.
            groups = weight[:, p].reshape(-1, 4)
            rank = groups.abs().float().argsort(dim=1, descending=True, stable=True).argsort(1)
            kept = torch.where(rank < 2, groups, 0).reshape(weight.shape)
            dense[f"{prefix}{name}.weight"] = kept[:, invert(p)]
        unit |= {name: tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}
        writer.write(f"layer{layer}", unit)
    writer.write("rest", tensors)
    config = json.loads((source / "config.json").read_text())
    attention, mlp = "model.layers.{i}.self_attn.", "model.layers.{i}.mlp."
    config["quantization_config"] = {
        "quant_method": "ria",
        "format": "sparse-24-bitmask",
        "format_version": 1,
        "sparsity_config": {
            "format": "sparse-24-bitmask",
            "sparsity_structure": "2:4",
            "targets": ["Linear"],
            "ignore": ["lm_head"],
            "global_sparsity": 0.5,
        },
        "folds": [
            {
                "consumer": attention + "o_proj",
                "producers": [{"name": attention + "v_proj"}],
                "coupling": "heads",
                "num_heads": HEADS,
                "num_kv_heads": KV_HEADS,
            },
            {
                "consumer": mlp + "down_proj",
                "producers": [{"name": mlp + "gate_proj"}, {"name": mlp + "up_proj"}],
                "coupling": "elementwise",
            },
        ],
        "recipe": {"method": "magnitude", "permute": "lsa", "seed": 1},
    }
    copies = {p.name: p for p in source.iterdir() if p.suffix in (".json", ".jinja") and p.name != "config.json"}
    keys = ["rest", *(f"layer{i}" for i in range(LAYERS))]
    writer.finish(keys, {"config.json": config}, copies, max_shard_size=200_000)
    return PrunedLlama(out, source, dense, permutations)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense random Llama folder. Do not write into it."""
    folder = tmp_path_factory.mktemp("dense") / "llama"
    save_tiny_llama(folder)
    return folder


@pytest.fixture(scope="session")
def pruned_llama(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> PrunedLlama:
    """The same model, pruned, in several shards. Do not write into it."""
    return prune_llama(tiny_llama, tmp_path_factory.mktemp("pruned") / "llama-2of4")


@pytest.fixture
def damage(pruned_llama: PrunedLlama, tmp_path: Path) -> Damage:
    folder = tmp_path / "damaged"
    shutil.copytree(pruned_llama.folder, folder)
    return Damage(folder)
