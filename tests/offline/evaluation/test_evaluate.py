"""Perplexity against its definition, and compressed models against the dense ones they stand for."""

import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from compressing import edited

from ria_vllm.errors import RiaError
from ria_vllm.offline.evaluation.evaluate import evaluate, perplexity, read_tokens
from ria_vllm.offline.model.run.hf import load_model

CPU = torch.device("cpu")
TEXT = "The two largest of every four stay, and the others are gone. " * 8


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def run(*arguments):
    return CliRunner().invoke(evaluate, [str(a) for a in arguments], catch_exceptions=False)


def test_a_text_is_utf8_in_any_locale(tiny_llama, tmp_path):
    """In one of ISO 8859-1, the text would be another one, and in this one it cannot be read."""
    (tmp_path / "text").write_bytes("Größe: 3 µm".encode())
    code = (
        "import sys; from pathlib import Path\n"
        "from ria_vllm.offline.evaluation import evaluate\n"
        "print(evaluate.read_tokens(sys.argv[1], Path(sys.argv[2]), None).tolist())\n"
    )
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    arguments = [sys.executable, "-c", code, str(tiny_llama), str(tmp_path / "text")]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, env=os.environ | locale)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == read_tokens(str(tiny_llama), tmp_path / "text", None).tolist()


def test_perplexity_is_the_exponential_of_the_mean_negative_log_likelihood(tiny_llama):
    model = load_model(str(tiny_llama), CPU)
    tokens = torch.randint(2, 250, (100,), generator=torch.Generator().manual_seed(0))
    nll = []
    for window in (tokens[:30], tokens[30:60], tokens[60:90]):  # the last ten are dropped
        with torch.no_grad():
            log_p = model(window[None]).logits[0].double().log_softmax(-1)
        nll += [-float(log_p[i, window[i + 1]]) for i in range(29)]
    found = perplexity(model, tokens, 30)
    assert (found.tokens, found.windows, found.seq_len) == (87, 3, 30)
    assert found.perplexity == pytest.approx(math.exp(sum(nll) / 87), rel=1e-5)


def test_command_on_both_kinds_of_folder(pruned_llama, text):
    found = {}
    for folder in (pruned_llama.source, pruned_llama.folder):
        found[folder] = json.loads(
            run(folder, "--eval-data", text, "--seq-len", 64, "--eval-tokens", 200, "--json").stdout
        )
        assert found[folder]["tokens"] == 3 * 63
        model = load_model(str(folder), CPU, found[folder]["compute_dtype"])
        tokens = read_tokens(str(folder), text, 200)
        assert found[folder]["perplexity"] == pytest.approx(perplexity(model, tokens, 64).perplexity)
    assert found[pruned_llama.source]["perplexity"] != found[pruned_llama.folder]["perplexity"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--eval-data", "/nowhere.txt"], "/nowhere.txt"),
        (["--seq-len", "300"], "context is 256"),
        (["--tasks", "arc_easy", "--eval-data", "x"], "give --eval-data FILE"),
    ],
)
def test_bad_input(pruned_llama, text, arguments, words):
    if "--seq-len" in arguments:
        arguments = [*arguments, "--eval-data", text]
    with pytest.raises(RiaError, match=words):
        run(pruned_llama.folder, *arguments)


def test_a_model_that_only_gives_nan(damage, text):
    damage.replace("model.norm.weight", lambda t: t * float("nan"))
    with pytest.raises(RiaError, match="not finite"):
        run(damage.folder, "--eval-data", text)


def test_the_card_shows_the_perplexity_and_the_base_models(pruned_llama, text, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(pruned_llama.folder, out)
    (out / "README.md").write_text("# Mine\n")
    arguments = ("--eval-data", text, "--seq-len", 64, "--baseline", pruned_llama.source, "--update-card", "--json")
    found = json.loads(run(out, *arguments).stdout)
    alone = json.loads(run(pruned_llama.source, "--eval-data", text, "--seq-len", 64, "--json").stdout)
    assert found["baseline"]["model"] == str(pruned_llama.source)
    assert {key: found["baseline"][key] for key in ("perplexity", "tokens", "seq_len")} == {
        key: alone[key] for key in ("perplexity", "tokens", "seq_len")
    }
    row = f"| text.txt | {found['tokens']} | 64 | {found['perplexity']:.2f} | {alone['perplexity']:.2f} |"
    card = (out / "README.md").read_text()
    assert row in card.splitlines() and card.startswith("# Mine\n") and str(tmp_path) not in card
    assert f"perplexity {alone['perplexity']:.4f}" in run(out, *arguments[:-2]).stdout


def test_nothing_is_measured_that_cannot_be_recorded_or_compared(pruned_llama, text, tmp_path, monkeypatch):
    monkeypatch.setattr("ria_vllm.offline.evaluation.evaluate.load_model", lambda *_: pytest.fail("measured"))
    with pytest.raises(RiaError, match="no model card"):
        run(pruned_llama.folder, "--eval-data", text, "--update-card")
    monkeypatch.setattr("ria_vllm.offline.evaluation.evaluate.run_tasks", lambda *_: pytest.fail("measured"))
    with pytest.raises(RiaError, match="no model card"):
        run(pruned_llama.folder, "--tasks", "x", "--update-card")
    other = tmp_path / "other"
    shutil.copytree(pruned_llama.source, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(RiaError, match="splits the text into different tokens"):
        run(pruned_llama.folder, "--eval-data", text, "--baseline", other)


def test_both_models_are_measured_alike(tiny_llama, text, tmp_path, monkeypatch):
    """A baseline with a shorter context, in a wider dtype."""
    from transformers import AutoModelForCausalLM

    wide = tmp_path / "wide"
    shutil.copytree(tiny_llama, wide)
    AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).save_pretrained(wide)
    edited(wide, tmp_path / "short", lambda t: None, max_position_embeddings=100)
    monkeypatch.setattr("ria_vllm.offline.model.run.dtypes.fast_bf16", lambda device: True)
    found = json.loads(run(tiny_llama, "--eval-data", text, "--baseline", tmp_path / "short", "--json").stdout)
    assert found["compute_dtype"] == "float32" and found["seq_len"] == found["baseline"]["seq_len"] == 100
    assert found["perplexity"] == found["baseline"]["perplexity"]  # the same values, computed alike
    with pytest.raises(RiaError, match="--seq-len 200: the context is 100 tokens .*short"):
        run(tiny_llama, "--eval-data", text, "--baseline", tmp_path / "short", "--seq-len", 200)


def test_missing_weights_are_not_made_up(damage, text):
    damage.replace("model.norm.weight", lambda t: None)
    damage.edit_json("model.safetensors.index.json", lambda c: c["weight_map"].pop("model.norm.weight"))
    with pytest.raises(RiaError, match="model.norm.weight"):
        run(damage.folder, "--eval-data", text)
