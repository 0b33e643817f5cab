"""Peak memory: a model whose experts are several times larger than the limit is compressed under it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from moe import save_moe
from safetensors.torch import save_file

LAYERS, EXPERTS, WIDTH, INNER = 2, 160, 512, 256
SAMPLES, SEQ_LEN = 8, 128
LINEARS = {"gate_proj": (INNER, WIDTH), "up_proj": (INNER, WIDTH), "down_proj": (WIDTH, INNER)}
LAYER_BYTES = 2 * EXPERTS * 3 * WIDTH * INNER

# The peak is measured above what the process holds after a small model: libraries, their tables and thread buffers.
PROBE = """
import sys, threading, time
from pathlib import Path
from ria_vllm.offline.compress import Settings, compress
from ria_vllm.progress import Monitor
from ria_vllm.offline.recipe import Recipe

small, large, out, text, reconstruct, permute, compute_dtype, samples, seq_len = sys.argv[1:]
recipe = Recipe(
    calibration=text, samples=int(samples), seq_len=int(seq_len), reconstruct=reconstruct, permute=permute,
    compute_dtype=compute_dtype,
)
held = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * 4096
compress(small, Path(out + "-small"), recipe, Settings(), Monitor(shown=False))
base, peak = held(), [0]

def watch():
    while True:
        peak[0] = max(peak[0], held())
        time.sleep(0.002)

threading.Thread(target=watch, daemon=True).start()
compress(large, Path(out), recipe, Settings(), Monitor(shown=False))
print(peak[0] - base, flush=True)
import os; os._exit(0)
"""


def save_large(folder: Path, small: Path) -> Path:
    """Random weights, in one shard per layer: this process never holds the whole model."""
    folder.mkdir()
    for file in small.iterdir():
        if file.suffix == ".json":
            (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((small / "config.json").read_text())
    config |= {"hidden_size": WIDTH, "moe_intermediate_size": INNER, "num_hidden_layers": LAYERS}
    config |= {name: EXPERTS for name in ("num_experts", "num_local_experts", "n_routed_experts") if name in config}
    config |= {"dtype": "bfloat16", "head_dim": 64}
    if "layer_types" in config:
        config["layer_types"] = ["full_attention"] * LAYERS
    (folder / "config.json").write_text(json.dumps(config))
    heads = {"q_proj": 256, "k_proj": 128, "v_proj": 128}
    weight_map = {}
    for index in range(LAYERS):
        prefix = f"model.layers.{index}."
        tensors = {f"{prefix}self_attn.{name}.weight": random(rows, WIDTH) for name, rows in heads.items()}
        tensors[f"{prefix}self_attn.o_proj.weight"] = random(WIDTH, 256)
        for norm, size in (("input_layernorm", WIDTH), ("post_attention_layernorm", WIDTH), ("self_attn.q_norm", 64),
                           ("self_attn.k_norm", 64)):  # fmt: skip
            tensors[f"{prefix}{norm}.weight"] = torch.ones(size, dtype=torch.bfloat16)
        tensors[f"{prefix}mlp.gate.weight"] = random(EXPERTS, WIDTH)
        for expert in range(EXPERTS):
            for name, shape in (
                ("gate_proj", (INNER, WIDTH)),
                ("up_proj", (INNER, WIDTH)),
                ("down_proj", (WIDTH, INNER)),
            ):
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
def test_peak_memory_is_less_than_one_layers_experts(text, tmp_path):
    small = save_moe(tmp_path / "small", "qwen3_moe", torch.bfloat16)
    large = save_large(tmp_path / "large", small)
    arguments = [str(small), str(large), str(tmp_path / "out"), str(text), "admm", "lsa", "bfloat16"]
    arguments += [str(SAMPLES), str(SEQ_LEN)]
    done = subprocess.run([sys.executable, "-c", PROBE, *arguments], check=True, capture_output=True, text=True)
    print(f"peak {int(done.stdout) / LAYER_BYTES:.2f} layers of {LAYER_BYTES / 1e6:.0f} MB, as they are stored")
    assert int(done.stdout) < LAYER_BYTES
