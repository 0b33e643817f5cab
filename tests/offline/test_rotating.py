"""Heads that `compress --rotate heads` turns before it prunes, read back from the folder."""

import json
from pathlib import Path

import pytest
import torch
from compressing import TOKENS, digests, edited, interrupted_after_a_layer, logits, run_small
from decoders import check_same, in_float64
from rotating_heads import FAMILIES, WITH_BIAS
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ria_vllm.checkpoint.reader import Reader
from ria_vllm.export import export_dense
from ria_vllm.offline.recipe import Recipe
from ria_vllm.offline.run.compress import Settings
from ria_vllm.offline.run.layers import LayerPass


def rotated(report: dict) -> set[str]:
    return {name for name, record in report["linears"].items() if "rotated" in record}


def recipe_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]["recipe"]


@pytest.mark.parametrize("family", FAMILIES)
def test_kept_weights_are_those_of_the_rotated_model(family, by_hand, make_model, text, tmp_path):
    attention = FAMILIES[family]
    source = make_model(tmp_path / "model", family, **dict(attention.settings))
    report, _ = run_small(source, tmp_path / "out", text, rotate="heads")
    dense = load_file(source / "model.safetensors")
    changed = attention.rotated(dense, by_hand)
    check_same(*(logits_in_float64(source, tmp_path / name, change) for name, change in (("a", changed), ("b", {}))))
    export_dense(Reader(tmp_path / "out"), tmp_path / "dense", 10**9)
    found = load_file(tmp_path / "dense" / "model.safetensors")
    assert found.keys() == dense.keys()
    for name, tensor in found.items():
        kept = tensor != 0 if name.removesuffix(".weight") in report["linears"] else torch.ones_like(tensor).bool()
        if name in changed:
            torch.testing.assert_close(tensor[kept].double(), changed[name][kept], rtol=1e-5, atol=1e-6)
            assert not torch.allclose(tensor[kept], dense[name][kept], atol=1e-2)
        else:
            assert torch.equal(tensor[kept], dense[name][kept]), name
        assert name.removesuffix(".weight") not in report["linears"] or 0.45 < kept.double().mean() <= 0.5
    assert any(name.endswith(".bias") for name in changed) == (family in WITH_BIAS)
    assert rotated(report) == {attention.names(index)[1] for index in attention.layers}
    assert recipe_of(tmp_path / "out")["rotate"] == "heads"


def logits_in_float64(source: Path, folder: Path, changed: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of a copy of a model in which some tensors are others."""
    edited(source, folder, lambda tensors: {name: tensors[name].double() for name in tensors} | changed)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    in_float64(model)
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


INT8, INT4 = ({"weights": weights, "activations": "int8", "smooth": 0.5} for weights in ("int8", "int4"))


@pytest.mark.parametrize("family, options", [
    ("opt", {"reconstruct": "short", "compute_dtype": "float32"}),
    ("opt", {"reconstruct": "short"} | INT8),
    ("qwen2", {"reconstruct": "admm"} | INT4),
], ids=str)  # fmt: skip
def test_a_resumed_run_gives_the_same_bytes(family, options, make_model, text, tmp_path):
    """OPT and Qwen 2 have biases, which rotations and scales change. Those in the file may have fewer digits than those
    that are computed with."""
    attention = FAMILIES[family]
    source = make_model(tmp_path / "model", family, dtype=torch.bfloat16, **dict(attention.settings))
    report, _ = run_small(source, tmp_path / "whole", text, rotate="heads", **options)
    assert rotated(report) == {attention.names(index)[1] for index in attention.layers}
    with interrupted_after_a_layer():
        run_small(source, tmp_path / "out", text, rotate="heads", **options)
    resumed = Settings(resume=True)
    run_small(source, tmp_path / "out", text, resumed, rotate="heads", **options)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


@pytest.mark.parametrize("family, options", [
    ("cohere2", {}), ("qwen3-moe", INT8),
], ids=str)  # fmt: skip
def test_the_dense_models_stream_does_not_know_of_it(family, options, by_hand, make_model, text, tmp_path, monkeypatch):
    """Also where weights have so few digits that rotated ones are rounded."""
    streams: list[torch.Tensor] = []
    prune = LayerPass.prune

    def kept(layers, *arguments, **named):
        found = prune(layers, *arguments, **named)
        streams.extend(layers.streams.dense[index].clone() for index in range(len(layers.streams.dense)))
        return found

    monkeypatch.setattr(LayerPass, "prune", kept)
    source = make_model(tmp_path / "model", family, dtype=torch.bfloat16)
    options = {"reconstruct": "admm", "compute_dtype": "bfloat16"} | options
    for rotate in ("none", "heads"):
        run_small(source, tmp_path / rotate, text, rotate=rotate, **options)
    assert by_hand
    without, rotated = streams[: len(streams) // 2], streams[len(streams) // 2 :]
    assert len(rotated) >= 2 and all(map(torch.equal, without, rotated))


@pytest.mark.parametrize("family", ["opt", "phi3", "deepseek-v3"])
def test_scales_that_migrate_leave_the_function_of_turned_weights(
    family, by_hand, make_model, text, tmp_path, monkeypatch
):
    """With weights that are not rounded, which `compress` does not offer."""
    monkeypatch.setattr(Recipe, "migration_strength", 0.5)
    report, found, want, _ = exported_and_by_hand(family, by_hand, make_model, text, tmp_path)
    assert all(record["smoothed"] for name, record in report["linears"].items() if name in rotated(report))
    torch.testing.assert_close(found, want, rtol=1e-3, atol=1e-3)


def exported_and_by_hand(family: str, given: list[torch.Tensor], make_model, text: Path, folder: Path, **options):
    """The report of a run, and logits: what it exports, the dense model with rotated weights and the same zeros, the
    same without rotating."""
    attention = FAMILIES[family]
    source = make_model(folder / "model", family)
    report, _ = run_small(source, folder / "out", text, rotate="heads", **options)
    assert rotated(report) == {attention.names(index)[1] for index in attention.layers}
    export_dense(Reader(folder / "out"), folder / "dense", 10**9)
    found, dense = load_file(folder / "dense" / "model.safetensors"), load_file(source / "model.safetensors")
    made = []
    for number, changed in enumerate((attention.rotated(dense, given), {})):
        masked = {
            f"{name}.weight": (dense | changed)[f"{name}.weight"] * (found[f"{name}.weight"] != 0)
            for name in report["linears"]
        }
        changed = {name: tensor.float() for name, tensor in (changed | masked).items()}
        made.append(logits(edited(source, folder / str(number), lambda tensors: tensors | changed)))
    return report, logits(folder / "dense"), *made


@pytest.mark.parametrize("ignored", ["v_proj", "o_proj"])
def test_what_stays_dense_is_not_rotated(ignored, model, text, tmp_path):
    """vLLM fuses q, k and v, so they stay dense together."""
    run_small(model, tmp_path / "out", text, rotate="heads", ignore=(ignored,))
    run_small(model, tmp_path / "without", text, ignore=(ignored,))
    found, want = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "without"))
    assert found.keys() == want.keys() and all(torch.equal(found[name], want[name]) for name in want)
    assert recipe_of(tmp_path / "out")["rotate"] == "none"
