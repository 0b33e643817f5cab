"""Others' 2:4 folders: training from them is training from ours with the same weights."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from compressed_tensors_writer import Writer, needs_writer
from compressing import edit_config, edit_weights, run_small
from safetensors.torch import load_file, save_file

from ria_vllm.checkpoint.reader import Reader
from ria_vllm.checkpoint.sparse_linear import SparseLinear
from ria_vllm.errors import RiaError
from ria_vllm.export import export_dense
from ria_vllm.format.formats import FLOAT
from ria_vllm.offline.distill import foreign
from ria_vllm.offline.distill.recipe import Distillation
from ria_vllm.offline.distill.run import Settings, distill
from ria_vllm.progress import Monitor

SPARSITY = {"format": "sparse-24-bitmask", "sparsity_structure": "2:4", "targets": ["Linear"], "ignore": []}
COMPRESSED_TENSORS, ZEROS = {"quant_method": "compressed-tensors"}, SPARSITY | {"format": "dense"}
BITMASKS = COMPRESSED_TENSORS | {"sparsity_config": SPARSITY}


def run(dense: Path, folder: Path, out: Path, text: Path) -> None:
    recipe = Distillation(tokens=512, seq_len=64, text=str(text), lr=1e-3)
    distill(folder, str(dense), out, recipe, Settings(), Monitor(shown=False))


def with_zeros(folder: Path, out: Path) -> Path:
    export_dense(Reader(folder), out, 10**9)
    return out


def with_zeros_that_config_json_names(folder: Path, out: Path) -> Path:
    """As llm-compressor saves what it has pruned and not compressed."""
    edit_config(with_zeros(folder, out), quantization_config=COMPRESSED_TENSORS | {"sparsity_config": ZEROS})
    return out


def with_bitmasks(folder: Path, out: Path) -> Path:
    """As compressed-tensors writes them: see its `sparse-24-bitmask`."""
    shutil.copytree(folder, out)
    edit_config(out, quantization_config=BITMASKS)
    save_file(load_file(out / "model.safetensors"), out / "model.safetensors", metadata={"format": "pt"})
    return out


def stored_by_compressed_tensors(dense: Path, linears: list[str], out: Path) -> Path:
    """As `with_bitmasks` writes a folder, but by compressed-tensors itself, from a dense folder with zeros."""
    shutil.copytree(dense, out)
    edit_config(out, quantization_config=BITMASKS)
    writer = Writer()

    def store(tensors: dict) -> dict:
        for name in linears:
            writer.add(name, "dense", None, tensors.pop(f"{name}.weight"), None, sparse=True)
        stored = writer.run(out.with_name("stored"))
        return tensors | {name: one for name, one in stored.items() if not name.endswith((".dense", ".exact"))}

    edit_weights(out, store)
    return out


@pytest.mark.parametrize("form", [with_zeros, with_zeros_that_config_json_names, with_bitmasks])
def test_the_result_is_that_of_our_own_folder_with_the_same_weights(form, pruned, text, tmp_path):
    dense, folder = pruned(permute="none", ignore=("layers.1.mlp.up_proj",))
    run(dense, folder, tmp_path / "ours", text)
    run(dense, form(folder, tmp_path / "theirs"), tmp_path / "out", text)
    ours, found = Reader(tmp_path / "ours"), Reader(tmp_path / "out")
    assert list(found.problems()) == []
    assert found.sparse_names == ours.sparse_names and set(found.files) == set(ours.files)
    for name in ours.files:
        one, other = ours.tensor(name), found.tensor(name)
        if name.endswith("bitmask"):
            linear = name.removesuffix(".bitmask")
            assert torch.equal(ours.dense(linear) != 0, found.dense(linear) != 0)
        assert torch.equal(one, other), name
    card = (tmp_path / "out" / "README.md").read_text()
    assert "pruned by another program." in card and "pruned by ria-vllm" not in card
    assert sorted(found.schema.sparsity_config.ignore) == sorted(ours.schema.sparsity_config.ignore)
    assert found.schema.sparsity_config.global_sparsity == ours.schema.sparsity_config.global_sparsity


@needs_writer
def test_masks_are_those_that_compressed_tensors_has_stored(make_model, text, tmp_path):
    """Also where fewer than two of four weights are left: which zeros are kept, and trained, is up to the writer."""
    dense, sparser = make_model(tmp_path / "in", "llama", dtype=torch.bfloat16), tmp_path / "sparser"
    run_small(dense, tmp_path / "pruned", text, permute="none")
    with_zeros(tmp_path / "pruned", sparser)
    names = Reader(tmp_path / "pruned").sparse_names

    def prune_more(tensors: dict) -> None:
        for number, name in enumerate(names):
            left = torch.rand(tensors[f"{name}.weight"].shape, generator=torch.Generator().manual_seed(number)) > 0.2
            tensors[f"{name}.weight"] *= left

    edit_weights(sparser, prune_more)
    theirs = stored_by_compressed_tensors(sparser, names, tmp_path / "theirs")
    run(dense, theirs, tmp_path / "out", text)
    stored, weights = load_file(theirs / "model.safetensors"), load_file(sparser / "model.safetensors")
    after = Reader(tmp_path / "out")
    assert list(after.problems()) == [] and set(after.sparse_names) == set(names)
    for name in names:
        mask = (stored[f"{name}.bitmask"][..., None] >> torch.arange(8) & 1).flatten(1).bool()
        trained, before = after.dense(name), weights[f"{name}.weight"]
        assert bool((mask.unflatten(1, (-1, 4)).sum(-1) == 2).all()) and not before[~mask].any()
        assert torch.equal(after.linear(name).parts["bitmask"], stored[f"{name}.bitmask"])
        assert not trained[~mask].any() and trained[mask & (before == 0)].count_nonzero() > 0


@pytest.mark.parametrize(
    ("form", "family", "linear"),
    [(with_zeros, "llama", "self_attn.v_proj"), (with_bitmasks, "lfm2", "feed_forward.w3")],
)
def test_what_vllm_could_not_fuse_is_refused_before_anything_is_trained(form, family, linear, pruned, text, tmp_path):
    dense, folder = pruned(family, permute="none")
    theirs, name = form(folder, tmp_path / "theirs"), f"model.layers.1.{linear}"

    def restore(tensors: dict) -> None:
        for part in ("compressed", "bitmask", "shape"):
            tensors.pop(f"{name}.{part}", None)
        tensors[f"{name}.weight"] = load_file(dense / "model.safetensors")[f"{name}.weight"]

    edit_weights(theirs, restore)
    with pytest.raises(
        RiaError, match=rf"theirs: {name} is dense, but model\.layers\.1\.\S+ is 2:4. vLLM fuses .*, or"
    ):
        run(dense, theirs, tmp_path / "out", text)
    assert not (tmp_path / "out.partial").exists()


def pruned_tower(tensors: dict) -> set[str]:
    """Make the matrices of a vision tower's layers 2:4, dense with zeros; their names."""
    names = {n for n, one in tensors.items() if ".blocks." in n and n.endswith(".weight") and one.dim() == 2}
    for name in names:
        tensors[name][:, 2::4] = tensors[name][:, 3::4] = 0
    return names


