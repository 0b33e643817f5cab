"""Training of sublayers, and of integer weights, from `compress` to the reader."""

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from compressing import digests, interrupted_after_a_layer
from families import save_tokenizer
from transformers import AutoModelForCausalLM
from zoo.toy import build
from zoo.toys import TOYS

from ria_vllm.checkpoint.reader import Reader
from ria_vllm.format.formats import IntFormat
from ria_vllm.offline.recipe import Recipe
from ria_vllm.offline.run import compress as compressing
from ria_vllm.offline.run.compress import Settings, compress
from ria_vllm.offline.run.layers import LayerPass
from ria_vllm.offline.sublayer import train
from ria_vllm.offline.sublayer.pruned_linear import Pruned, packed
from ria_vllm.offline.sublayer.train import after_training
from ria_vllm.progress import Monitor


def compressed(source, out, text, settings=Settings(), **options):
    recipe = Recipe(calibration=str(text), **({"samples": 32, "seq_len": 32} | options))
    report = compress(str(source), out, recipe, settings, Monitor(shown=False))
    reader = Reader(out)
    assert list(reader.problems()) == []
    return reader, report["linears"]


@pytest.fixture
def rounding(monkeypatch):
    """What a run calibrates on, and what it rounds, in order."""
    seen = SimpleNamespace(tokens=None, grams=[], exact=[], scales=[])
    real, texts = train.round_on_mask, compressing.calibration_tokens

    def read(source, model, recipe, *arguments):
        tokens = texts(source, model, recipe, *arguments)
        seen.tokens = tokens[: recipe.samples]  # nothing is fitted to the others
        return tokens

    def watched(weight, solved, mask, objective, *arguments):
        seen.grams.append(objective.gram.dense())
        seen.exact.append(weight.clone())
        seen.scales.append(objective.divided_by)
        return real(weight, solved, mask, objective, *arguments)

    monkeypatch.setattr(compressing, "calibration_tokens", read)
    monkeypatch.setattr(train, "round_on_mask", watched)
    return seen


def test_errors_count_as_the_norms_that_read_the_stream_see_them():
    """4 of 64 channels hold nearly all of the stream, as in Gemma 3, and norms read them with small gains."""
    draw = torch.Generator().manual_seed(0)
    sizes = torch.ones(64).index_fill(0, torch.tensor([3, 9, 10, 40]), 500.0)
    targets = [torch.randn(2, 30, 64, generator=draw) * sizes for _ in range(3)]
    norms = [torch.nn.RMSNorm(64, eps=0.0) for _ in range(2)]
    for norm, power in zip(norms, (1.0, 0.5), strict=True):
        norm.weight.data = (torch.rand(64, generator=draw) + 0.5) / sizes**power
    weights = train.channel_weights(targets, [norm.weight.data for norm in norms])
    error, other = torch.randn(2, 64, generator=draw)
    tokens = torch.cat(targets).flatten(0, 1)
    tokens /= tokens.norm(dim=-1, keepdim=True)
    seen = [[((norm.weight * e).norm() / (norm.weight * tokens).norm()) ** 2 for e in (error, other)] for norm in norms]
    one, two = map(sum, zip(*seen, strict=True))
    found = ((error.square() * weights).sum() / (other.square() * weights).sum()).item()
    torch.testing.assert_close(found, (one / two).item(), rtol=1e-4, atol=0)
    assert train.channel_weights(targets, []) is None


IN_ORDER = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]


@pytest.mark.parametrize(
    ("reconstruct", "options"),
    [
        ("block", {"weights": "int8"}),
        ("short", {"weights": "int4", "group_size": 64}),
        ("short", {"weights": "int8", "activations": "int8"}),
    ],
    ids=["int8", "int4-g64", "int8, inputs too"],
)
def test_what_was_trained_is_rounded_on_what_it_reads(options, reconstruct, tiny, text, tmp_path, rounding):
    """The oracle is transformers' forward pass on the calibration text, in float32: of the result, or for int8 of the
    trained model, of which only one sublayer is rounded."""
    source = tiny("llama")
    reader, records = compressed(source, tmp_path / "int", text, reconstruct=reconstruct, **options)
    names = [f"model.layers.{layer}.{name}" for layer in (0, 1) for name in IN_ORDER]
    assert len(rounding.grams) == len(names) == len(records)
    model, dense = (AutoModelForCausalLM.from_pretrained(x, dtype=torch.float32) for x in (tmp_path / "int", source))
    model.set_input_embeddings(dense.get_input_embeddings())  # nothing was trained or rounded on those in int8
    linears = {name: model.get_submodule(name) for name in names}
    read = {}
    for name, module in linears.items():
        module._forward_pre_hooks.clear()  # what rounds inputs
        module.register_forward_pre_hook(lambda _, given, name=name: read.__setitem__(name, given[0].flatten(0, 1)))
    inputs = {}
    for sublayer in {name.rpartition(".")[0] for name in names}:
        for name, exact in zip(names, rounding.exact, strict=True):
            trained = options["weights"] == "int8" and not name.startswith(sublayer)
            linears[name].weight.data = exact.float() if trained else reader.dense(name).float()
        with torch.no_grad():
            model(rounding.tokens)
        inputs |= {name: X for name, X in read.items() if name.startswith(sublayer)}
    smoothed = [name for name, scales in zip(names, rounding.scales, strict=True) if scales is not None]
    assert smoothed == [name for name in names if "smoothed" in records[name]]
    assert bool(smoothed) == ("activations" in options)
    weight_format = reader.linear(names[0]).format
    assert isinstance(weight_format, IntFormat)
    for name, gram, exact in zip(names, rounding.grams, rounding.exact, strict=True):
        X = inputs[name].double()
        assert torch.allclose(gram.double(), X.T @ X, rtol=1e-3, atol=1e-3 * float(gram.diagonal().max())), name
        stored, p = reader.dense(name).double(), reader.linear(name).input_permutation
        wanted = X @ exact.double().T
        off = float((X @ stored.T - wanted).norm() / wanted.norm())
        assert records[name]["rounding_error"] == pytest.approx(off, rel=0.02), name
        p = torch.arange(exact.shape[1]) if p is None else p.long()
        plain = weight_format.quantize(exact[:, p], torch.float32)[0][:, p.argsort()]
        nearest = float((X @ plain.double().T - wanted).norm() / wanted.norm())
        assert 0 < off < nearest, name


