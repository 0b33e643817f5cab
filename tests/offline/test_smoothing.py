"""Scales of inputs that migrate during `compress`, read back from the folder and compared with the dense model."""

from pathlib import Path

import pytest
import torch
from compressing import TOKENS, digests, edit_weights, interrupted_after_a_layer, run_small
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ria_vllm.checkpoint.reader import Reader
from ria_vllm.export import export_dense
from ria_vllm.offline.recipe import Recipe
from ria_vllm.offline.run import plan
from ria_vllm.offline.run.compress import Settings

INT8 = {"weights": "int8", "activations": "int8"}
LAYER = "model.layers.1."


def gain_of(tensors: dict[str, torch.Tensor], name: str, offset: int) -> torch.Tensor:
    return tensors[f"{LAYER}{name}.weight"].double() + offset


@pytest.mark.parametrize("family, offset, norm, dtype", [
    ("llama", 0, "post_attention_layernorm", torch.float32), ("gemma3", 1, "pre_feedforward_layernorm", torch.bfloat16),
])  # fmt: skip
def test_what_norms_and_producers_lose_columns_gain(family, offset, norm, dtype, make_model, text, tmp_path):
    model = make_model(tmp_path / "model", family, dtype=dtype)
    report, _ = run_small(model, tmp_path / "out", text, **INT8)
    dense = load_file(model / "model.safetensors")
    export_dense(Reader(tmp_path / "out"), tmp_path / "dense", 10**9)
    found = load_file(tmp_path / "dense" / "model.safetensors")
    for name, readers in {
        "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj"),
        norm: ("mlp.gate_proj",),
    }.items():
        assert found[f"{LAYER}{name}.weight"].dtype == dtype
        scales = gain_of(dense, name, offset) / gain_of(found, name, offset)
        if not offset:
            assert torch.equal(scales.log2(), scales.log2().round())
        for reader in readers:
            check(tmp_path / "out", found, dense, reader, scales)
            assert report["linears"][LAYER + reader]["smoothed"] == LAYER + name
    assert report["linears"][f"{LAYER}mlp.down_proj"]["smoothed"] == f"{LAYER}mlp.up_proj"
    assert report["linears"][f"{LAYER}self_attn.o_proj"]["smoothed"] == f"{LAYER}self_attn.v_proj"
    assert report["smoothed"] == {"linears": 14, "left": 0}


def check(folder, found, dense, name, scales):
    """The kept weights are the dense ones times the scales, but for their rounding to int8."""
    have, want = found[f"{LAYER}{name}.weight"].double(), dense[f"{LAYER}{name}.weight"].double() * scales
    migrated = scales.log2().abs() > 0.9
    assert migrated.sum() > 2
    step = Reader(folder).linear(f"{LAYER}{name}").parts["weight_scale"].double()
    kept = (have != 0) & migrated
    assert ((have - want).abs() / step)[kept].median() < 0.4
    assert ((have - dense[f"{LAYER}{name}.weight"].double()).abs() / step)[kept].median() > 4


def outliers(tensors: dict[str, torch.Tensor]) -> None:
    """Norms, values and up projections with a few channels that are a hundred times larger; the dense function is that
    of a model without them."""
    torch.manual_seed(1)

    def factors(count: int) -> torch.Tensor:
        return torch.where(torch.rand(count) < 0.05, 100.0, 1.0)

    for index in range(2):
        at, mlp = (f"model.layers.{index}.{part}." for part in ("self_attn", "mlp"))
        for norm, readers in (
            ("input_layernorm", [at + "q_proj", at + "k_proj", at + "v_proj"]),
            ("post_attention_layernorm", [mlp + "gate_proj", mlp + "up_proj"]),
        ):
            gain = factors(128)
            tensors[f"model.layers.{index}.{norm}.weight"] *= gain
            for name in readers:
                tensors[f"{name}.weight"] /= gain
        gain = factors(192)
        tensors[mlp + "up_proj.weight"] *= gain[:, None]
        tensors[mlp + "down_proj.weight"] /= gain
        gain = factors(64)  # two key-value heads, each for two of the four query heads
        tensors[at + "v_proj.weight"] *= gain[:, None]
        tensors[at + "o_proj.weight"] /= gain.view(2, 1, 32).expand(2, 2, 32).flatten()


