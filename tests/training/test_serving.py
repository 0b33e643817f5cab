"""vLLM serves what `save` and `distill` write, and computes what transformers does with the trained model."""

import compare
import pytest
import tiny
import torch
from compressing import run_small
from distilling import run as distill
from moe import save_moe
from quantized import quantized
from transformers import AutoModelForCausalLM

from ria_vllm.training import keep_sparse, save


def trained(folder, steps=3):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    keep_sparse(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    tokens = torch.randint(3, 200, (4, 16), generator=torch.Generator().manual_seed(0))
    for _ in range(steps):
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.slow
def test_vllm_computes_what_the_trained_model_does(tmp_path):
    """A dense model with folds and gathers, in floats and integers, and an MoE whose experts are stacked; the
    MoE also as `distill` trains it."""
    tiny.write(tiny.FAMILIES["llama-gqa"], tmp_path / "llama")
    quantized(tmp_path / "llama", tmp_path / "int4", "int4-g32")
    text = tmp_path / "text.txt"
    text.write_text("Many words are written here, and then some more of them. " * 40)
    run_small(save_moe(tmp_path / "moe", "qwen3_moe", head_dim=32), tmp_path / "pruned-moe", text)
    folders, models = [], []
    for name in ("llama", "int4", "pruned-moe"):
        models.append(trained(tmp_path / name))
        save(models[-1], tmp_path / f"{name}-new", like=tmp_path / name)
        if name == "int4":  # rounded, as test_formats checks
            models[-1] = AutoModelForCausalLM.from_pretrained(tmp_path / "int4-new", dtype=torch.float32)
        folders.append((tmp_path / name, tmp_path / f"{name}-new"))
    # The server is started for the others anyway.
    distill(tmp_path / "moe", tmp_path / "pruned-moe", tmp_path / "distilled", text, tokens=512, lr=1e-2)
    models.append(AutoModelForCausalLM.from_pretrained(tmp_path / "distilled", dtype=torch.float32))
    folders.append((tmp_path / "pruned-moe", tmp_path / "distilled"))
    prompts = [[token % 250 for token in prompt] for prompt in compare.prompts()]
    engine = {"dtype": "float32", "max_model_len": 64}
    jobs = [{"model": str(folder), "prompts": prompts, "engine": engine} for _, folder in folders]
    results = compare.generate(tmp_path / "run", jobs, VLLM_ENABLE_V1_MULTIPROCESSING="0", OMP_NUM_THREADS="1")
    for model, (before, _), result in zip(models, folders, results, strict=True):
        compare.check(model, result, given=prompts)
        untrained = AutoModelForCausalLM.from_pretrained(before, dtype=torch.float32)
        with torch.no_grad():
            tokens = torch.tensor(prompts[-1:])
            assert (untrained(tokens).logits - model(tokens).logits).abs().max() > 0.1  # training has changed it
