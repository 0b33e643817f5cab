"""Heads that `compress --rotate heads` turns before it prunes, read back from the folder."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from compressing import digests, interrupted_after_a_layer, run_small
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ria_vllm.checkpoint import Reader
from ria_vllm.errors import RiaError
from ria_vllm.export import export_dense
from ria_vllm.folder_commands import inspect, verify
from ria_vllm.offline.compress import Settings
from ria_vllm.offline.distill.recipe import Distillation
from ria_vllm.offline.distill.run import Settings as DistillSettings
from ria_vllm.offline.distill.run import distill
from ria_vllm.offline.pruning.masks import Pattern
from ria_vllm.progress import Monitor
from ria_vllm.push import files_to_push
from ria_vllm.schema import ROTATIONS_FILE
from ria_vllm.training import save

# Family -> (key-value heads, heads), and the names of v and o.
FAMILIES = {"llama": (2, 4, "v_proj", "o_proj"), "opt": (4, 4, "v_proj", "out_proj")}


def recipe_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]["recipe"]


@pytest.fixture
def by_hand(monkeypatch) -> list[torch.Tensor]:
    """Random matrices in the place of learned ones, in the order of the layers."""
    given: list[torch.Tensor] = []

    def random(heads, n, m, seed):
        kv, d = heads.values.shape[:2]
        draw = torch.Generator().manual_seed(len(given))
        given.append(torch.linalg.qr(torch.randn(kv, d, d, dtype=torch.float64, generator=draw)).Q)
        return given[-1]

    monkeypatch.setattr("ria_vllm.offline.pruning.rotation.learned", random)
    return given


@pytest.mark.parametrize("family", FAMILIES)
def test_kept_weights_are_those_of_the_turned_model(family, by_hand, make_model, text, tmp_path):
    source = make_model(tmp_path / "model", family, dtype=torch.float32)
    report, _ = run_small(source, tmp_path / "out", text, rotate="heads")
    dense = load_file(source / "model.safetensors")
    export_dense(Reader(tmp_path / "out"), tmp_path / "dense", 10**9)
    found = load_file(tmp_path / "dense" / "model.safetensors")
    kv, heads, v_name, o_name = FAMILIES[family]
    turned = set()
    for index, rotations in enumerate(by_hand):
        (v,) = (n for n in dense if f".{index}." in n and n.endswith(f"{v_name}.weight"))
        (o,) = (n for n in dense if f".{index}." in n and n.endswith(f"{o_name}.weight"))
        rows = torch.block_diag(*rotations)
        columns = torch.block_diag(*rotations.repeat_interleave(heads // kv, 0))
        for name, want in ((v, rows @ dense[v].double()), (o, dense[o].double() @ columns.T)):
            kept = found[name] != 0
            assert 0.45 < kept.double().mean() <= 0.5
            torch.testing.assert_close(found[name][kept].double(), want[kept], rtol=1e-5, atol=1e-6)
        bias = v.replace("weight", "bias")
        if bias in dense:
            torch.testing.assert_close(found[bias].double(), rows @ dense[bias].double(), rtol=1e-5, atol=1e-6)
            assert not torch.equal(found[bias], dense[bias])
            turned.add(bias)
        assert report["linears"][o.removesuffix(".weight")]["rotated"] is True
    assert len(by_hand) == 2 and bool(turned) == (family == "opt")
    others = [name for name in dense if dense[name].dim() == 1 and name not in turned]
    assert others and all(torch.equal(found[name], dense[name]) for name in others)
    assert recipe_of(tmp_path / "out")["rotate"] == "heads"
    stored = load_file(tmp_path / "out" / ROTATIONS_FILE)
    consumers = sorted(name.removesuffix(".weight") for name in dense if name.endswith(f"{o_name}.weight"))
    assert sorted(stored) == [f"{name}.rotations" for name in consumers]
    for name, rotations in zip(consumers, by_hand, strict=True):
        assert torch.equal(stored[f"{name}.rotations"], rotations.float())
    assert not (tmp_path / "dense" / ROTATIONS_FILE).exists()


@pytest.mark.parametrize("options", [
    {"reconstruct": "admm"},
    {"reconstruct": "short", "compute_dtype": "float32"},
    {"weights": "int8", "activations": "int8", "reconstruct": "short"},
], ids=lambda options: "-".join(options.values()))  # fmt: skip
def test_a_resumed_run_gives_the_same_bytes(options, make_model, text, tmp_path):
    """The family has biases, which rotations and scales change. Those in the file may have fewer digits than those that
    are computed with."""
    source = make_model(tmp_path / "model", "opt", dtype=torch.bfloat16)
    run_small(source, tmp_path / "whole", text, rotate="heads", **options)
    with interrupted_after_a_layer():
        run_small(source, tmp_path / "out", text, rotate="heads", **options)
    run_small(source, tmp_path / "out", text, Settings(resume=True), rotate="heads", **options)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    assert digests((tmp_path / "out" / ROTATIONS_FILE).parent) == digests((tmp_path / "whole" / ROTATIONS_FILE).parent)


def test_less_is_lost(tiny, text, tmp_path):
    """Of the output of v and o, when nothing makes up for what is removed."""
    errors = {}
    for rotate in ("none", "heads"):
        report, _ = run_small(tiny("llama"), tmp_path / rotate, text, rotate=rotate, reconstruct="admm")
        both = [record for name, record in report["linears"].items() if name.endswith(("v_proj", "o_proj"))]
        errors[rotate] = sum(record["error_after"] for record in both) / len(both)
    assert errors["heads"] < 0.97 * errors["none"], errors


@pytest.mark.parametrize("ignored", ["v_proj", "o_proj"])
def test_what_stays_dense_is_not_turned(ignored, model, text, tmp_path):
    """vLLM fuses q, k and v, so they stay dense together."""
    run_small(model, tmp_path / "out", text, rotate="heads", ignore=(ignored,))
    run_small(model, tmp_path / "without", text, ignore=(ignored,))
    found, want = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "without"))
    assert found.keys() == want.keys() and all(torch.equal(found[name], want[name]) for name in want)
    assert "rotate" not in recipe_of(tmp_path / "out") and not (tmp_path / "out" / ROTATIONS_FILE).exists()


def test_what_is_made_of_the_folder_keeps_the_rotations(model, text, tmp_path):
    run_small(model, tmp_path / "out", text, rotate="heads")
    recipe = Distillation(tokens=128, seq_len=64, batch=2, text=str(text), evals=1)
    distill(tmp_path / "out", str(model), tmp_path / "distilled", recipe, DistillSettings(), Monitor(shown=False))
    save(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), tmp_path / "saved", like=tmp_path / "out")
    want = (tmp_path / "out" / ROTATIONS_FILE).read_bytes()
    for name in ("distilled", "saved"):
        found = Reader(tmp_path / name)
        assert (tmp_path / name / ROTATIONS_FILE).read_bytes() == want
        assert found.schema.rotations_digest == Reader(tmp_path / "out").schema.rotations_digest
        assert list(found.problems()) == []
    assert files_to_push(Reader(tmp_path / "saved"))[ROTATIONS_FILE] == tmp_path / "saved" / ROTATIONS_FILE


def test_what_an_interrupted_run_of_an_older_version_has_not_stored(model, text, tmp_path):
    with interrupted_after_a_layer():
        run_small(model, tmp_path / "out", text, rotate="heads")
    path = tmp_path / "out.partial" / "run.json"
    older = {key: value for key, value in json.loads(path.read_text()).items() if key != "rotations"}
    path.write_text(json.dumps(older))
    with pytest.raises(RiaError, match="another rotations"):
        run_small(model, tmp_path / "out", text, Settings(resume=True), rotate="heads")


def test_what_is_said_of_it(model, text, tmp_path):
    run_small(model, tmp_path / "out", text, rotate="heads")
    shown = CliRunner().invoke(inspect, [str(tmp_path / "out")], catch_exceptions=False).output
    assert "rotate heads" in shown
    assert CliRunner().invoke(verify, [str(tmp_path / "out")], catch_exceptions=False).exit_code == 0
    export_dense(Reader(tmp_path / "out"), tmp_path / "dense", 10**9)
    for name, fit in (("out", "fit only in vLLM with ria-vllm"), ("dense", "do not fit")):
        assert f"adapters (LoRA) of the dense model {fit}" in (tmp_path / name / "README.md").read_text()


def test_a_pattern_that_is_not_served_stores_no_rotations(model, text, tmp_path):
    """vLLM would load them as weights, and nothing there turns adapters."""
    run_small(model, tmp_path / "out", text, rotate="heads", pattern=Pattern.parse("4:8"))
    assert not (tmp_path / "out" / ROTATIONS_FILE).exists()
    assert not any("rotations" in name for name in load_file(tmp_path / "out" / "model.safetensors"))
    assert "adapters (LoRA) of the dense model do not fit" in (tmp_path / "out" / "README.md").read_text()


def test_a_pattern_without_groups(model, text, tmp_path):
    with pytest.raises(RiaError, match="--rotate heads is for patterns N:M, not for unstructured"):
        run_small(model, tmp_path / "out", text, rotate="heads", pattern=Pattern.parse("unstructured"))
