"""What a run says of itself: in the recipe, in the log, and under which names it measures."""

from pathlib import Path

import pytest
import torch
from compressing import WarningRecorder

from ria_vllm.offline.distill.loss import Loss
from ria_vllm.offline.distill.recipe import Distillation
from ria_vllm.offline.distill.run import Settings, distill
from ria_vllm.offline.evaluation.evaluate import read_tokens
from ria_vllm.offline.model.hf import load_model
from ria_vllm.progress import Monitor

K = 8


def run(dense: Path, folder: Path, out: Path, text: Path, monitor: Monitor, **options) -> dict:
    fixed = {"tokens": 256, "seq_len": 64, "text": str(text), "eval_text": (str(text),), "eval_tokens": 256, "evals": 1}
    return distill(folder, str(dense), out, Distillation(**fixed | options), Settings(), monitor)


def divergences(dense: Path, folder: Path, text: Path) -> tuple[float, float]:
    """Between the predictions of transformers' models, in float64: over the whole vocabulary, and over the K most
    probable tokens and all others as one."""
    tokens = read_tokens(str(folder), text, 256).view(2, 128)
    with torch.no_grad():
        p, q = (load_model(str(path), torch.device("cpu"))(input_ids=tokens).logits for path in (dense, folder))
    p, q = p.double().softmax(-1), q.double().softmax(-1)
    top = p.topk(K).indices
    parts = []
    for one in (p, q):
        found = one.gather(-1, top)
        parts.append(torch.cat([found, 1 - found.sum(-1, keepdim=True)], -1))
    return tuple(float((a * (a / b).log()).sum(-1).mean()) for a, b in ((p, q), parts))


@pytest.mark.parametrize("cached", [False, True])
def test_a_held_out_divergence_is_named_after_what_it_compares(cached, pruned, text, tmp_path):
    """Not by the option --top-k, but by what is left of the teacher's predictions: a cache holds the top k only."""
    dense, folder = pruned()
    monitor = WarningRecorder()
    report = run(dense, folder, tmp_path / "out", text, monitor, cache_teacher=cached, loss=Loss(top_k=K))
    score = report["distill"][0]["curve"][0]["held_out"][text.name]
    whole, top = divergences(dense, folder, text)
    assert top < 0.99 * whole
    name, wanted, words = ("kl_top_k", top, f"KL of the top {K}") if cached else ("kl", whole, "KL")
    assert set(score) == {"perplexity", name} and score[name] == pytest.approx(wanted, rel=1e-4)
    first = next(line for line in monitor.said if line.startswith("step 0 of"))
    assert first.endswith(f", {words} {score[name]:.4f}")


def test_the_recipe_says_what_rounds_the_weights(pruned, text, tmp_path):
    dense, folder = pruned()
    (story,) = run(dense, folder, tmp_path / "out", text, Monitor(shown=False))["recipe"]["distill"]
    found = {key: story[key] for key in ("processes", "shard", "device", "hardware", "threads")}
    capability = torch.backends.cpu.get_cpu_capability()
    threads = torch.get_num_threads()
    assert found == {"processes": 1, "shard": False, "device": "cpu", "hardware": capability, "threads": threads}