@pytest.mark.parametrize("form", [with_zeros, with_bitmasks])
def test_pruned_linears_of_a_vision_tower_stay_as_they_are(form, tiny_wrapper, text, tmp_path):
    """They are not trained, do not count as pruned, and are written dense, as `compress` leaves them."""
    dense, folder = tiny_wrapper("qwen2_5_vl"), tmp_path / "pruned"
    run_small(dense, folder, text, permute="none")
    theirs, tower = form(folder, tmp_path / "theirs"), {}

    def prune(tensors: dict) -> None:
        names = pruned_tower(tensors)
        tower.update({name: tensors[name].clone() for name in names})
        for name in names if form is with_bitmasks else ():
            parts = FLOAT.encode(tower[name], None, None)
            stored = SparseLinear(name.removesuffix(".weight"), FLOAT, parts, None, tower[name].dtype)
            tensors.update(stored.tensors())
            del tensors[name]

    edit_weights(theirs, prune)
    run(dense, theirs, tmp_path / "out", text)
    before, after = Reader(folder), Reader(tmp_path / "out")
    assert len(tower) > 5 and list(after.problems()) == []
    assert all(torch.equal(after.tensor(name), wanted) for name, wanted in tower.items())
    assert after.sparse_names == before.sparse_names and set(after.files) == set(before.files)
    assert any(not torch.equal(before.dense(name), after.dense(name)) for name in after.sparse_names)
    one, other = (reader.schema.sparsity_config for reader in (before, after))
    assert sorted(one.ignore) == sorted(other.ignore) and one.global_sparsity == other.global_sparsity


