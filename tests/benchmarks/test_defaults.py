"""`python -m benchmarks.defaults`: what it measures, against `eval`'s perplexity and a divergence in float64."""

import json

import pytest
import torch
from click.testing import CliRunner

from benchmarks import defaults
from ria_vllm.offline.evaluation.evaluate import perplexity, read_tokens
from ria_vllm.offline.model.run.hf import load_model
from ria_vllm.offline.recipe import Recipe
from ria_vllm.offline.run.compress import Settings, compress
from ria_vllm.progress import Monitor


def test_each_seed_is_measured_as_eval_does_and_kept(tiny, text, tmp_path, monkeypatch):
    model = str(tiny("llama"))
    arguments = [model, "--data", str(text), "--text", str(text), "--scheme", "W8A8", "--effort", "fast"]
    arguments += ["--seeds", "2", "--samples", "4", "--windows", "2", "--results", str(tmp_path / "found.json")]
    done = CliRunner().invoke(defaults.main, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output

    asked = {"reconstruct": "admm", "weights": "int8", "activations": "int8", "samples": 4, "seq_len": 512, "seed": 1}
    recipe = Recipe.of_options(asked | {"calibration": str(text)})
    compress(model, tmp_path / "out", recipe, Settings(torch.device("cpu")), Monitor(shown=False))
    dense, pruned = load_model(model, "cpu"), load_model(str(tmp_path / "out"), "cpu")
    tokens = read_tokens(model, text, 2048)
    with torch.no_grad():
        windows = tokens.view(2, 1024)
        p, q = (torch.cat(list(one(windows).logits[:, :-1].double())).log_softmax(-1) for one in (dense, pruned))
    first, second = (run["texts"]["words"] for run in json.loads((tmp_path / "found.json").read_text()).values())
    assert second["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert second["perplexity"] == pytest.approx(perplexity(pruned, tokens, 1024).perplexity, rel=1e-5)
    assert second["dense"] == pytest.approx(perplexity(dense, tokens, 1024).perplexity, rel=1e-5)
    least, most = sorted((first["kl"], second["kl"]))
    assert least < most
    assert f"| W8A8 | fast | {defaults.spread([first['perplexity'], second['perplexity']], 1)} | " in done.output
    assert f" | {(least + most) / 2:.3f} ({least:.3f} to {most:.3f}) | " in done.output

    monkeypatch.setattr(defaults, "measure", lambda *_: pytest.fail("measured again"))
    assert CliRunner().invoke(defaults.main, arguments, catch_exceptions=False).output == done.output
