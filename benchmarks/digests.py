"""Whether `compress` still writes the same bytes: `python -m benchmarks.digests OUT.json [BEFORE.json]`.

Compresses tiny random models in 30 ways, and keeps the SHA-256 of each file that comes out. With the digests of an
earlier checkout, it names the runs that differ. Only one machine with the same packages gives the same bytes.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.moe import save_tokenizer
from ria_vllm.offline.commands import compress
from ria_vllm.offline.digests import sha256

TEXT = Path(__file__).parents[1] / "demo" / "the-red-headed-league.txt"
BASE: dict[str, Any] = {
    "vocab_size": 258, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 128, "initializer_range": 0.1,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "num_experts": 4, "num_local_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 64,
}  # fmt: skip
HALF_WINDOW = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {}, "recovered": {"model_type": "llama", "hidden_size": 256}, "qwen2": {}, "qwen3": {"head_dim": 48},
    "gemma2": HALF_WINDOW, "gemma3_text": HALF_WINDOW, "opt": {"ffn_dim": 256}, "gpt_neox": {}, "qwen3_moe": {},
    "mixtral": {},
}  # fmt: skip
# A model, and its options, beside those of `main`.
RUNS = """\
llama --reconstruct none
llama --reconstruct none --method wanda --permute none
llama --reconstruct none --method magnitude --scheme W8A16
llama --reconstruct admm --scheme W4A16 --group-size 32
llama --reconstruct short
llama --reconstruct short --scheme W8A8 --seed 3
llama --reconstruct block --scheme W4A8 --rotate none
llama --reconstruct admm --scheme FP8 --rotate heads
llama --reconstruct admm --max-loss 20%
llama --reconstruct short --self-written 0.1
llama --reconstruct none --data self --samples 8
llama --reconstruct admm --compute-dtype bfloat16 --ignore down_proj
qwen2 --reconstruct admm --pattern 4:8 --scheme W8A8 --smooth 0
qwen2 --reconstruct short --pattern 8:16 --scheme W4A8
qwen3 --reconstruct block --pattern 8:16
qwen3 --reconstruct short --scheme W4A16
qwen3 --reconstruct short --scheme W8A8 --max-loss 10%
gemma2 --reconstruct short --scheme W8A16
gemma2 --reconstruct admm --pattern 4:8 --permute none
gemma3_text --reconstruct block --scheme W8A8 --smooth 0.7
gemma3_text --reconstruct none --scheme FP8
opt --reconstruct admm --scheme W8A8
gpt_neox --reconstruct short --rotate none
qwen3_moe --reconstruct admm --scheme W8A8
qwen3_moe --reconstruct short --scheme W4A8
qwen3_moe --reconstruct block --scheme BF16
mixtral --reconstruct none --pattern 8:16
mixtral --reconstruct block --scheme W4A16
recovered --scheme W4A8
recovered --scheme BF16 --prune-rest
"""


def save_model(name: str, folder: Path) -> None:
    """A random model with channels of different scales, so that permutations gain something, and a tokenizer of bytes.
    `recovered` is 2:4 already, but for the first layer's q_proj."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**BASE | {"model_type": name} | MODELS[name]))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() == 1 or "embed" in key:
                continue
            parameter.mul_(torch.rand(parameter.shape[-1]).add(0.2))
            if name == "recovered" and "layers.0.self_attn.q_proj" not in key:
                parameter.unflatten(-1, (-1, 4))[..., :2] = 0
    model.to(torch.bfloat16).save_pretrained(folder)
    save_tokenizer(BASE["vocab_size"], folder)


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("before", type=click.Path(path_type=Path, exists=True), required=False)
def main(out: Path, before: Path | None) -> None:
    """Write the digests of 30 runs to OUT, and name those that differ from BEFORE."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: nothing here is on the hub
    found: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for name in MODELS:
            save_model(name, Path(temporary) / name)
        for run in RUNS.splitlines():
            model, *options = run.split()
            folder = Path(temporary) / "out"
            shared = ["--data", TEXT, "--samples", 40, "--seq-len", 128, "-o", folder, "--device", "cpu"]
            compress.main([str(one) for one in (Path(temporary) / model, *shared, *options)], standalone_mode=False)
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            found[run] = {str(path.relative_to(folder)): sha256(path) for path in files}
            shutil.rmtree(folder)
    out.write_text(json.dumps(found, indent=1))
    if before is not None:
        earlier = json.loads(before.read_text())
        differing = [run for run in earlier | found if earlier.get(run) != found.get(run)]
        print("\n".join(f"differs: {run}" for run in differing) or f"all {len(found)} runs are the same")
        raise SystemExit(bool(differing))


if __name__ == "__main__":
    main()
