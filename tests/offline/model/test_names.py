"""Tensors whose names in the files are not those in transformers' model: the files' names are written."""

import json
from pathlib import Path

import pytest
import torch
from compressing import (
    check_complete,
    check_export,
    edited,
    run_small,
    under_language_model,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import WeightRenaming

from ria_vllm.checkpoint.reader import Reader
from ria_vllm.errors import RiaError
from ria_vllm.offline.model.run import names


def test_nemotron_h(tiny, text, tmp_path):
    """Layers of four kinds; in the files `backbone.` where transformers has `model.`, and experts one by one."""
    source = tiny("nemotron-h")
    stored = load_file(source / "model.safetensors")
    assert "backbone.embeddings.weight" in stored and "backbone.layers.3.mixer.experts.0.up_proj.weight" in stored
    report, _ = run_small(source, tmp_path / "out", text)
    reader = check_complete(source, tmp_path / "out")
    kinds = (("in", "out"), "qkvo", ("up", "down"), ("shared_experts.up", "shared_experts.down"))
    linears = {f"backbone.layers.{i}.mixer.{x}_proj" for i, names in enumerate(kinds) for x in names}
    assert linears == {name for name in reader.sparse_names if ".experts." not in name}
    assert linears <= set(report["linears"])
    folds = reader.schema.active_folds(reader.permuted_names, set(reader.sparse_names))
    consumers = {name.partition("layers.")[2] for name, _, _ in folds if ".experts." not in name}
    assert consumers == {"1.mixer.o_proj", "2.mixer.down_proj", "3.mixer.shared_experts.down_proj"}
    check_export(source, reader, tmp_path / "dense", lambda name: name.replace("backbone", "model"))


def test_qwen_as_the_hub_has_it(tiny, text, tmp_path):
    source = edited(
        tiny("qwen3.5"), tmp_path / "in", lambda t: {under_language_model(name): tensor for name, tensor in t.items()}
    )
    run_small(source, tmp_path / "out", text)
    reader = check_complete(source, tmp_path / "out")
    assert "model.language_model.layers.0.linear_attn.in_proj_qkv" in reader.sparse_names
    check_export(source, reader, tmp_path / "dense", lambda name: name.replace("language_model.", ""))


def test_gpt_neox_with_the_head_under_its_old_name(tiny, text, tmp_path):
    stored = load_file(tiny("gpt-neox") / "model.safetensors")
    assert "embed_out.weight" in stored  # transformers gives it back its old name when it saves
    run_small(tiny("gpt-neox"), tmp_path / "out", text)
    reader = check_complete(tiny("gpt-neox"), tmp_path / "out")
    assert reader.schema.ignored("embed_out")
    check_export(tiny("gpt-neox"), reader, tmp_path / "dense")


@pytest.fixture
def renamed(tiny, tmp_path, monkeypatch) -> Path:
    """A Llama whose tensors transformers renames, so that a known family, with folds, has other names in its files."""
    real = names.get_model_conversion_mapping
    monkeypatch.setattr(
        names,
        "get_model_conversion_mapping",
        lambda model: [WeightRenaming("^trunk.blocks", "model.layers"), *real(model)],
    )

    def change(tensors):
        return {name.replace("model.layers", "trunk.blocks"): tensor for name, tensor in tensors.items()}

    return edited(tiny("llama"), tmp_path / "renamed", change)


def test_folds_and_permutations_have_the_names_of_the_files(renamed, tiny, text, tmp_path):
    options = {"ignore": ("blocks.0.mlp.down|layers.0.mlp.down",), "reconstruct": "admm"}
    one, _ = run_small(tiny("llama"), tmp_path / "one", text, **options)
    two, _ = run_small(renamed, tmp_path / "two", text, **options)
    plain, other = Reader(tmp_path / "one"), Reader(tmp_path / "two")
    assert list(other.problems()) == []

    def rename(name):
        return name.replace("model.layers", "trunk.blocks")

    assert sorted(other.sparse_names) == sorted(map(rename, plain.sparse_names))
    assert sorted(other.permuted_names) == sorted(map(rename, plain.permuted_names))
    assert [f.model_dump() for f in other.schema.folds] == json.loads(
        rename(json.dumps([f.model_dump() for f in plain.schema.folds]))
    )
    assert len(other.schema.folds) == 2
    assert set(other.schema.sparsity_config.ignore) == set(map(rename, plain.schema.sparsity_config.ignore))
    assert two["linears"] == {rename(name): record for name, record in one["linears"].items()}
    for name in plain.sparse_names:
        assert torch.equal(plain.linear(name).dense(), other.linear(rename(name)).dense())


@pytest.mark.parametrize(
    ("patterns", "left"),
    [
        ({"mlp.w2_md.weight": "mlp.down_proj.weight"}, ["mlp.w2_md"]),  # as Inkling's
        # transformers leaves a name as it is if the new one is not the model's. vLLM fuses gate with up.
        ({"mlp.up_proj": "mlp.w1_md", "mlp.down_proj.weight": "mlp.w2"}, ["mlp.up_proj", "mlp.gate_proj"]),
    ],
)
def test_a_renaming_that_would_not_find_a_compressed_linear(patterns, left, tiny, text, tmp_path, monkeypatch):
    real = names.get_model_conversion_mapping
    ours = [WeightRenaming(*entry) for entry in patterns.items()]
    monkeypatch.setattr(names, "get_model_conversion_mapping", lambda model: [*ours, *real(model)])
    down = "mlp.w2_md" if "mlp.w2_md" in left else "mlp.down_proj"
    source = edited(tiny("llama"), tmp_path / "in", lambda t: {n.replace("mlp.down_proj", down): t[n] for n in t})
    report, _ = run_small(source, tmp_path / "out", text)
    dense = {name: why for name, why in report["dense"].items() if ".layers." in name}
    assert dense.keys() == {f"model.layers.{i}.{name}" for i in range(2) for name in left}
    assert dense[f"model.layers.1.{left[0]}"] == "transformers renames its weight, and would not find it compressed"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", key_mapping=patterns)
    reader = Reader(tmp_path / "out")
    for name, module in loaded.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            stored = name.replace("mlp.down_proj", down)
            weight = reader.dense(stored) if stored in reader.sparse_names else reader.tensor(f"{stored}.weight")
            assert torch.equal(module.weight, weight)


@pytest.mark.parametrize("place", ["files", "renamed"])
def test_errors_name_the_linear_as_its_file_does(place, tiny, text, tmp_path):
    def change(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"].mul_(1e38)
        return {under_language_model(name): tensor for name, tensor in tensors.items()} if place == "renamed" else None

    source = edited(tiny("qwen3.5"), tmp_path / "in", change)
    name = "model.language_model.layers.1.mlp.down_proj" if place == "renamed" else "model.layers.1.mlp.down_proj"
    with pytest.raises(RiaError, match=f"in: {name}: NaN or infinite values in its input.* in float32. Check"):
        run_small(source, tmp_path / "out", text)
