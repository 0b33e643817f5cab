"""MoE: pruned, written, read back, exported, and interrupted in the middle of a layer's experts."""

import re
import time
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import preloaded
import pytest
import torch
from compressing import digests, edited, run_small
from moe import save_moe
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ria_vllm.checkpoint.inventory import take_inventory
from ria_vllm.checkpoint.reader import Reader
from ria_vllm.errors import RiaError
from ria_vllm.export import export_dense
from ria_vllm.hf.experts_layout import ExpertsLayout
from ria_vllm.offline.experts import prune
from ria_vllm.offline.experts.plan import describe_experts
from ria_vllm.offline.experts.store import RoutedExperts
from ria_vllm.offline.model.experts.files import ExpertFiles
from ria_vllm.offline.run import compress, layers
from ria_vllm.offline.run.compress import Settings

TOKENS = torch.arange(2, 60)[None]

# One expert's linears on disk, in layer 1.
NAMES = {
    "mixtral": "model.layers.1.block_sparse_moe.experts.3.w2",
    "granitemoe": "model.layers.1.block_sparse_moe.experts.3.gate_proj",
    "gemma4_text": "model.layers.1.experts.3.gate_proj",
    "nemotron_h": "backbone.layers.1.mixer.experts.3.up_proj",
    "llama4_text": "model.layers.1.feed_forward.experts.3.gate_proj",
}

# Whose layers have an expert that all tokens go to, beside those that the router chooses.
SHARED_EXPERT = ("qwen2_moe", "qwen3_next", "deepseek_v3", "nemotron_h", "llama4_text")
FAMILIES = (*SHARED_EXPERT, "mixtral", "granitemoe", "gemma4_text", "gpt_oss")  # `make test-zoo` has all


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    """kind -> folder of a tiny float32 model. Do not write into it."""
    return cache(lambda kind: save_moe(tmp_path_factory.mktemp(kind) / "dense", kind))


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(TOKENS, use_cache=False).logits


