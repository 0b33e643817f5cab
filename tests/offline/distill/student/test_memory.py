"""How much memory training takes: bytes for each kept weight, gradients of one layer, no logits in float32."""

import json
import subprocess
import sys
from pathlib import Path

import torch

from ria_vllm.offline.recipe import Recipe
from ria_vllm.offline.run.compress import Settings, compress
from ria_vllm.progress import Monitor

# Prints how far the memory of one step rises above what the process holds before it.
PROBE = """
import json, sys, threading, time
from pathlib import Path
import torch
from ria_vllm.checkpoint.reader import Reader
from ria_vllm.offline.distill.divergence import divergence
from ria_vllm.offline.distill.student.student import Student
from ria_vllm.offline.model.run.hf import load_model
from ria_vllm.offline.runtime.memory import map_large_blocks, trim

map_large_blocks()
held = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * 4096
folder, length = sys.argv[1], int(sys.argv[2])
student = Student(Reader(Path(folder)), load_model(folder, torch.device("cpu"), "bfloat16"))
student.pace.lr, student.pace.number = 1e-4, 1
tokens = torch.randint(2, 250, (1, length))
wanted = torch.randn(length, 20_000, dtype=torch.bfloat16)
trim()
base, peak, over = held(), [0], threading.Event()

def watch():
    while not over.is_set():
        peak[0] = max(peak[0], held())
        time.sleep(0.001)

thread = threading.Thread(target=watch)
thread.start()
logits = student.logits(tokens)
slope = torch.empty_like(logits)
divergence(wanted, logits.detach(), slope)
logits.backward(slope.div_(length))
over.set()
thread.join()
kept = sum(t.values.numel() for t in student.trained.values())
state = sum(x.nbytes for t in student.trained.values() for x in t.state().values())
print(json.dumps({"peak": peak[0] - base, "kept": kept, "state": state}))
import os; sys.stdout.flush(); os._exit(0)
"""


def probe(folder: Path, length: int) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(folder), str(length)], check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout)


def test_a_step_holds_the_gradients_of_one_layer_and_no_logits_in_float32(make_model, text, tmp_path):
    """Six layers of 3.1 million weights each: all gradients in bfloat16 would be 38 MB, kept ones in float32 as much.
    The logits of 1024 tokens and 20,000 words are 41 MB in bfloat16, as is their gradient; a copy in float32 would be
    82 MB."""
    model = make_model(
        tmp_path / "in", "llama", dtype=torch.bfloat16, hidden_size=512, intermediate_size=1536, num_hidden_layers=6,
        num_attention_heads=8, num_key_value_heads=4, vocab_size=20_000, max_position_embeddings=2048,
    )  # fmt: skip
    recipe = Recipe(calibration=str(text), samples=1, seq_len=16, reconstruct="none", permute="none")
    compress(str(model), tmp_path / "out", recipe, Settings(), Monitor(shown=False))
    found = probe(tmp_path / "out", 1024)
    assert found["state"] == 10 * found["kept"]
    assert found["kept"] > 9e6
    # Logits and their gradient, a layer's activations and gradients; another copy of the logits is beyond the limit.
    assert found["peak"] < 250e6, found["peak"]