def logits_of(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(TOKENS).logits


def test_outliers_cost_less(model, text, tmp_path):
    """The error that rounding the inputs adds to the logits of the same pruned weights."""
    before = logits_of(model)
    edit_weights(model, outliers)
    torch.testing.assert_close(logits_of(model), before, rtol=1e-3, atol=1e-3)
    errors = {}
    for smooth in (0.0, 0.5):
        out, dense = tmp_path / f"out-{smooth}", tmp_path / f"dense-{smooth}"
        run_small(model, out, text, smooth=smooth, reconstruct="admm", **INT8)
        export_dense(Reader(out), dense, 10**9)  # which rounds no inputs
        exact = logits_of(dense)
        errors[smooth] = float((logits_of(out) - exact).norm() / exact.norm())
    assert errors[0.5] < errors[0.0] / 3, errors


@pytest.fixture
def floats_stay_dense(monkeypatch):
    """As linears do that cannot be stored in int8."""
    monkeypatch.setattr(plan, "_can_be_rounded", lambda *_: False)


@pytest.mark.parametrize("reconstruct", ["block"])
def test_producers_that_stay_dense_absorb_scales(reconstruct, model, text, tmp_path, floats_stay_dense):
    """Also when the run is resumed."""
    options = INT8 | {"ignore": (r"\.0\..*[qkv]_proj", r"\.1\..*(gate|up)_proj"), "reconstruct": reconstruct}
    run_small(model, tmp_path / "whole", text, **options)
    dense, found = load_file(model / "model.safetensors"), load_file(tmp_path / "whole" / "model.safetensors")
    # No linear of these groups is pruned, so nothing migrates into their norms; what reads the producers is.
    for name in ("model.layers.0.input_layernorm", "model.layers.1.post_attention_layernorm"):
        assert torch.equal(found[f"{name}.weight"], dense[f"{name}.weight"])
    for name in ("model.layers.0.self_attn.v_proj", "model.layers.1.mlp.up_proj"):
        rows = (dense[f"{name}.weight"] / found[f"{name}.weight"]).nanmedian(1).values
        assert torch.equal(rows[:, None] * found[f"{name}.weight"], dense[f"{name}.weight"]) and (rows != 1).any()
    with interrupted_after_a_layer():
        run_small(model, tmp_path / "out", text, **options)
    run_small(model, tmp_path / "out", text, Settings(resume=True), **options)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_a_group_of_which_one_linear_stays_dense(make_model, text, tmp_path):
    """Attention and MLP read one norm, and only the MLP's linear is pruned. The others are in int8."""
    model = make_model(tmp_path / "model", "cohere2", dtype=torch.bfloat16)
    options = INT8 | {"ignore": ("q_proj", "k_proj", "v_proj")}
    run_small(model, tmp_path / "out", text, **options)
    dense, found = load_file(model / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    norm, q = f"{LAYER}input_layernorm.weight", f"{LAYER}self_attn.q_proj"
    scales = dense[norm].double() / found[norm].double()
    got, want = found[f"{q}.integers"] * found[f"{q}.weight_scale"].double(), dense[f"{q}.weight"].double() * scales
    assert (scales != 1).any() and (got - want).norm() < 0.02 * want.norm()


def test_a_dense_linear_that_would_be_rounded_keeps_its_group_as_it_is(make_model, text, tmp_path, floats_stay_dense):
    """The scales that Gemma's norms can be divided by have many digits."""
    model = make_model(tmp_path / "model", "gemma3", dtype=torch.bfloat16)
    report, _ = run_small(model, tmp_path / "out", text, ignore=("q_proj", "k_proj", "v_proj"), **INT8)
    dense, found = load_file(model / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    for name in ("input_layernorm", "self_attn.q_proj", "self_attn.k_proj"):
        assert torch.equal(found[f"{LAYER}{name}.weight"], dense[f"{LAYER}{name}.weight"])
    assert report["smoothed"]["linears"] == 8


def test_without_it_every_other_tensor_is_the_sources(model, text, tmp_path):
    report, _ = run_small(model, tmp_path / "out", text, smooth=0.0, **INT8)
    dense, found = load_file(model / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], dense[name]) for name in dense if "norm" in name)
    assert "smoothed" not in report and not any("smoothed" in record for record in report["linears"].values())


@pytest.mark.parametrize("family", ["phi3", "opt", "deepseek-v3", "qwen3.5"])
def test_the_function_of_the_pruned_model_is_the_same(family, tiny, text, tmp_path, monkeypatch):
    """With weights that are not rounded, which `compress` does not offer, and the orders and masks of before."""
    logits = []
    for strength in (0.0, 0.8):
        monkeypatch.setattr(Recipe, "migration_strength", strength)
        out, dense = tmp_path / f"out-{strength}", tmp_path / f"dense-{strength}"
        report, _ = run_small(tiny(family), out, text)
        assert ("smoothed" in report) == bool(strength)
        export_dense(Reader(out), dense, 10**9)
        logits.append(logits_of(dense))
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-3, atol=1e-3)
    assert report["smoothed"]["linears"] >= 4
