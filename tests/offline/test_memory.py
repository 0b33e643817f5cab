"""A model several times larger than what may be used at once."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

HIDDEN, INTERMEDIATE, LAYERS = 1536, 4096, 24
LAYER_BYTES = 2 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INTERMEDIATE)

# The peak is taken over what the process held after a small model: libraries, their tables and thread buffers.
PROBE = """
import sys, threading, time
from pathlib import Path
from ria_vllm.offline.compress import Settings, compress
from ria_vllm.offline.progress import Monitor
from ria_vllm.offline.recipe import Recipe

small, large, out, text = sys.argv[1:]
recipe = Recipe(calibration=text, samples=16, seq_len=128, ignore=(r"layers[.](?!1[.]|20[.])",))
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


def save_large(folder: Path, small: Path) -> None:
    """Random weights, one shard a layer, never whole in this process either."""
    folder.mkdir()
    for file in small.iterdir():
        if file.suffix == ".json" and file.name != "config.json":
            (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((small / "config.json").read_text())
    config |= {"hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": LAYERS, "dtype": "bfloat16"}
    config |= {"num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": HIDDEN // 16}
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {f"self_attn.{x}_proj": (HIDDEN, HIDDEN) for x in "qkvo"}
    shapes |= {f"mlp.{x}_proj": (INTERMEDIATE, HIDDEN) for x in ("gate", "up")} | {"mlp.down_proj": (HIDDEN, INTERMEDIATE)}
    weight_map = {}
    for index in range(LAYERS):
        prefix = f"model.layers.{index}."
        tensors = {f"{prefix}{name}.weight": torch.randn(shape).mul_(0.02).bfloat16() for name, shape in shapes.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{norm}.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
        if index == 0:
            tensors |= {name: torch.randn(258, HIDDEN).bfloat16() for name in ("model.embed_tokens.weight", "lm_head.weight")}
            tensors["model.norm.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
        save_file(tensors, folder / f"{index}.safetensors")
        weight_map |= dict.fromkeys(tensors, f"{index}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_peak_memory_is_bounded_by_one_layer(make_model, text, tmp_path):
    small = make_model(tmp_path / "small", "llama", dtype=torch.bfloat16, num_hidden_layers=2)
    save_large(tmp_path / "large", small)
    arguments = [str(small), str(tmp_path / "large"), str(tmp_path / "out"), str(text)]
    done = subprocess.run([sys.executable, "-c", PROBE, *arguments], check=True, capture_output=True, text=True)
    activations, embeddings = 2 * 2 * 16 * 128 * HIDDEN, 2 * 258 * HIDDEN  # of the pruned and of the dense model
    limit = 6 * LAYER_BYTES + activations + embeddings
    assert LAYERS * LAYER_BYTES > 3 * limit  # the whole model would not fit three times over
    print(f"peak {int(done.stdout) / LAYER_BYTES:.2f} layers")
    assert int(done.stdout) < limit
