"""int8 weights from `compress` to every reader: the oracle is plain rounding to 255 levels per row, in float64."""

import pytest
import torch
from damage import rewrite

from ria_vllm import sparse24
from ria_vllm.checkpoint import Reader
from ria_vllm.errors import RiaError
from ria_vllm.export import export_dense
from ria_vllm.inventory import take_inventory
from ria_vllm.offline.compress import Settings, compress
from ria_vllm.offline.pruning.masks import Pattern
from ria_vllm.offline.recipe import Recipe
from ria_vllm.progress import Monitor

NAME = "model.layers.1.mlp.gate_proj"


def run(model, out, text, **options):
    recipe = Recipe(**{"calibration": str(text), "samples": 4, "seq_len": 32, "method": "magnitude"} | options)
    compress(str(model), out, recipe, Settings(), Monitor(shown=False))
    return out


@pytest.fixture(scope="module")
def pruned(tiny, text, tmp_path_factory):
    """The same model pruned alike, in float32 and with int8 weights."""
    folder = tmp_path_factory.mktemp("int8")
    return [run(tiny("llama"), folder / w, text, reconstruct="none", weights=w) for w in ("float", "int8")]


def test_each_row_is_rounded_to_255_levels(pruned):
    exact, rounded = map(Reader, pruned)
    assert list(rounded.problems()) == []
    assert rounded.dense_names == exact.dense_names
    for name in exact.sparse_names:
        want, linear = exact.linear(name), rounded.linear(name)
        assert torch.equal(want.parts["bitmask"], linear.parts["bitmask"]), name
        assert linear.parts["compressed"].dtype == torch.int8 and linear.dtype == torch.float32
        weight = want.dense().double()
        step, largest = linear.parts["weight_scale"].double(), weight.abs().amax(1, keepdim=True)
        assert (step <= largest / 127 * (1 + 1e-6)).all() and (step > 0.3 * largest / 127).all()
        off, clipped = (linear.dense().double() - weight).abs() / step, weight.abs() > 127.5 * step
        assert off[~clipped].max() <= 0.5 + 1e-4 and off.max() > 0.4 and clipped.double().mean() < 0.05, name
        assert (linear.dense()[weight == 0] == 0).all()


def test_sizes(pruned):
    exact, rounded = (take_inventory(Reader(folder)).totals for folder in pruned)
    assert rounded.linear_dense_bytes == exact.linear_dense_bytes
    # 8 instead of 32 bits for every second weight, and 4 bytes per row more.
    reader = Reader(pruned[1])
    shapes = [reader.linear(name).shape for name in reader.sparse_names]
    assert exact.linear_bytes - rounded.linear_bytes == sum(r * c // 2 * 3 - 4 * r for r, c in shapes)


def test_export_and_transformers_read_the_same_weights(pruned, tmp_path):
    import transformers

    import ria_vllm  # noqa: F401 - registers the quantizer

    export_dense(Reader(pruned[1]), tmp_path / "dense", 10**9)
    want = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense").state_dict()
    found = transformers.AutoModelForCausalLM.from_pretrained(pruned[1]).state_dict()
    assert want.keys() == found.keys()
    assert all(torch.equal(want[name], found[name]) for name in want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_the_layers_saw_is_what_is_stored(dtype, make_model, text, tmp_path):
    """Rounded to the model's own dtype once, and back to the same integers."""
    model = make_model(tmp_path / "model", "llama", dtype=dtype)
    reader = Reader(run(model, tmp_path / "out", text, weights="int8"))
    assert list(reader.problems()) == []
    for name in reader.sparse_names:
        linear = reader.linear(name)
        assert linear.dtype == dtype
        again = (linear.stored().float() / linear.parts["weight_scale"]).round()
        assert torch.equal(again, sparse24.decompress(linear.parts["compressed"].float(), linear.parts["bitmask"]))
        assert again.abs().max() == 127, name


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t.pop(f"{NAME}.weight_scale"), "weight_scale is missing"),
        (lambda t: t.update({f"{NAME}.weight_scale": t[f"{NAME}.weight_scale"][:-1].clone()}), "weight_scale has"),
        (lambda t: t.update({f"{NAME}.weight_scale": t[f"{NAME}.weight_scale"].double()}), "weight_scale has"),
        (lambda t: t[f"{NAME}.weight_scale"].fill_(float("nan")), "not positive and finite"),
        (lambda t: t[f"{NAME}.weight_scale"].neg_(), "not positive and finite"),
        (lambda t: t.update({f"{NAME}.compressed": t[f"{NAME}.compressed"].float()}), "dtype float32, expected int8"),
        (lambda t: t.update({f"{NAME}.compressed": t[f"{NAME}.compressed"].short()}), "dtype int16"),
    ],
)
def test_damage_is_found_by_layer(change, words, pruned, tmp_path):
    import shutil

    shutil.copytree(pruned[1], tmp_path / "out")
    rewrite(tmp_path / "out" / "model.safetensors", change)
    with pytest.raises(RiaError, match=words) as found:
        Reader(tmp_path / "out").linear(NAME)
    assert NAME in str(found.value)


def test_other_patterns_have_no_int8():
    with pytest.raises(RiaError, match="--weights int8 is for the pattern 2:4"):
        Recipe(pattern=Pattern.parse("4:8"), weights="int8")
    with pytest.raises(RiaError, match="choose one of float, int8"):
        Recipe(weights="int2")
