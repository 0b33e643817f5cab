"""`compress` from end to end, on tiny models of every family."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from compressing import digests
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ria_vllm.checkpoint.reader import Reader
from ria_vllm.errors import RiaError
from ria_vllm.folder_commands import inspect
from ria_vllm.offline.recipe import Recipe
from ria_vllm.offline.run.compress import Settings, compress
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
    permutations: dict[str, set[tuple[int, ...]]] = {}  # of the linears that share an input
    for name in set(reader.sparse_names) - consumers if family != "qwen3-moe" else ():
        parent = name.rpartition(".")[0] if "proj" in name else name
        permutations.setdefault(parent, set()).add(tuple(reader.permutations[name].tolist()))
    assert all(len(found) == 1 for found in permutations.values())


def test_an_order_that_nothing_absorbs_keeps_to_blocks(tiny, text, tmp_path, monkeypatch):
    """LFM2's convolution has weights of its own for each channel. Tensor parallelism cuts its output's channels."""
    said = []
    monkeypatch.setattr(Monitor, "say", lambda self, text: said.append(text))
    report = run(tiny("lfm2"), tmp_path / "out", text, reconstruct="none", samples=4)
    name = "model.layers.0.conv.out_proj"
    p = Reader(tmp_path / "out").permutations[name].long()
    assert torch.equal(p.view(8, 16) // 16, torch.arange(8)[:, None].expand(8, 16))
    assert not torch.equal(p, torch.arange(128))
    record = report["linears"][name]
    before, after = (record[f"retained_{kind}"] for kind in ("before", "after"))
    assert before < after and f"{name}: retained score {before:.4f} -> {after:.4f}" in said
    first, second = Reader(tmp_path / "out").schema.recipe["topology"]
    assert (first["layers"], second["layers"]) == ([0], [1])
    assert first["sublayers"][0]["stages"][1][0]["within_ranks"]


def test_the_recipe_keeps_what_experiments_found_and_only_programs_see_it(tiny, text, tmp_path):
    run(tiny("llama"), tmp_path / "out", text, reconstruct="none", samples=4)
    (kind,) = Reader(tmp_path / "out").schema.recipe["topology"]
    assert kind["layers"] == [0, 1] and kind["dense"] == {}
    stages = [[group["linears"] for group in stage] for part in kind["sublayers"] for stage in part["stages"]]
    assert stages == [
        [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]], [["self_attn.o_proj"]],
        [["mlp.gate_proj", "mlp.up_proj"]], [["mlp.down_proj"]],
    ]  # fmt: skip
    folds = {fold["consumer"]: [producer["name"] for producer in fold["producers"]] for fold in kind["folds"]}
    assert folds == {"self_attn.o_proj": ["self_attn.v_proj"], "mlp.down_proj": ["mlp.gate_proj", "mlp.up_proj"]}
    assert json.loads((tmp_path / "out" / "ria_report.json").read_text())["recipe"]["topology"] == [kind]
    shown = CliRunner().invoke(inspect, [str(tmp_path / "out")], catch_exceptions=False)
    card = (tmp_path / "out" / "README.md").read_text()
    assert shown.exit_code == 0 and "topology" not in shown.output + card and "| seed |" in card


@pytest.mark.parametrize("family", ["gpt-neox", "qwen3.5", "olmo2", "gemma4", "gemma3n"])
def test_what_a_folded_checkpoint_computes(family, tiny, text, tmp_path):
    """Consumers with their stored columns, producers with the rows that these need: the logits of the dense export."""
    source = tiny(family)
    run(source, tmp_path / "out", text, reconstruct="none", samples=4)
    reader = Reader(tmp_path / "out")
    expected, model = (AutoModelForCausalLM.from_pretrained(source, dtype=torch.float64).eval() for _ in range(2))
    stored = {name: reader.linear(name).stored().double() for name in reader.sparse_names}
    folded = list(reader.schema.active_folds(reader.permuted_names, set(reader.sparse_names)))
    # A layer whose values later ones read, and one that reads them, cannot reorder them; Laurel folds in each layer.
    assert len(folded) == {"qwen3.5": 3, "gemma3n": 8}.get(family, 4)
    with torch.no_grad():
        for name in reader.sparse_names:
            for one in (expected, model):
                one.get_submodule(name).weight.copy_(reader.linear(name).dense())
        for name, fold, producers in folded:
            model.get_submodule(name).weight.copy_(stored[name])
            p = reader.permutations[name].long()
            for producer in producers:
                linear = model.get_submodule(producer.name)
                size, (start, end) = linear.out_features // producer.blocks, producer.rows or (0, linear.out_features)
                rows = [block * size + row for block in range(producer.blocks) for row in range(start, end)]
                if len(rows) < len(p):  # key-value heads: the order of the first query head that reads each
                    heads = p.view(fold.num_kv_heads, -1, len(p) // fold.num_heads)[:, 0]
                    order = heads - heads.min(1, keepdim=True).values
                    order = (order + torch.arange(len(order))[:, None] * order.shape[1]).flatten().tolist()
                else:
                    order = p.tolist()
                for part in (linear.weight, linear.bias):
                    if part is not None:
                        part[rows] = part[[rows[row] for row in order]]
        tokens = torch.arange(2, 60)[None]
        found, wanted = model(tokens).logits, expected(tokens).logits
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


def test_all_readers_accept_a_model_without_any_permutation(make_model, text, tmp_path):
    """Heads of 6 channels do not divide into groups of four, so o_proj, the only pruned linear, keeps its order."""
    from transformers import AutoModelForCausalLM

    from ria_vllm.serve.model.checkpoint_files import files_of, permutations_of

    model = make_model(
        tmp_path / "in", "llama", hidden_size=192, num_attention_heads=32, num_key_value_heads=32, head_dim=6
    )
    out = tmp_path / "out"
    run(model, out, text, reconstruct="none", ignore=("[qkv]_proj", "mlp"))
    reader = Reader(out)
    assert reader.schema.recipe["permute"] == "lsa" and reader.permuted_names == [] and not list(reader.problems())
    assert permutations_of(out, reader.schema, files_of(out)) == {}
    loaded = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert all(torch.equal(loaded[f"{name}.weight"], reader.linear(name).dense()) for name in reader.sparse_names)
    (out / "permutations.safetensors").unlink()
    with pytest.raises(RiaError, match="permutations.safetensors: missing"):
        Reader(out)


@pytest.mark.parametrize(
    ("method", "reconstruct"),
    [("ria", "none"), ("wanda", "admm"), ("magnitude", "admm")],
)
def test_methods_and_reconstructions_combine(method, reconstruct, tiny, text, tmp_path):
    report = run(tiny("llama"), tmp_path / "out", text, method=method, reconstruct=reconstruct)
    assert list(Reader(tmp_path / "out").problems()) == []
    assert len(report["linears"]) == 14
    for record in report["linears"].values():
        assert record["retained_after"] >= record["retained_before"] > 0.5
        if reconstruct == "admm":
            assert record["error_after"] < record["error_before"]


def test_same_bytes_again(tiny, text, tmp_path):
    run(tiny("llama"), tmp_path / "one", text)
    run(tiny("llama"), tmp_path / "two", text)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    run(tiny("llama"), tmp_path / "other", text, seed=1)
    assert digests(tmp_path / "one") != digests(tmp_path / "other")


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
