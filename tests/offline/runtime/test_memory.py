"""Peak memory, with a model twice as large as the limit."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peak_memory import peak_memory
from safetensors.torch import save_file

from ria_vllm.offline.runtime import memory

SAMPLES = 6


@dataclass(frozen=True)
class Shape:
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    layers: int  # enough for twice the limit

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        kv = self.hidden // self.heads * self.kv_heads
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }

    @property
    def seq_len(self) -> int:
        """One chunk of so many tokens of each sample is for this width what one of 2048 tokens is for a 7B model's."""
        return self.hidden // 12

    @property
    def layer_bytes(self) -> int:
        return 2 * sum(rows * columns for rows, columns in self.linears.values())


# The limit for everything but the embedding and the activations, in layers of a bf16 model. Training in bfloat16 takes
# 6.3 to 6.6; with AMX, what oneDNN rounds to bfloat16 for the products of the statistics is 0.15 of it.
LAYERS_IN_MEMORY = {"bfloat16": 6.75, "float32": 8.5}
# In the proportions of Llama-2-7B, except for its vocabulary, and of Qwen2.5-7B. Training finds its limit in a model
# that is not too small, because some of what it takes does not grow with the model.
WIDE, LLAMA = Shape(1536, 4096, 16, 16, 258, 14), Shape(1152, 3072, 12, 12, 258, 14)
QWEN = Shape(1024, 5376, 16, 2, 42768, 14)


def save_large(folder: Path, small: Path, shape: Shape) -> None:
    """Random weights, the same in every layer, in one shard per layer: this process never holds the whole model."""
    folder.mkdir()
    for file in small.iterdir():
        if file.suffix == ".json" and file.name != "config.json":
            (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((small / "config.json").read_text())
    config |= {"hidden_size": shape.hidden, "intermediate_size": shape.intermediate, "num_hidden_layers": shape.layers}
    config |= {"vocab_size": shape.vocabulary}
    config |= {"num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads}
    config |= {"head_dim": shape.hidden // shape.heads, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    layer = {name: torch.randn(size).mul_(0.02).bfloat16() for name, size in shape.linears.items()}
    weight_map = {}
    for index in range(shape.layers):
        prefix = f"model.layers.{index}."
        tensors = {f"{prefix}{name}.weight": weight for name, weight in layer.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{norm}.weight"] = torch.ones(shape.hidden, dtype=torch.bfloat16)
        if index == 0:
            for name in ("model.embed_tokens.weight", "lm_head.weight"):
                tensors[name] = torch.randn(shape.vocabulary, shape.hidden).bfloat16()
            tensors["model.norm.weight"] = torch.ones(shape.hidden, dtype=torch.bfloat16)
        save_file(tensors, folder / f"{index}.safetensors")
        weight_map |= dict.fromkeys(tensors, f"{index}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture(scope="module")
def small(make_model, tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("small") / "model", "llama", dtype=torch.bfloat16, num_hidden_layers=2)


@pytest.fixture(scope="module")
def large(small, tmp_path_factory) -> Callable[[Shape], Path]:
    """Shape -> folder. Do not write into it."""
    made: dict[Shape, Path] = {}

    def get(shape: Shape) -> Path:
        if shape not in made:
            made[shape] = tmp_path_factory.mktemp("large") / "model"
            save_large(made[shape], small, shape)
        return made[shape]

    return get


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
@pytest.mark.parametrize(
    ("shape", "reconstruct", "pruned", "compute_dtype"),
    [
        (LLAMA, "admm", "1|12", "bfloat16"),
        (WIDE, "block, int8", "1", "bfloat16"),
        (QWEN, "short", "1", "float32"),
    ],
    ids=["admm", "block, int8", "wide MLP, float32"],
)
def test_peak_memory_is_bounded_by_one_layer(small, large, text, tmp_path, shape, reconstruct, pruned, compute_dtype):
    reconstruct, _, weights = reconstruct.partition(", ")
    peak = peak_memory(
        small, large(shape), tmp_path / "out", calibration=str(text), samples=SAMPLES, seq_len=shape.seq_len,
        ignore=(rf"layers[.](?!({pruned})[.])",), reconstruct=reconstruct, compute_dtype=compute_dtype,
        weights=weights or "float",
    )  # fmt: skip
    activations = 2 * 2 * SAMPLES * shape.seq_len * shape.hidden  # for the pruned and for the dense model
    layers, embedding = LAYERS_IN_MEMORY[compute_dtype], 2 * shape.vocabulary * shape.hidden
    limit = layers * shape.layer_bytes + activations + embedding * (2 if compute_dtype == "float32" else 1)
    print(f"peak {peak / shape.layer_bytes:.2f} layers of {limit / shape.layer_bytes:.2f}")
    whole = shape.layers * shape.layer_bytes * (2 if compute_dtype == "float32" else 1)
    assert whole > 2 * limit  # the whole model, in the dtype it is computed in
    assert peak < limit


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_blocks_are_kept_while_asked_for_and_returned_then():
    """In a process of its own, because the C library's settings hold for a whole one."""
    program = """
import resource
import torch
from ria_vllm.offline.runtime import memory

def pages():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

def loop():
    before = pages()
    for _ in range(20):
        torch.ones(4 << 20)  # 16 MB
    return (pages() - before) * resource.getpagesize() / (20 * 16 * 2**20)

memory.map_large_blocks()
loop()
before = resident()
with memory.blocks_kept():
    kept = loop()
print(kept, loop(), (resident() - before) / 2**20)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    kept, after, grown = map(float, done.stdout.split())
    assert kept < 0.1 and after > 0.5 and grown < 8


def test_free_memory_in_a_container_is_what_its_limits_leave(monkeypatch):
    files = {"/proc/meminfo": "MemTotal: 900 kB\nMemFree: 100 kB\nMemAvailable: 500 kB\n"}
    monkeypatch.setattr(memory, "_content", lambda path: files.get(str(path), ""))
    assert memory.available(torch.device("cpu")) == 500 * 1024
    files["/proc/self/cgroup"] = "0::/user.slice/job\n"
    for folder, limit, used in (("user.slice/job", "max", 7), ("user.slice", "3000", 1000), ("", "9000", 0)):
        group = Path("/sys/fs/cgroup") / folder
        files |= {str(group / "memory.max"): f"{limit}\n", str(group / "memory.current"): f"{used}\n"}
    assert memory.available(torch.device("cpu")) == 2000
    files["/sys/fs/cgroup/user.slice/memory.current"] = "4000\n"
    assert memory.available(torch.device("cpu")) == 0
    stat = "anon 2500\nfile 1600\nshmem 100\ninactive_anon 9\ninactive_file 1000\nactive_file 500\n"
    files["/sys/fs/cgroup/user.slice/memory.stat"] = stat  # what was read from files can be given up
    assert memory.available(torch.device("cpu")) == 500
    files.clear()
    assert memory.available(torch.device("cpu")) is None
