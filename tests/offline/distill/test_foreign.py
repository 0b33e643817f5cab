"""Others' 2:4 folders: training from them is training from ours with the same weights."""

import shutil
from pathlib import Path

import pytest
import torch
from compressing import edit_config
from safetensors.torch import load_file, save_file

from ria_vllm.checkpoint import Reader
from ria_vllm.errors import RiaError
from ria_vllm.export import export_dense
from ria_vllm.offline.distill.recipe import Distillation
from ria_vllm.offline.distill.run import Settings, distill
from ria_vllm.progress import Monitor
from ria_vllm.schema import FORMAT


def run(dense: Path, folder: Path, out: Path, text: Path) -> None:
    recipe = Distillation(tokens=512, seq_len=64, text=str(text), lr=1e-3)
    distill(folder, str(dense), out, recipe, Settings(), Monitor(shown=False))


def with_zeros(folder: Path, out: Path) -> Path:
    export_dense(Reader(folder), out, 10**9)
    return out


def with_bitmasks(folder: Path, out: Path) -> Path:
    """As compressed-tensors writes them: see its `sparse-24-bitmask`."""
    shutil.copytree(folder, out)
    sparsity = {"format": "sparse-24-bitmask", "sparsity_structure": "2:4", "targets": ["Linear"], "ignore": []}
    edit_config(out, quantization_config={"quant_method": "compressed-tensors", "sparsity_config": sparsity})
    save_file(load_file(out / "model.safetensors"), out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.mark.parametrize("form", [with_zeros, with_bitmasks])
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


def test_a_dense_folder_is_refused(tiny, text, tmp_path):
    with pytest.raises(RiaError, match="no linear of a decoder layer is 2:4"):
        run(tiny("llama"), tiny("llama"), tmp_path / "out", text)


COMPRESSED_TENSORS, SPARSE = {"quant_method": "compressed-tensors"}, {"sparsity_config": {"format": "dense"}}


@pytest.mark.parametrize(
    ("quantization", "form"),
    [
        ({"format": "marlin-24", "config_groups": {"group_0": {}}}, "marlin-24"),
        (SPARSE | {"format": "pack-quantized", "config_groups": {"group_0": {}}}, "pack-quantized"),
        (SPARSE | {"config_groups": {"group_0": {"format": "int-quantized"}}}, "int-quantized"),
        ({"sparsity_config": {"format": FORMAT}, "format": "float-quantized", "config_groups": {"group_0": {}}},
         "float-quantized"),
        ({"format": "naive-quantized"}, "naive-quantized"),
        ({"format": "dense", "sparsity_config": {"format": "sparse-bitmask"}}, "sparse-bitmask"),
        (SPARSE | {"config_groups": {"group_0": {}}}, "compressed-tensors"),
        (SPARSE | {"config_groups": [1]}, "compressed-tensors"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
    ],
    ids=str,
)  # fmt: skip
def test_quantized_weights_of_others_are_refused_with_the_way_out(quantization, form, pruned, text, tmp_path):
    dense, folder = pruned(permute="none")
    theirs = with_bitmasks(folder, tmp_path / "theirs")
    edit_config(theirs, quantization_config=COMPRESSED_TENSORS | quantization)
    with pytest.raises(RiaError, match=rf"\({form}\).* only unquantized.*ria-vllm compress --weights int8"):
        run(dense, theirs, tmp_path / "out", text)