def assert_same_model(*folders: Path) -> None:
    """Loaded by transformers, both have the same weights bit by bit, and compute the same."""
    one, other = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict() for folder in folders)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    # Linear attention rounds differently where memory is aligned differently.
    torch.testing.assert_close(*map(logits, folders), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_pruned_with_its_experts_and_exported_as_it_was(moe, text, tmp_path, family):
    source = moe(family)
    report, _ = run_small(source, tmp_path / "out", text)
    reader = Reader(tmp_path / "out")
    assert list(reader.problems()) == []
    expected = NAMES.get(family, "model.layers.1.mlp.experts.3.gate_proj")
    assert {expected, expected.replace("layers.1", "layers.0")} <= set(reader.sparse_names)
    experts = [name for name in reader.sparse_names if ".experts." in name]
    assert len(experts) == 2 * 4 * (2 if family == "nemotron_h" else 3)  # without a gate
    assert all("tokens" in report["linears"][name] for name in experts)
    assert any(why == "chooses experts" for why in report["dense"].values())
    assert not [name for name in report["dense"] if ".experts" in name]
    folded = {name for name, _, _ in reader.schema.active_folds(reader.permuted_names, set(reader.sparse_names))}
    down = next(fold for fold in reader.schema.folds if "{e}" in fold.consumer)
    downs = {name for name in reader.permuted_names if down.numbers(name) is not None}
    assert downs and downs <= folded
    original = load_file(source / "model.safetensors")
    beside = [name.removesuffix(".weight") for name in original if re.search(r"\.shared_experts?\.\w+\.", name)]
    assert bool(beside) == (family in SHARED_EXPERT)
    first = [name for name in experts + beside if name.endswith(("gate_proj", "up_proj", "w1", "w3"))]
    permutations = {(name.split(".")[2], tuple(reader.permutations[name].tolist())) for name in first}
    # One for all experts of a layer. Llama 4's routed experts read something else: the stream, weighted by the router.
    assert len(permutations) == (4 if family == "llama4_text" else 2)

    export_dense(reader, tmp_path / "dense", 1 << 40)
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    assert set(dense) == set(original)
    halved = 0
    for name, tensor in dense.items():
        assert tensor.shape == original[name].shape and torch.equal(tensor, original[name] * (tensor != 0)), name
        halved += tensor.numel() * (float((tensor == 0).float().mean()) == 0.5)
    assert_same_model(tmp_path / "out", tmp_path / "dense")
    assert not torch.allclose(logits(tmp_path / "out"), logits(source), atol=1e-2)
    totals = take_inventory(reader)["totals"]
    assert totals["linears"] == len(reader.sparse_names) and abs(totals["sparsity"] - 0.5) < 1e-9
    counted = [name for name in original if ".layers." in name and original[name].dim() > 1]
    in_layers = sum(original[name].numel() for name in counted)
    assert halved / in_layers > 0.95


@pytest.mark.parametrize("options", [{}, {"reconstruct": "block", "weights": "int8"}], ids=str)
def test_stopped_in_the_middle_of_the_experts_and_resumed(options, moe, text, tmp_path, monkeypatch):
    run_small(moe("qwen2_moe"), tmp_path / "whole", text, **options)
    write, done = RoutedExperts.write, []

    def interrupted(*arguments):
        write(*arguments)
        done.append((arguments[0].index, arguments[0].path, arguments[1]))
        if len(done) in (3, 6):  # in the first layer, then in the second one
            raise KeyboardInterrupt

    monkeypatch.setattr(RoutedExperts, "write", interrupted)
    for resume in (False, True):
        with pytest.raises(KeyboardInterrupt):
            run_small(moe("qwen2_moe"), tmp_path / "out", text, Settings(resume=resume), **options)
    settings = Settings(resume=True)
    run_small(moe("qwen2_moe"), tmp_path / "out", text, settings, **options)
    assert len(done) == 8 == len(set(done))  # no expert was pruned twice
    assert digests(tmp_path / "whole") == digests(tmp_path / "out")


def test_a_resumed_layer_keeps_the_order_that_its_experts_share(moe, text, tmp_path, monkeypatch):
    write, done = RoutedExperts.write, []

    def interrupted(*arguments):
        write(*arguments)
        done.append((arguments[0].index, arguments[0].path, arguments[1]))
        if len(done) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(RoutedExperts, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_small(moe("qwen2_moe"), tmp_path / "out", text)
    search = layers.shared_permutation  # finds another one now, as on another machine
    monkeypatch.setattr(layers, "shared_permutation", lambda *arguments: search(*arguments).flip(0))
    run_small(moe("qwen2_moe"), tmp_path / "out", text, Settings(resume=True))
    permutations = Reader(tmp_path / "out").permutations
    for block in ("layers.0.mlp", "layers.1.mlp"):
        shared = [p for name, p in permutations.items() if block in name and name.endswith(("gate_proj", "up_proj"))]
        assert len(shared) == 10 and all(torch.equal(p, shared[0]) for p in shared)


@pytest.mark.slow
def test_killed_in_the_middle_of_the_experts_and_resumed(text, tmp_path):
    model = save_moe(tmp_path / "in", "qwen3_moe", num_experts=32, num_local_experts=32, num_hidden_layers=3)
    command = ["compress", model, "--data", text, "--samples", 8, "--seq-len", 64, "-o"]
    log = tmp_path / "log"
    preloaded.run(log, preloaded.ria_vllm, *command, tmp_path / "whole")
    out, units = tmp_path / "killed", tmp_path / "killed.partial" / "units"
    for seen in (5, 45):
        with preloaded.started(log, preloaded.ria_vllm, *command, out, "--resume") as (process,):
            while process.is_alive() and len(list(units.glob("layer-*-experts-*.safetensors"))) < seen:
                time.sleep(0.001)
        assert not out.exists() and seen <= len(list(units.glob("layer-*-experts-*.safetensors"))) < 96
    preloaded.run(log, preloaded.ria_vllm, *command, out, "--resume")
    assert digests(tmp_path / "whole") == digests(out)


def test_llama_4s_experts_have_the_statistics_of_weighted_tokens(text, tmp_path, monkeypatch):
    """In the first layer, where nothing is pruned before them; the oracle is transformers' own block in float64."""
    source = save_moe(tmp_path / "in", "llama4_text", num_hidden_layers=1, intermediate_size=64)
    tokens = torch.randint(2, 258, (36, 64), generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(compress, "calibration_tokens", lambda *_: tokens)
    norms, reads = {}, prune._reads

    def seen_reads(experts, expert, with_gram):
        found = reads(experts, expert, with_gram)
        norms[expert] = found.norm
        return found

    monkeypatch.setattr(prune, "_reads", seen_reads)
    ignore = ("self_attn", "shared_expert")
    report, _ = run_small(source, tmp_path / "out", text, ignore=ignore, reconstruct="admm", compute_dtype="float32")
    model, seen = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).double().eval(), []
    block = model.model.layers[0].feed_forward
    block.experts.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(tokens[:32])  # nothing is fitted to the last four
    for expert, read in enumerate(seen[0].chunk(4)):  # zeros where a token does not go to an expert
        record = report["linears"][f"model.layers.0.feed_forward.experts.{expert}.up_proj"]
        assert record["tokens"] == int((read != 0).any(1).sum()) > 64 and "borrowed" not in record
        torch.testing.assert_close(norms[expert].double(), read.square().sum(0).sqrt(), rtol=1e-4, atol=1e-5)


def test_experts_that_get_few_tokens_or_none_lean_on_the_others(moe, text, tmp_path):
    def avoid(tensors):
        tensors["model.layers.1.mlp.gate.e_score_correction_bias"][2] = -1e9

    source = edited(moe("glm4_moe"), tmp_path / "in", avoid)
    report, warnings = run_small(source, tmp_path / "out", text, reconstruct="admm")
    assert any("layers.1.mlp.experts: " in w and "1 of them none" in w for w in warnings)
    tokens = [report["linears"][f"model.layers.0.mlp.experts.{e}.down_proj"]["tokens"] for e in range(4)]
    few = [e for e in range(4) if tokens[e] < 128]
    (warning,) = [w for w in warnings if "layers.0.mlp.experts: " in w and "fewer calibration tokens" in w]
    assert few and f": {len(few)} experts" in warning
    record = report["linears"]["model.layers.1.mlp.experts.2.down_proj"]
    assert record["tokens"] == 0 and record["borrowed"] == 128  # 4 * 32 tokens, and as many inner channels
    reader = Reader(tmp_path / "out")
    assert list(reader.problems()) == [] and reader.dense("model.layers.1.mlp.experts.2.down_proj").isfinite().all()


def test_ignored_experts_stay_dense_together(moe, text, tmp_path):
    report, warnings = run_small(moe("mixtral"), tmp_path / "out", text, ignore=(r"layers.0.*experts.2.w1$",))
    assert report["dense"]["model.layers.0.block_sparse_moe.experts"] == "--ignore"
    assert any("the experts stay dense in model.layers.0.block_sparse_moe.experts: --ignore" in w for w in warnings)
    reader = Reader(tmp_path / "out")
    assert list(reader.problems()) == []
    assert {name.split(".")[2] for name in reader.sparse_names if "experts" in name} == {"1"}
    export_dense(reader, tmp_path / "dense", 1 << 40)
    assert_same_model(tmp_path / "out", tmp_path / "dense")


def test_layers_whose_experts_differ_cannot_be_described():
    leaves = {kind: f"{kind}_proj" for kind in ("gate", "up", "down")}
    files = [
        {"mlp.experts": ExpertFiles(ExpertsLayout("mlp.experts", number, 64, 64), f"layers.{i}.mlp.experts", leaves)}
        for i, number in enumerate((4, 4, 8))
    ]
    model, places = SimpleNamespace(experts=files, folder="here"), ["mlp.experts"]
    (described,) = describe_experts(model, {0: places, 1: places})
    assert described.num_experts == 4 and described.module == "layers.{i}.mlp.experts"
    with pytest.raises(RiaError, match="layers.2.mlp.experts"):
        describe_experts(model, {0: places, 2: places})


def test_experts_of_an_unknown_form_stay_dense_with_a_warning_and_count_as_weights(text, tmp_path):
    report, warnings = run_small(save_moe(tmp_path / "in", "jetmoe", kv_channels=32), tmp_path / "out", text)
    assert "JetMoeParallelExperts" in report["dense"]["model.layers.0.mlp.input_linear"]
    assert any("the experts stay dense in" in warning for warning in warnings)
    reader = Reader(tmp_path / "out")
    tensors = {name: made() for name, made in reader.dense_tensors().items() if re.search(r"\.[0-9]+\.", name)}
    weights = [tensor for tensor in tensors.values() if tensor.dim() > 1]
    zeros = sum(int((tensor == 0).sum()) for tensor in weights) / sum(tensor.numel() for tensor in weights)
    assert reader.schema.sparsity_config.global_sparsity == pytest.approx(zeros, abs=1e-3)


@pytest.mark.parametrize(("kind", "size"), [("gpt_oss", "row"), ("llama4_text", 64), ("mixtral", 32)])
def test_quantized_experts_are_read_as_they_were_written(kind, size, moe, text, tmp_path):
    """Stacked with alternating outputs, or apart, under names that transformers' own patterns match, too."""
    weights = "int8" if size == "row" else "int4"
    run_small(moe(kind), tmp_path / "out", text, weights=weights, group_size=size)
    reader = Reader(tmp_path / "out")
    assert reader.schema.weight_format.name == ("int8" if size == "row" else f"int4-g{size}")
    assert list(reader.problems()) == []
    export_dense(reader, tmp_path / "dense", 1 << 40)
    assert_same_model(tmp_path / "out", tmp_path / "dense")


def removed(name):
    return lambda tensors: {other: tensor for other, tensor in tensors.items() if other != name}


def shrunk(name):
    return lambda tensors: tensors.update({name: tensors[name][:-1].clone()})


def added(name, like):
    return lambda tensors: tensors.update({name: tensors[like].clone()})


EXPERT = "model.layers.1.block_sparse_moe.experts.{}.w1.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (removed(EXPERT.format(2)), "do not have model.layers.1.block_sparse_moe.experts.2.w1"),
        (shrunk(EXPERT.format(2)), "experts.2.w1.weight has shape"),
        (added(EXPERT.format(4), EXPERT.format(2)), "have model.layers.1.block_sparse_moe.experts.4.w1"),
    ],
    ids=["missing", "another shape", "too many"],
)
def test_experts_that_do_not_fit_the_configuration(change, message, moe, text, tmp_path):
    source = edited(moe("mixtral"), tmp_path / "in", change)
    with pytest.raises(RiaError, match=message):
        run_small(source, tmp_path / "out", text)


def test_a_compressed_expert_that_is_missing(moe, text, tmp_path):
    run_small(moe("mixtral"), tmp_path / "out", text, permute="none")
    file = tmp_path / "out" / "model.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    expert = NAMES["mixtral"]
    tensors = {name: tensor for name, tensor in load_file(file).items() if not name.startswith(f"{expert}.")}
    save_file(tensors, file, metadata=metadata)
    assert any(expert in problem and "4 experts" in problem for problem in Reader(file.parent).problems())
    with pytest.raises(RiaError, match=f"{expert} is missing"):
        Reader(file.parent).dense_tensors()
    with pytest.raises(RiaError, match="4 experts"):
        logits(file.parent)


def test_weighted_inputs_of_several_experts_for_each_token(text, tmp_path):
    """vLLM would weight them together, and serving refuses that."""
    report, _ = run_small(save_moe(tmp_path / "in", "llama4_text", num_experts_per_tok=2), tmp_path / "out", text)
    why = "the router weights their inputs, which vLLM serves only with one expert for each token"
    assert [name for name, reason in report["dense"].items() if reason == why] == [
        f"model.layers.{index}.feed_forward.experts" for index in (0, 1)
    ]
