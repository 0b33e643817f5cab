"""Heads that `compress --rotate heads` turns before it prunes, read back from the folder."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from compressing import TOKENS, digests, edited, interrupted_after_a_layer, run_small
from decoders import check_same, in_float64
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from turning import FAMILIES, WITH_BIAS

from ria_vllm.checkpoint import Reader
from ria_vllm.errors import RiaError
from ria_vllm.export import export_dense
from ria_vllm.folder_commands import inspect, verify
from ria_vllm.offline.compress import Settings
from ria_vllm.offline.pruning.masks import Pattern

def recipe_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]["recipe"]


@pytest.mark.parametrize("family", FAMILIES)
def test_kept_weights_are_those_of_the_turned_model(family, by_hand, make_model, text, tmp_path):
    attention = FAMILIES[family]
    source = make_model(tmp_path / "model", family, **dict(attention.settings))
    report, _ = run_small(source, tmp_path / "out", text, rotate="heads")
    dense = load_file(source / "model.safetensors")
    turned = attention.turned(dense, by_hand)
    check_same(*(logits_in_float64(source, tmp_path / name, change) for name, change in (("a", turned), ("b", {}))))
    export_dense(Reader(tmp_path / "out"), tmp_path / "dense", 10**9)
    found = load_file(tmp_path / "dense" / "model.safetensors")
    assert found.keys() == dense.keys()
    for name, tensor in found.items():
        kept = tensor != 0 if name.removesuffix(".weight") in report["linears"] else torch.ones_like(tensor).bool()
        if name in turned:
            torch.testing.assert_close(tensor[kept].double(), turned[name][kept], rtol=1e-5, atol=1e-6)
            assert not torch.allclose(tensor[kept], dense[name][kept], atol=1e-2)
        else:
            assert torch.equal(tensor[kept], dense[name][kept]), name
        assert name.removesuffix(".weight") not in report["linears"] or 0.45 < kept.double().mean() <= 0.5
    assert any(name.endswith(".bias") for name in turned) == (family in WITH_BIAS)
    of_layers = {attention.names(index)[1] for index in attention.layers}
    assert {name for name, record in report["linears"].items() if "rotated" in record} == of_layers
    assert recipe_of(tmp_path / "out")["rotate"] == "heads"


def logits_in_float64(source: Path, folder: Path, changed: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of a copy of a model in which some tensors are others."""
    edited(source, folder, lambda tensors: {name: tensors[name].double() for name in tensors} | changed)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    in_float64(model)
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


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
    assert "rotate" not in recipe_of(tmp_path / "out")  # so that servers take adapters of the dense model


def test_what_is_said_of_it(model, text, tmp_path):
    run_small(model, tmp_path / "out", text, rotate="heads")
    shown = CliRunner().invoke(inspect, [str(tmp_path / "out")], catch_exceptions=False).output
    assert "rotate heads" in shown
    assert CliRunner().invoke(verify, [str(tmp_path / "out")], catch_exceptions=False).exit_code == 0


def test_a_pattern_without_groups(model, text, tmp_path):
    with pytest.raises(RiaError, match="--rotate heads is for patterns N:M, not for unstructured"):
        run_small(model, tmp_path / "out", text, rotate="heads", pattern=Pattern.parse("unstructured"))
