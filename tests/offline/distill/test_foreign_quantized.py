"""Others' quantized 2:4 folders, stored by compressed-tensors itself: training from them is training from ours."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors_writer import Writer, needs_writer, scales_of
from compressing import edit_config
from damage import rewrite
from distilling import run
from safetensors.torch import load_file

from ria_vllm.checkpoint.reader import Reader
from ria_vllm.checkpoint.sparse_linear import SparseLinear
from ria_vllm.errors import RiaError
from ria_vllm.format import sparse24
from ria_vllm.format.formats import FP8, INT4, INT8, INTEGERS, wide_scales
from ria_vllm.format.schema import FP8_TOKENS, INT8_TOKENS
from ria_vllm.format.weight_format import WeightFormat, name_of
from ria_vllm.progress import Monitor

BY_TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
SPARSITY = {"format": "dense", "sparsity_structure": "2:4", "targets": ["Linear"], "ignore": ["lm_head"]}


@dataclass(frozen=True)
class Form:
    """name: as config.json calls it. inputs: how they are rounded. bitmask: whether zeros are left out."""

    name: str
    format: WeightFormat
    inputs: dict[str, Any] | None = None
    bitmask: bool = False
    by_tensor: bool = False

    def __str__(self) -> str:
        return f"{self.name} {self.format.name}{' bitmask' * self.bitmask}{' tensor' * self.by_tensor}"

    @property
    def weights(self) -> dict[str, Any]:
        return {"group_size": None} | self.format.quantization | ({"strategy": "tensor"} if self.by_tensor else {})

    def quantization(self) -> dict[str, Any]:
        group = {"targets": ["Linear"], "weights": self.weights, "input_activations": self.inputs, "format": self.name}
        sparsity = SPARSITY | ({"format": "sparse-24-bitmask"} if self.bitmask else {})
        return {
            "quant_method": "compressed-tensors", "format": self.name, "ignore": ["lm_head"],
            "config_groups": {"group_0": group}, "sparsity_config": sparsity,
        }  # fmt: skip


FORMS = [
    Form("int-quantized", INT8),
    Form("int-quantized", INT8, BY_TOKEN, bitmask=True),
    Form("int-quantized", INT8, by_tensor=True),
    Form("int-quantized", INTEGERS[4, 64]),
    Form("pack-quantized", INTEGERS[4, 32]),
    Form("pack-quantized", INT8),
    Form("marlin-24", INT4),
    Form("marlin-24", INT8),
    Form("float-quantized", FP8),
    Form("float-quantized", FP8, BY_TOKEN | {"type": "float"}, bitmask=True),
    Form("naive-quantized", FP8, BY_TOKEN | {"type": "float"}, by_tensor=True),
]


def rounded(linear: SparseLinear, form: Form) -> tuple[torch.Tensor, torch.Tensor]:
    """A linear's weight [out, in] as its format holds it, with no kept value of 0; and scales that are powers of 2, so
    that any dtype holds them."""
    weight, mask = linear.dense().float(), sparse24.mask_from_bitmask(linear.parts["bitmask"])
    scales = form.format.quantize(weight, torch.float32)[1].float()
    scales = (scales.amax().expand_as(scales) if form.by_tensor else scales).log2().ceil().exp2()
    wide = wide_scales(scales, weight.shape[1])
    weight = torch.where(mask & (weight.abs() < wide), torch.where(weight < 0, -wide, wide), weight)
    return form.format.nearest(weight, scales), scales


def both(folder: Path, form: Form, out: Path) -> tuple[Path, Path]:
    """(ours with integers, theirs with the same), from a pruned folder without permutations."""
    ours, theirs, reader, writer = out / "ours", out / "theirs", Reader(folder), Writer()
    stored: dict[str, torch.Tensor] = {}
    for name in reader.sparse_names:
        linear = reader.linear(name)
        weight, scales = rounded(linear, form)
        own = scales.half() if form.format.group_size else scales  # those keep their dtype, and training rounds to it
        parts = form.format.encode(weight, sparse24.mask_from_bitmask(linear.parts["bitmask"]), own)
        stored |= SparseLinear(name, form.format, parts, None, linear.dtype).tensors()
        given = scales.flatten()[:1] if form.by_tensor else scales
        writer.add(name, form.name, form.weights, weight.half(), given.half(), form.bitmask)
    others = {name: reader.tensor(name) for name in reader.dense_names}
    for place, tensors in ((ours, stored), (theirs, writer.run(out / "writer"))):
        shutil.copytree(folder, place)
        found = {name: one for name, one in tensors.items() if not name.endswith((".dense", ".exact"))} | others
        rewrite(place / "model.safetensors", lambda before, found=found: (before.clear(), before.update(found)))
    words = dict(form.format.quantization) | {"dtype": name_of(reader.linear(reader.sparse_names[0]).dtype)}
    schema = reader.config["quantization_config"] | {"weights": words}
    if form.inputs is not None:
        schema["input_activations"] = (FP8_TOKENS if form.format == FP8 else INT8_TOKENS).model_dump()
    edit_config(ours, quantization_config=schema)
    edit_config(theirs, quantization_config=form.quantization())
    return ours, theirs


@needs_writer
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_result_is_that_of_our_own_folder_with_the_same_weights(form, pruned, text, tmp_path):
    dense, folder = pruned(permute="none")
    ours, theirs = both(folder, form, tmp_path)
    run(dense, ours, tmp_path / "one", text)
    run(dense, theirs, tmp_path / "two", text)
    one, two, before = Reader(tmp_path / "one"), Reader(tmp_path / "two"), Reader(ours)
    assert list(two.problems()) == [] and two.sparse_names == one.sparse_names and set(two.files) == set(one.files)
    assert all(torch.equal(one.dense(name), two.dense(name)) for name in one.sparse_names)
    assert all(torch.equal(one.tensor(name), two.tensor(name)) for name in one.dense_names)
    assert any(not torch.equal(before.dense(name), two.dense(name)) for name in before.sparse_names)
    assert two.schema.weights == one.schema.weights and two.schema.input_activations == one.schema.input_activations


@pytest.mark.parametrize("kept", ["-128", "a scale without dimensions"])
def test_what_only_others_write_is_kept(kept, pruned, text, tmp_path):
    """At a learning rate too small to move anything."""
    dense, folder = pruned(permute="none")
    theirs = as_bytes(Form("int-quantized", INT8, by_tensor=kept != "-128"), folder, tmp_path / "theirs")

    def change(tensors: dict) -> None:
        if kept == "-128":
            tensors[f"{NAME}.weight"][:, 0] = torch.where(tensors[f"{NAME}.weight"][:, 0] == 0, 0, -128)
        else:
            for name in [name for name in tensors if name.endswith("weight_scale")]:
                tensors[name] = tensors[name].flatten()[0].clone()

    rewrite(theirs / "model.safetensors", change)
    stored = load_file(theirs / "model.safetensors")
    weight, scale = stored[f"{NAME}.weight"], stored[f"{NAME}.weight_scale"]
    run(dense, theirs, tmp_path / "out", text, lr=1e-9)
    linear = Reader(tmp_path / "out").linear(NAME)
    assert (kept != "-128") == (int(weight.min()) > -128)
    assert torch.equal(linear.format.decode(linear.parts, torch.float32), weight * scale)


def test_linears_that_round_inputs_differently_are_refused(pruned, text, tmp_path):
    dense, folder = pruned(permute="none")
    theirs = as_bytes(Form("int-quantized", INT8), folder, tmp_path / "theirs")
    quantization = Form("int-quantized", INT8).quantization()
    group = quantization["config_groups"]["group_0"]
    quantization["config_groups"]["group_1"] = group | {"targets": ["re:.*down_proj"], "input_activations": BY_TOKEN}
    edit_config(theirs, quantization_config=quantization)
    with pytest.raises(RiaError, match=r"is int8.*, \S+ is int8.*\. A folder of ours has one"):
        run(dense, theirs, tmp_path / "out", text)


@pytest.mark.parametrize(
    "inputs", [BY_TOKEN | {"type": "float"}, BY_TOKEN | {"symmetric": False}], ids=["fp8", "asymmetric"]
)
def test_inputs_that_cannot_be_rounded_so_are_not_with_a_warning(inputs, pruned, text, tmp_path):
    dense, folder = pruned(permute="none")
    theirs = as_bytes(Form("int-quantized", INT8, inputs), folder, tmp_path / "theirs")
    monitor, said = Monitor(shown=False), []
    monitor.warn = said.append
    run(dense, theirs, tmp_path / "out", text, monitor=monitor)
    assert Reader(tmp_path / "out").schema.input_activations is None
    assert any("inputs that are rounded in a way that is not served. The result rounds none" in one for one in said)


def test_the_card_and_the_recipe_say_what_the_weights_are(pruned, text, tmp_path):
    dense, folder = pruned(permute="none")
    theirs = as_bytes(Form("int-quantized", INT8, BY_TOKEN), folder, tmp_path / "theirs")
    run(dense, theirs, tmp_path / "out", text)
    recipe = Reader(tmp_path / "out").schema.recipe
    assert (recipe["weights"], recipe["group_size"], recipe["activations"]) == ("int8", "row", "int8")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "int8, with a scale for a row" in card and "rounded to int8, token by token" in card


@needs_writer
@pytest.mark.parametrize("form", [Form("int-quantized", INT8), Form("pack-quantized", INTEGERS[4, 32])], ids=str)
def test_a_quantized_linear_that_is_not_sparse_is_written_dense(form, pruned, text, tmp_path):
    """As the numbers that it stands for. So are what scales its input, and a cache, left out."""
    dense, folder = pruned(permute="none")
    _, theirs = both(folder, form, tmp_path)
    writer, name = Writer(), "model.layers.1.mlp.down_proj"
    weight = load_file(dense / "model.safetensors")[f"{name}.weight"].half()
    writer.add(name, form.name, form.weights, weight, scales_of(weight, form.weights))
    stored = writer.run(tmp_path / "again")
    wanted = stored.pop(f"{name}.exact")
    del stored[f"{name}.dense"]
    stored[f"{name}.input_scale"] = torch.ones(1)
    stored |= {f"model.layers.{i}.self_attn.{kind}_scale": torch.ones(1) for i in (0, 1) for kind in "kv"}
    rewrite(theirs / "model.safetensors", lambda tensors: tensors.update(stored))
    cache = {"type": "float", "num_bits": 8, "strategy": "tensor", "symmetric": True, "dynamic": False}
    edit_config(theirs, quantization_config=form.quantization() | {"kv_cache_scheme": cache})
    run(dense, theirs, tmp_path / "out", text)
    before, after = Reader(folder), Reader(tmp_path / "out")
    assert list(after.problems()) == [] and set(before.sparse_names) - set(after.sparse_names) == {name}
    assert torch.equal(after.tensor(f"{name}.weight"), wanted.to(after.linear(after.sparse_names[0]).dtype))
    assert name in after.schema.sparsity_config.ignore
    assert {one for one in after.files if "scale" in one} == {f"{one}.weight_scale" for one in after.sparse_names}
    assert set(after.files) - {one for one in after.files if "scale" in one} == set(before.files) - {
        f"{name}.{part}" for part in ("compressed", "bitmask", "shape")
    } | {f"{name}.weight"}


def as_bytes(form: Form, folder: Path, theirs: Path) -> Path:
    """Theirs as `int-quantized` with zeros, without their writer: int8 [out, in] and a scale per row."""
    shutil.copytree(folder, theirs)
    reader = Reader(folder)

    def store(tensors: dict) -> None:
        tensors.clear()
        tensors.update({name: reader.tensor(name) for name in reader.dense_names})
        for name in reader.sparse_names:
            weight, scales = rounded(reader.linear(name), form)
            tensors |= {f"{name}.weight": (weight / scales).to(torch.int8), f"{name}.weight_scale": scales}

    rewrite(theirs / "model.safetensors", store)
    edit_config(theirs, quantization_config=form.quantization())
    return theirs


NAME = "model.layers.0.mlp.down_proj"
DAMAGES = {
    "a scale is missing": (
        lambda tensors: tensors.pop(f"{NAME}.weight_scale"), rf"{NAME}.* weight is int8|{NAME}.weight_scale is in none",
    ),
    "a scale is infinite": (
        lambda tensors: tensors[f"{NAME}.weight_scale"].fill_(float("inf")), f"{NAME}: a weight_scale is not a finite",
    ),
    "a scale is negative": (
        lambda tensors: tensors[f"{NAME}.weight_scale"].neg_(), f"{NAME}: a weight_scale is zero or less, which is",
    ),
    "scales of other rows": (
        lambda tensors: tensors.update({f"{NAME}.weight_scale": torch.ones(3, 1)}),
        rf"{NAME}: weight_scale has shape \(3, 1\), expected",
    ),
    "values in another dtype": (
        lambda tensors: tensors.update({f"{NAME}.weight": tensors[f"{NAME}.weight"].short()}),
        f"{NAME}: weight is int16, and should be torch.int8 by config.json",
    ),
    "zero points": (
        lambda tensors: tensors.update({f"{NAME}.weight_zero_point": torch.ones(1, dtype=torch.int8)}),
        f"{NAME}.weight_zero_point: asymmetric weights",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_tensors_are_refused_by_name(damage, pruned, text, tmp_path):
    dense, folder = pruned(permute="none")
    theirs = as_bytes(Form("int-quantized", INT8), folder, tmp_path / "theirs")
    change, error = DAMAGES[damage]
    rewrite(theirs / "model.safetensors", change)
    with pytest.raises(RiaError, match=rf"^{theirs}: {error}"):
        run(dense, theirs, tmp_path / "out", text)
    assert not (tmp_path / "out.partial").exists()


def test_linears_in_several_formats_are_refused(pruned, text, tmp_path):
    dense, folder = pruned(permute="none")
    theirs = as_bytes(Form("int-quantized", INT8), folder, tmp_path / "theirs")
    plain = Reader(folder).dense(NAME)

    def restore(tensors: dict) -> None:
        del tensors[f"{NAME}.weight_scale"]
        tensors[f"{NAME}.weight"] = plain

    rewrite(theirs / "model.safetensors", restore)
    with pytest.raises(RiaError, match=r"\S+ is (int8|float), \S+ is (int8|float)\. A folder of ours has one format"):
        run(dense, theirs, tmp_path / "out", text)


def test_a_config_that_does_not_say_how_is_refused(pruned, text, tmp_path):
    dense, folder = pruned(permute="none")
    theirs = as_bytes(Form("int-quantized", INT8), folder, tmp_path / "theirs")
    quantization = Form("int-quantized", INT8).quantization()
    quantization["ignore"] = [NAME]
    edit_config(theirs, quantization_config=quantization)
    with pytest.raises(RiaError, match=f"^{theirs}: {NAME}: its weight is compressed or quantized, but config.json"):
        run(dense, theirs, tmp_path / "out", text)
    edit_config(theirs, quantization_config=Form("int-quantized", INT8).quantization(), dtype=None, torch_dtype=None)
    with pytest.raises(RiaError, match=f"^{theirs}/config.json: says nothing of the dtype of the model"):
        run(dense, theirs, tmp_path / "out", text)
