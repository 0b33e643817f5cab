"""Peak memory: layers whose experts take twice the limit in float32 are compressed under it."""

import json
from pathlib import Path

import pytest
import torch
from moe import save_moe
from peak_memory import peak_memory
from safetensors.torch import save_file

EXPERTS, WIDTH, INNER = 176, 512, 256
SAMPLES, SEQ_LEN = 8, 128
LINEARS = {"gate_proj": (INNER, WIDTH), "up_proj": (INNER, WIDTH), "down_proj": (WIDTH, INNER)}
LAYER_BYTES = 2 * EXPERTS * 3 * WIDTH * INNER


def save_large(folder: Path, small: Path, layers: int) -> Path:
    """Random weights, in one shard per layer: this process never holds the whole model."""
    folder.mkdir()
    for file in small.iterdir():
        if file.suffix == ".json":
            (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((small / "config.json").read_text())
    config |= {"hidden_size": WIDTH, "moe_intermediate_size": INNER, "num_hidden_layers": layers}
    config |= {name: EXPERTS for name in ("num_experts", "num_local_experts", "n_routed_experts") if name in config}
    config |= {"dtype": "bfloat16", "head_dim": 64}
    if "layer_types" in config:
        config["layer_types"] = ["full_attention"] * layers
    (folder / "config.json").write_text(json.dumps(config))
    heads = {"q_proj": 256, "k_proj": 128, "v_proj": 128}
    weight_map = {}
    for index in range(layers):
        prefix = f"model.layers.{index}."
        tensors = {f"{prefix}self_attn.{name}.weight": random(rows, WIDTH) for name, rows in heads.items()}
        tensors[f"{prefix}self_attn.o_proj.weight"] = random(WIDTH, 256)
        for norm, size in (("input_layernorm", WIDTH), ("post_attention_layernorm", WIDTH), ("self_attn.q_norm", 64),
                           ("self_attn.k_norm", 64)):  # fmt: skip
            tensors[f"{prefix}{norm}.weight"] = torch.ones(size, dtype=torch.bfloat16)
        tensors[f"{prefix}mlp.gate.weight"] = random(EXPERTS, WIDTH)
        for expert in range(EXPERTS):
            for name, shape in LINEARS.items():
                tensors[f"{prefix}mlp.experts.{expert}.{name}.weight"] = random(*shape)
        if index == 0:
            tensors |= {name: random(258, WIDTH) for name in ("model.embed_tokens.weight", "lm_head.weight")}
            tensors["model.norm.weight"] = torch.ones(WIDTH, dtype=torch.bfloat16)
        save_file(tensors, folder / f"{index}.safetensors")
        weight_map |= dict.fromkeys(tensors, f"{index}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape).mul_(0.05).bfloat16()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
@pytest.mark.parametrize(
    ("reconstruct", "compute_dtype", "layers"),
    [("admm", "bfloat16", 2), ("block", "float32", 1)],
)
def test_peak_memory_is_less_than_one_layers_experts(reconstruct, compute_dtype, layers, text, tmp_path):
    """As they are stored, in bfloat16. The one with two layers also shows that nothing of the first one stays."""
    small = save_moe(tmp_path / "small", "qwen3_moe", torch.bfloat16)
    large = save_large(tmp_path / "large", small, layers)
    peak = peak_memory(
        small, large, tmp_path / "out", calibration=str(text), samples=SAMPLES, seq_len=SEQ_LEN,
        reconstruct=reconstruct, permute="lsa", compute_dtype=compute_dtype,
    )  # fmt: skip
    print(f"peak {peak / LAYER_BYTES:.2f} layers of {LAYER_BYTES / 1e6:.0f} MB, as they are stored")
    assert peak < LAYER_BYTES
