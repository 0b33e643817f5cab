"""Integer weights from `compress` to every reader. The oracle reads the files' own bytes, and rounds in float64."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from compressing import WarningRecorder
from damage import rewrite
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ria_vllm.checkpoint.inventory import take_inventory
from ria_vllm.checkpoint.reader import Reader
from ria_vllm.errors import RiaError
from ria_vllm.folder_commands import export
from ria_vllm.offline.recipe import Recipe
from ria_vllm.offline.run.compress import Settings, compress

HEADS = {"model.embed_tokens", "lm_head"}

# Options -> bits, columns of a group in this model.
WAYS = {
    "int8": ({"weights": "int8"}, 8, None),
    "int8, rows": ({"weights": "int8", "group_size": "row"}, 8, None),
    "int8, 64": ({"weights": "int8", "group_size": 64}, 8, 64),
    "int4": ({"weights": "int4"}, 4, 64),
    "int4, 32": ({"weights": "int4", "group_size": 32, "activations": "int8", "smooth": 0.0}, 4, 32),
    "int4, rows": ({"weights": "int4", "group_size": "row"}, 4, None),
}
each_way = pytest.mark.parametrize("way", WAYS)


def run(model, out, text, settings=Settings(), monitor=None, **options):
    recipe = Recipe(**{"calibration": str(text), "samples": 4, "seq_len": 32, "method": "magnitude"} | options)
    compress(str(model), out, recipe, settings, monitor or WarningRecorder())
    return out


@pytest.fixture(scope="module")
def exact(tiny, text, tmp_path_factory):
    """The model pruned in float32."""
    return run(tiny("llama"), tmp_path_factory.mktemp("exact") / "out", text, reconstruct="none")


@pytest.fixture(scope="module")
def pruned(tiny, text, tmp_path_factory):
    """Way -> the same model pruned alike, with integer weights. Do not write into it."""
    made: dict[str, Path] = {}

    def get(way: str) -> Path:
        if way not in made:
            folder = tmp_path_factory.mktemp("integers") / "out"
            made[way] = run(tiny("llama"), folder, text, reconstruct="none", **WAYS[way][0])
        return made[way]

    return get


def stored(tensors, name, bits):
    """The kept integers [out, in/2], float64, by the definition of the format."""
    compressed = tensors[f"{name}.compressed"]
    if bits == 8:
        assert compressed.dtype == torch.int8
        return compressed.double()
    assert compressed.dtype == torch.uint8
    nibbles = compressed.double()
    low, high = nibbles % 16, (nibbles / 16).floor()
    return torch.stack([low, high], dim=2).flatten(1) - 8


@each_way
def test_each_weight_is_the_nearest_multiple_of_its_scale(pruned, exact, way):
    (_, bits, size), exact, rounded = WAYS[way], Reader(exact), Reader(pruned(way))
    assert list(rounded.problems()) == []
    assert set(rounded.int8_names) == HEADS
    kept = {name for name in rounded.dense_names if name.rpartition(".")[0] not in HEADS}
    assert kept == {*exact.dense_names} - {f"{name}.weight" for name in HEADS}
    largest, tensors = 2 ** (bits - 1) - 1, load_file(rounded.folder / "model.safetensors")
    for name in exact.sparse_names:
        want, linear = exact.linear(name), rounded.linear(name)
        rows, columns = want.shape
        group = (size or columns) // 2
        integers, scales = stored(tensors, name, bits), tensors[f"{name}.weight_scale"]
        assert torch.equal(want.parts["bitmask"], linear.parts["bitmask"]), name
        assert scales.shape == (rows, columns // 2 // group)
        assert scales.dtype == (torch.bfloat16 if size else torch.float32) and linear.dtype == torch.float32
        step = scales.double().repeat_interleave(group, 1)
        off = (integers * step - want.parts["compressed"].double()).abs() / step
        inside = integers.abs() < largest  # scales are chosen by error, and may cut the largest
        assert integers.abs().max() <= largest + (bits == 4)
        assert off[inside].max() <= 0.5 + 1e-4 and off.max() > 0.4 and (off > 0.5001).double().mean() < 0.1, name
        # Every reader's answer, from the bytes.
        decoded = linear.stored()
        assert torch.equal(decoded.double()[decoded != 0], (integers * step).float().double()[integers != 0]), name


@pytest.mark.parametrize("name", sorted(HEADS))
def test_head_and_embedding_are_rounded_row_by_row(name, pruned, exact):
    tensors, weight = load_file(pruned("int4, 32") / "model.safetensors"), Reader(exact).tensor(f"{name}.weight")
    integers, scales = tensors[f"{name}.integers"].double(), tensors[f"{name}.weight_scale"].double()
    used = weight.any(1)  # the row of a padding token is zero
    assert integers.shape == weight.shape and torch.equal(integers.abs().amax(1), 127.0 * used)
    want = weight.double().abs().amax(1, keepdim=True) / 127
    torch.testing.assert_close(scales[used], want[used], rtol=1e-6, atol=0)
    assert ((integers * scales - weight).abs() / scales).max() <= 0.5 + 1e-4


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"weights": "int8", "activations": "int8"}, ["model.embed_tokens"]),
        ({"weights": "int8"}, ["model.embed_tokens"]),
        ({"weights": "int4"}, ["model.embed_tokens"]),
        ({"weights": "fp8", "activations": "fp8"}, []),
        ({}, []),
        ({"weights": "int8", "ignore": ("lm_head",)}, []),
        ({"weights": "int8", "ignore": ("embed_tokens",)}, []),
    ],
    ids=str,
)
def test_a_tied_head_is_stored_once(options, names, tiny, text, tmp_path):
    out = run(tiny("gemma2"), tmp_path / "out", text, smooth=0.0, reconstruct="none", **options)
    reader = Reader(out)
    assert reader.int8_names == names and list(reader.problems()) == []
    assert sorted(n.rpartition(".")[2] for n in reader.files if "embed" in n or "head" in n) == (
        ["integers", "weight_scale"] if names else ["weight"]
    )
    dense = load_file(tiny("gemma2") / "model.safetensors")
    assert take_inventory(reader)["totals"]["dense_bytes"] == sum(tensor.nbytes for tensor in dense.values())


@each_way
def test_export_and_transformers_read_the_same_weights(pruned, way, tmp_path):
    reader = Reader(pruned(way))
    done = CliRunner().invoke(export, [str(reader.folder), "-o", str(tmp_path / "dense")], catch_exceptions=False)
    card = (tmp_path / "dense" / "README.md").read_text()
    assert ("It rounds no inputs." in done.output) == ("this one does not" in card) == ("activations" in WAYS[way][0])
    exported = load_file(tmp_path / "dense" / "model.safetensors")
    assert all(torch.equal(exported[f"{name}.weight"], reader.dense(name)) for name in reader.sparse_names)
    want = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").state_dict()
    found = AutoModelForCausalLM.from_pretrained(pruned(way)).state_dict()
    assert want.keys() == found.keys()
    assert all(torch.equal(want[name], found[name]) for name in want)
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())


def test_a_group_size_that_does_not_fit_is_refused_before_any_work(tiny, text, tmp_path):
    """In this model, down_proj has 192 in-features."""
    message = "--group-size 128: model.layers.0.mlp.down_proj has 192 in-features.*Give --group-size 32, 64 or row, or"
    with pytest.raises(RiaError, match=message):
        run(tiny("llama"), tmp_path / "out", "no such text.txt", weights="int4", group_size=128)
    assert list(tmp_path.iterdir()) == []
    out = run(tiny("llama"), tmp_path / "out", text, weights="int4", group_size=128, ignore=("down_proj",))
    assert len(Reader(out).sparse_names) == 12
    assert Reader(out).schema.weight_format.name == "int4-g128"


HEAD = "lm_head.integers"


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t.pop(HEAD), "lm_head"),
        (lambda t: t.pop("lm_head.weight_scale"), "lm_head.weight_scale is missing"),
        (lambda t: t["lm_head.weight_scale"][3].zero_(), "not a positive finite number"),
        (lambda t: t.update({"lm_head.weight_scale": t["lm_head.weight_scale"][1:].clone()}), "one number for each"),
        (lambda t: t.update({HEAD: t[HEAD].short()}), "torch.int16"),
        (lambda t: t[HEAD][-1, -1:].bitwise_xor_(1), "lm_head: its weights are not those"),
    ],
)
def test_a_damaged_head_is_found(change, words, pruned, tmp_path):
    shutil.copytree(pruned("int4, 32"), tmp_path / "out")
    rewrite(tmp_path / "out" / "model.safetensors", change)
    assert any(words in problem for problem in Reader(tmp_path / "out").problems())
    with pytest.raises((RiaError, ValueError), match="lm_head"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_config_json_that_does_not_mention_the_head_is_found(pruned, tmp_path):
    out = shutil.copytree(pruned("int4"), tmp_path / "out")
    content = json.loads((out / "config.json").read_text())
    del content["quantization_config"]["weights"]
    (out / "config.json").write_text(json.dumps(content))
    with pytest.raises(RiaError, match="lm_head is stored in int8, which config.json"):
        Reader(out).linear("model.layers.0.mlp.down_proj")