def test_scales_migrate_after_training_so_that_it_is_that_of_float_weights(tiny, text, tmp_path):
    """The oracle is transformers' forward pass, inputs not rounded: what the scales change, their inverses undo."""
    floats, _ = compressed(tiny("llama"), tmp_path / "float", text, reconstruct="short")
    integers, records = compressed(
        tiny("llama"), tmp_path / "int", text, reconstruct="short", weights="int8", activations="int8"
    )
    assert {name.rpartition("_")[0][-4:] for name, record in records.items() if "smoothed" in record} > {"down", "gate"}
    for name in records:
        one, other = floats.linear(name), integers.linear(name)
        assert torch.equal(one.parts["bitmask"], other.parts["bitmask"]), name
        assert torch.equal(one.input_permutation, other.input_permutation), name
    logits = []
    for folder in ("float", "int"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype=torch.float32)
        for module in model.modules():
            module._forward_pre_hooks.clear()  # what rounds inputs
        with torch.no_grad():
            logits.append(model(torch.arange(60)[None]).logits)
    assert (logits[0] - logits[1]).norm() < 0.05 * logits[0].norm()


@pytest.mark.parametrize(
    ("losses", "is_trained"), [((2.0, 1.0), True), ((1.0, 2.0), False), ((1.0, math.nan), False), (None, False)]
)
def test_a_weight_whose_loss_did_not_fall_stays_as_it_was(losses, is_trained):
    start = Pruned(torch.zeros(2, 4, dtype=torch.bfloat16), packed(torch.ones(2, 4, dtype=torch.bool)), None, {"a": 1})
    found = after_training(start, torch.ones(2, 4), losses)
    assert torch.equal(found.weight, torch.full((2, 4), float(is_trained), dtype=torch.bfloat16))
    assert found.record | {"block_loss": None} == {"a": 1, "block_loss": None, "trained": is_trained}
    assert start.record == {"a": 1} and repr(found.record["block_loss"]) == repr(losses and list(losses))


@pytest.mark.parametrize(
    ("family", "reconstruct", "dtype"),
    [("llama", "short", "bfloat16"), ("llama", "block", "float32"), ("qwen3-moe", "block", "bfloat16")],
)
def test_what_training_did_not_better_is_what_admm_wrote(
    family, reconstruct, dtype, make_model, text, tmp_path, monkeypatch
):
    """In a checkpoint of the dtype that is computed in, whose weights need no copy to be trained."""
    losses = itertools.count(1.0)
    monkeypatch.setattr(train, "_held_out_loss", lambda *_: next(losses))
    monkeypatch.setattr(Recipe, "damping", 0.5)  # of all, trained or not
    source = make_model(tmp_path / "dense", family, dtype=getattr(torch, dtype))
    found = {}
    for name in ("admm", reconstruct):
        options = {"reconstruct": name, "compute_dtype": dtype, "rotate": "heads"}
        recipe = Recipe(calibration=str(text), samples=8, seq_len=32, **options)
        compress(str(source), tmp_path / name, recipe, Settings(), Monitor(shown=False))
        found[name] = Reader(tmp_path / name)
    assert found["admm"].sparse_names == found[reconstruct].sparse_names
    for name in found["admm"].sparse_names:
        assert torch.equal(found["admm"].dense(name), found[reconstruct].dense(name)), name


def test_a_router_that_the_model_keeps_in_float32_stays_so(text, tmp_path, monkeypatch):
    """Beside layers in bfloat16, as in ERNIE 4.5. Rounded, it chose other experts than in a resumed run."""
    toy = TOYS["ernie4_5_moe"]
    sparse = {"moe_layer_start_index": 0, "mlp_layer_types": ["sparse", "sparse"]}
    dense = build("ernie4_5_moe", replace(toy, settings=toy.settings | sparse), tmp_path / "float32")
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16)
    model.save_pretrained(source := tmp_path / "dense")
    save_tokenizer(source)
    wanted = {name: parameter.dtype for name, parameter in model.model.layers[0].named_parameters()}
    assert set(wanted.values()) == {torch.float32, torch.bfloat16} and wanted["mlp.gate.weight"] == torch.float32
    found = []

    def freed(self, index):
        found.append({name: parameter.dtype for name, parameter in self.model.layers[index].named_parameters()})
        real(self, index)

    real = LayerPass._free
    monkeypatch.setattr(LayerPass, "_free", freed)
    options = {"samples": 8, "compute_dtype": "bfloat16", "weights": "int8"}
    _, records = compressed(source, tmp_path / "whole", text, **options)
    assert any(record.get("trained") for name, record in records.items() if "self_attn" in name)
    for one in found:
        assert one == {name: wanted[name] for name in one} and "mlp.gate.weight" in one
    with interrupted_after_a_layer():
        compressed(source, tmp_path / "resumed", text, **options)
    compressed(source, tmp_path / "resumed", text, Settings(resume=True), **options)
    assert digests(tmp_path / "resumed") == digests(tmp_path / "whole")
