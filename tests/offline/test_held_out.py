"""How much `compress` says is lost, against transformers' own forward pass of both models on the held-out samples."""

import hashlib
from dataclasses import replace

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from ria_vllm.errors import RiaError
from ria_vllm.offline.calibration.data import from_text
from ria_vllm.offline.model.run.hf import load_tokenizer
from ria_vllm.offline.recipe import Recipe
from ria_vllm.offline.run import compress as compressing
from ria_vllm.offline.run.compress import Settings, compress
from ria_vllm.offline.run.held_out import verdict
from ria_vllm.progress import Monitor


@pytest.fixture
def drawn(monkeypatch):
    seen, texts = [], compressing.calibration_tokens
    monkeypatch.setattr(compressing, "calibration_tokens", lambda *a: seen.append(texts(*a)) or seen[-1])
    return seen


@pytest.mark.parametrize("ignore", [(), ("layers.1",)], ids=["all", "the last layer stays dense"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere2", "qwen3-moe", "gemma3n"])
def test_it_is_what_transformers_computes(family, ignore, tiny, text, tmp_path, drawn):
    """With a soft cap, scaled logits, tied heads, experts, and layers that read earlier ones. Nine of 18 samples are
    held out, in chunks of their own."""
    recipe = Recipe(calibration=str(text), samples=9, seq_len=32, reconstruct="admm", ignore=ignore)
    report = compress(str(tiny(family)), tmp_path / "out", recipe, Settings(), Monitor(shown=False))
    held_out = drawn[0][9:]
    assert len(held_out) == recipe.held_out == 9
    dense, pruned = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(held_out)
        .logits.detach()[:, :-1]
        .log_softmax(-1)
        for folder in (tiny(family), tmp_path / "out")
    )
    perplexity = [functional.nll_loss(one.flatten(0, 1), held_out[:, 1:].flatten()).exp() for one in (pruned, dense)]
    divergence = (dense.exp() * (dense - pruned)).sum(-1).mean()
    found = report["held_out"]
    assert found["tokens"] == 9 * 31
    assert [found["perplexity"], found["perplexity_dense"]] == pytest.approx([float(p) for p in perplexity], rel=1e-3)
    assert found["kl"] == pytest.approx(float(divergence), rel=2e-2, abs=5e-6) and found["kl"] > 0


@pytest.mark.parametrize("calibration", ["file", "self"])
def test_they_are_of_another_text_if_there_is_one(calibration, tiny, text, tmp_path, drawn):
    """What is fitted to is as without."""
    other = tmp_path / "other.txt"
    other.write_text(" ".join(reversed(text.read_text().split())))
    recipe = Recipe(
        calibration=str(text) if calibration == "file" else "self", samples=8, seq_len=32, reconstruct="admm"
    )
    for chosen, out in ((recipe, "plain"), (replace(recipe, eval_text=str(other)), "out")):
        report = compress(str(tiny("llama")), tmp_path / out, chosen, Settings(), Monitor(shown=False))
    assert torch.equal(drawn[1][:8], drawn[0][:8])
    assert torch.equal(drawn[1][8:], from_text(str(other), load_tokenizer(str(tiny("llama"))), 8, 32, 0))
    dense = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32)
    loss = dense(drawn[1][8:], labels=drawn[1][8:]).loss
    assert report["held_out"]["perplexity_dense"] == pytest.approx(float(loss.exp()), rel=1e-3)
    assert f"on {8 * 31} tokens of other.txt to which nothing was fitted: " in report["verdict"]["quality"]
    assert report["recipe"]["eval_text"] == "other.txt"
    assert report["recipe"]["eval_text_sha256"] == hashlib.sha256(other.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [("same.txt", {}, "weights are fitted to this text"), ("absent.txt", {}, "no such file"),
     ("a.jsonl", {}, "takes a .txt file"), ("same.txt", {"reconstruct": "none"}, "weights that are reconstructed")],
)  # fmt: skip
def test_texts_that_it_cannot_be_measured_on(name, options, said, tiny, text, tmp_path):
    (tmp_path / "same.txt").write_bytes(text.read_bytes())
    words = {"calibration": str(text), "samples": 8, "seq_len": 32, "eval_text": str(tmp_path / name)} | options
    with pytest.raises(RiaError, match=f"--eval-data.*{said}"):
        compress(str(tiny("llama")), tmp_path / "out", Recipe(**words), Settings(), Monitor(shown=False))
    assert not (tmp_path / "out").exists()


def test_nothing_is_fitted_to_them(tiny, text, tmp_path, monkeypatch):
    """Other tokens there change nothing but what is said of them."""
    texts, folders = compressing.calibration_tokens, []
    for name in ("one", "other"):

        def tokens(*arguments, name=name):
            found = texts(*arguments)
            if name == "other":
                found[8:] = found[8:].flip(1)
            return found

        monkeypatch.setattr(compressing, "calibration_tokens", tokens)
        recipe = Recipe(calibration=str(text), samples=8, seq_len=32, reconstruct="admm", weights="int8")
        folders.append(compress(str(tiny("qwen3-moe")), tmp_path / name, recipe, Settings(), Monitor(shown=False)))
    one, other = folders
    assert one.pop("held_out") != other.pop("held_out")
    assert one.pop("verdict") != other.pop("verdict")
    assert one == other
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "other")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("perplexity", "said"), [(10.4, "near the dense model"), (12.0, "closer"), (30.0, "Much is lost")]
)
def test_the_verdict_says_what_to_do(perplexity, said):
    found = {"tokens": 100, "perplexity": perplexity, "perplexity_dense": 10.0, "kl": 0.1}
    assert said in verdict(found, Recipe())["advice"]
