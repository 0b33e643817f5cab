"""`compress` from end to end, on tiny models of every family."""

import json
from pathlib import Path

import pytest
import torch
from compressing import digests
from safetensors.torch import load_file

from ria_vllm.checkpoint import Reader, tensor_names
from ria_vllm.errors import RiaError
from ria_vllm.offline.compress import Settings, compress
from ria_vllm.offline.pruning.masks import Pattern
from ria_vllm.offline.recipe import Recipe
from ria_vllm.progress import Monitor

FAMILIES = (
    "llama", "llama-mha", "llama-mqa", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "opt", "opt-postnorm",
    "gpt-neox", "qwen3-moe",
)  # fmt: skip
CONSUMERS = {"qwen3-moe": 2}  # folded in two layers, besides experts; others have 4


def run(model: Path, out: Path, text: Path, settings: Settings = Settings(), **options) -> dict:
    recipe = Recipe(**{"calibration": str(text), "samples": 8, "seq_len": 64} | options)
    return compress(str(model), out, recipe, settings, Monitor(shown=False))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_becomes_a_sound_checkpoint(family, tiny, text, tmp_path):
    run(tiny(family), tmp_path / "out", text, reconstruct="none")
    reader = Reader(tmp_path / "out")
    assert list(reader.problems()) == []
    original = load_file(tiny(family) / "model.safetensors")
    for name in reader.sparse_names:
        linear, weight = reader.linear(name), original.pop(f"{name}.weight")
        kept = linear.dense() != 0
        assert torch.equal(linear.dense(), weight * kept), name
        order = torch.arange(weight.shape[1]) if linear.input_permutation is None else linear.input_permutation.long()
        assert bool((kept[:, order].view(len(weight), -1, 4).sum(-1) == 2).all()), name
    assert set(original) == set(reader.dense_names)
    assert all(torch.equal(reader.tensor(name), tensor) for name, tensor in original.items())
    consumers = {name for name, _, _ in reader.schema.active_folds(reader.permuted_names, set(reader.sparse_names))}
    assert sum(".experts." not in name for name in consumers) == CONSUMERS.get(family, 4)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "qwen3-moe"])
def test_shared_orders_are_shared(family, tiny, text, tmp_path):
    run(tiny(family), tmp_path / "out", text, reconstruct="none")
    reader = Reader(tmp_path / "out")
    folded = {name for name, _, _ in reader.schema.active_folds(reader.permuted_names, set(reader.sparse_names))}
    orders: dict[str, set[tuple[int, ...]]] = {}
    for name in set(reader.sparse_names) - folded:
        parent = name.rpartition(".")[0] if "proj" in name else name
        orders.setdefault(parent, set()).add(tuple(reader.permutations[name].tolist()))
    assert all(len(found) == 1 for found in orders.values())


def test_scope_linear_gives_each_its_own(tiny, text, tmp_path):
    run(tiny("llama"), tmp_path / "out", text, reconstruct="none", permute_scope="linear")
    reader = Reader(tmp_path / "out")
    q, k = (reader.permutations[f"model.layers.0.self_attn.{x}_proj"] for x in "qk")
    assert not torch.equal(q, k)
    assert list(reader.problems()) == []


def test_all_readers_accept_a_model_without_any_permutation(make_model, text, tmp_path):
    """Heads of 6 channels do not divide into groups of four, so o_proj, the only pruned linear, keeps its order."""
    from transformers import AutoModelForCausalLM

    from ria_vllm.serve.checkpoint_files import permutations_of

    model = make_model(
        tmp_path / "in", "llama", hidden_size=192, num_attention_heads=32, num_key_value_heads=32, head_dim=6
    )
    out = tmp_path / "out"
    run(model, out, text, reconstruct="none", ignore=("[qkv]_proj", "mlp"))
    reader = Reader(out)
    assert reader.schema.recipe["permute"] == "lsa" and reader.permuted_names == [] and not list(reader.problems())
    assert permutations_of(str(out), None, reader.schema) == {}
    loaded = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert all(torch.equal(loaded[f"{name}.weight"], reader.linear(name).dense()) for name in reader.sparse_names)
    (out / "permutations.safetensors").unlink()
    with pytest.raises(RiaError, match="permutations.safetensors: missing"):
        Reader(out)


@pytest.mark.parametrize("method", ["ria", "ri", "wanda", "magnitude", "sparsegpt"])
@pytest.mark.parametrize("reconstruct", ["none", "admm"])
def test_methods_and_reconstructions_combine(method, reconstruct, tiny, text, tmp_path):
    report = run(tiny("llama"), tmp_path / "out", text, method=method, reconstruct=reconstruct)
    assert list(Reader(tmp_path / "out").problems()) == []
    assert len(report["linears"]) == 14
    for record in report["linears"].values():
        if method != "sparsegpt":
            assert record["retained_after"] >= record["retained_before"] > 0.5
        if reconstruct == "admm":
            assert record["error_after"] < record["error_before"]


@pytest.mark.parametrize("cache", ["cpu", "disk"])
def test_same_bytes_again(cache, tiny, text, tmp_path):
    run(tiny("llama"), tmp_path / "one", text)
    run(tiny("llama"), tmp_path / "two", text, Settings(activation_cache=cache))
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    run(tiny("llama"), tmp_path / "other", text, seed=1)
    assert digests(tmp_path / "one") != digests(tmp_path / "other")


@pytest.mark.parametrize(("pattern", "permute"), [("4:8", "lsa"), ("1:4", "none"), ("unstructured:0.25", "none")])
def test_other_patterns_become_plain_dense_folders(pattern, permute, tiny, text, tmp_path):
    from transformers import AutoModelForCausalLM

    run(tiny("llama"), tmp_path / "out", text, pattern=Pattern.parse(pattern), permute=permute)
    assert [file.name for file in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]
    assert not [name for name in tensor_names(tmp_path / "out" / "model.safetensors") if "permutation" in name]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    parsed = Pattern.parse(pattern)
    weight = model.model.layers[1].mlp.down_proj.weight
    groups = (weight != 0).view(len(weight), -1, parsed.m or weight.shape[1])
    if permute != "none":  # the groups are in a permuted order
        assert (weight != 0).float().mean() == parsed.density
        return
    assert bool((groups.sum(-1) == round(groups.shape[-1] * parsed.density)).all())
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_ignored_linears_take_their_fused_partners_along(tiny, text, tmp_path):
    run(tiny("llama"), tmp_path / "out", text, ignore=(r"layers\.0\.self_attn\.k_proj", "down"), reconstruct="none")
    reader = Reader(tmp_path / "out")
    assert set(reader.schema.sparsity_config.ignore) == {
        "lm_head", *(f"model.layers.0.self_attn.{x}_proj" for x in "qkv"),
        *(f"model.layers.{i}.mlp.down_proj" for i in (0, 1)),
    }  # fmt: skip
    assert "model.layers.0.self_attn.q_proj" not in reader.sparse_names
    assert "model.layers.1.self_attn.q_proj" in reader.sparse_names
    assert list(reader.problems()) == []


def test_linears_with_unsuitable_in_features_stay_dense(make_model, text, tmp_path):
    make_model(tmp_path / "in", "llama", intermediate_size=200)
    report = run(tmp_path / "in", tmp_path / "out", text, reconstruct="none")
    assert "200 in-features" in report["dense"]["model.layers.1.mlp.down_proj"]
    assert list(Reader(tmp_path / "out").problems()) == []