@pytest.mark.parametrize("place", ["text_config", "compression_config"])
def test_config_json_says_it_where_vllm_looks_too(place, tiny_wrapper, text, tmp_path):
    dense, folder = tiny_wrapper("qwen2_5_vl"), tmp_path / "pruned"
    run_small(dense, folder, text, permute="none")
    theirs = with_bitmasks(folder, tmp_path / "theirs")
    text_config = json.loads((theirs / "config.json").read_text())["text_config"]
    named = {"text_config": text_config | {"quantization_config": BITMASKS}}
    edit_config(theirs, quantization_config=None, **named if place == "text_config" else {place: BITMASKS})
    run(dense, folder, tmp_path / "ours", text)
    run(dense, theirs, tmp_path / "out", text)
    ours, found = Reader(tmp_path / "ours"), Reader(tmp_path / "out")
    assert found.sparse_names and all(torch.equal(ours.dense(name), found.dense(name)) for name in ours.sparse_names)
    assert "compression_config" not in found.config and "quantization_config" not in found.config["text_config"]


@pytest.mark.parametrize("form", [with_bitmasks])
def test_what_vllm_serves_dense_only_is_written_dense(form, pruned, text, tmp_path, monkeypatch):
    """As routers, and the linears of a Mamba-1 mixer."""
    dense, folder = pruned(permute="none")
    monkeypatch.setattr(foreign, "served_dense", lambda layer: {"mlp.down_proj": "vLLM serves it dense only"})
    run(dense, form(folder, tmp_path / "theirs"), tmp_path / "out", text)
    before, found = Reader(folder), Reader(tmp_path / "out")
    downs = {f"model.layers.{index}.mlp.down_proj" for index in (0, 1)}
    assert set(before.sparse_names) - set(found.sparse_names) == downs <= set(found.schema.sparsity_config.ignore)
    assert all(torch.equal(found.tensor(f"{name}.weight"), before.dense(name)) for name in downs)


def test_names_without_the_base_models_prefix_are_refused_with_the_way_out(pruned, text, tmp_path):
    dense, folder = pruned()[0], with_zeros(pruned()[1], tmp_path / "zeros")
    tensors = {name.removeprefix("model."): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        RiaError, match=r": layers.0.\S+ is model.layers.0.\S+ in a LlamaForCausalLM. .*save_pretrained"
    ):
        run(dense, folder, tmp_path / "out", text)


ANOTHER = r"\({form}\)\. Distillation takes .*ria-vllm compress --scheme W8A8"


@pytest.mark.parametrize(
    ("quantization", "error"),
    [
        ({"quant_method": "gptq", "bits": 4}, ANOTHER.format(form="gptq")),
        ({"sparsity_config": ZEROS, "format": "nvfp4-pack-quantized"}, ANOTHER.format(form="nvfp4-pack-quantized")),
        ({"sparsity_config": SPARSITY, "format": "int-quantized", "config_groups": {"group_0": {}}},
         ANOTHER.format(form="int-quantized")),
    ],
    ids=str,
)  # fmt: skip
def test_forms_that_are_not_read_are_refused_with_the_way_out(quantization, error, pruned, text, tmp_path):
    dense, folder = pruned(permute="none")
    theirs = with_bitmasks(folder, tmp_path / "theirs")
    edit_config(theirs, quantization_config=COMPRESSED_TENSORS | quantization)
    with pytest.raises(RiaError, match=rf"^{theirs}: .*{error}"):
        run(dense, theirs, tmp_path / "out", text)


def test_quantized_weights_are_refused_though_config_json_does_not_name_them(pruned, text, tmp_path):
    dense, folder = pruned(permute="none")
    theirs = with_zeros(folder, tmp_path / "theirs")
    scales = {"model.layers.0.mlp.up_proj.weight_scale": torch.ones(192, 1)}
    edit_weights(theirs, lambda tensors: tensors.update(scales))
    with pytest.raises(RiaError, match="up_proj.weight_scale: the weight is quantized"):
        run(dense, theirs, tmp_path / "out", text)
