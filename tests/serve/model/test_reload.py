"""Which weights a running server may load: those that are stored as the ones that it started with."""

import json
import shutil
from types import SimpleNamespace

import compressed_tensors_checkpoints
import pytest
import tiny
import torch
from checkpoint_folder import config_of, rebind
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from vllm.config import LoRAConfig, VllmConfig, get_current_vllm_config, set_current_vllm_config

from ria_vllm.checkpoint.weight_files import SINGLE_FILE
from ria_vllm.errors import RiaError
from ria_vllm.format.schema import PERMUTATIONS_FILE
from ria_vllm.serve.model.config import RiaConfig
from ria_vllm.serve.model.reload import check_reload


def reload_from(config, folder):
    check_reload(config, SimpleNamespace(model=str(folder), revision=None), from_files=True)


def test_a_reload_from_another_folder(checkpoint, copy):
    config = config_of(checkpoint)
    reload_from(config, checkpoint)
    reload_from(config, copy)
    stored = load_file(copy / PERMUTATIONS_FILE)
    name = "model.layers.1.mlp.down_proj.input_permutation"
    stored[name] = stored[name].flip(0).contiguous()
    save_file(stored, copy / PERMUTATIONS_FILE)
    rebind(copy)
    with pytest.raises(RiaError, match=f"{copy}/?: .*other permutations.*Start a server"):
        reload_from(config, copy)


def test_a_reload_in_another_format(copy):
    """`compress --overwrite --scheme W4A16` under a running server."""
    config = config_of(copy)
    tiny.write(tiny.FAMILIES["llama-gqa"], copy, weights="int4-g64", permuted=False)
    with pytest.raises(RiaError, match="in another format"):
        reload_from(config, copy)
    config = config_of(copy)
    reload_from(config, copy)
    tiny.write(tiny.FAMILIES["llama-gqa"], copy, weights="int4-g64", permuted=False, rounded=True)
    with pytest.raises(RiaError, match="in another format"):
        reload_from(config, copy)


def test_a_reload_that_prunes_other_linears(copy):
    tiny.write(tiny.FAMILIES["llama-gqa"], copy, permuted=False)
    config = config_of(copy)
    tiny.write(tiny.FAMILIES["llama-gqa"], copy, permuted=False, dense=("1.mlp.down_proj",))
    with pytest.raises(RiaError, match=r"model\.layers\.1\.mlp\.down_proj.bitmask is in the folder or on this server"):
        reload_from(config, copy)


def change(folder, tensors):
    """Add tensors to the weight file of a folder, or remove those that are None."""
    path = folder / SINGLE_FILE
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    stored = load_file(path) | tensors
    save_file({name: tensor for name, tensor in stored.items() if tensor is not None}, path, metadata)


@pytest.mark.parametrize(
    "name",
    ["model.embed_tokens.weight", "model.layers.0.mlp.down_proj.bias"],
)
def test_a_reload_with_other_dense_tensors(checkpoint, copy, theirs, tmp_path, name):
    """vLLM would keep the old values of one that is missing, and drop one that it has no place for."""
    for folder in (checkpoint, theirs):
        other = shutil.copytree(folder, tmp_path / folder.name)
        present = name in load_file(folder / SINGLE_FILE)
        change(other, {name: None if present else torch.zeros(8)})
        with pytest.raises(RiaError, match=f"{name} is in the folder or on this server, but not on both"):
            reload_from(config_of(folder), other)


def test_a_reload_from_a_folder_of_another_kind(checkpoint, copy):
    """compressed-tensors gives linears the same names as we do, but permutes no columns."""
    ours, theirs = config_of(checkpoint), {
        "quant_method": "compressed-tensors", "format": "dense",
        "sparsity_config": {"format": "sparse-24-bitmask", "sparsity_structure": "2:4", "targets": ["Linear"]},
    }  # fmt: skip
    their_config = RiaConfig.from_config(theirs)
    their_config.maybe_update_config(str(copy))
    with pytest.raises(RiaError, match="in another format"):
        reload_from(their_config, checkpoint)
    content = json.loads((copy / "config.json").read_text())
    for quantization in (theirs, None):
        (copy / "config.json").write_text(json.dumps(content | {"quantization_config": quantization}))
        with pytest.raises(RiaError, match="in another form"):
            reload_from(ours, copy)


def test_a_reload_under_adapters(engine, checkpoint, copy):
    """Adapters that fit the inputs of this server's linears do not fit those that were scaled or rotated otherwise."""
    config = config_of(checkpoint)
    content = json.loads((copy / "config.json").read_text())
    content["quantization_config"]["recipe"]["smooth"] = 0.5
    (copy / "config.json").write_text(json.dumps(content))
    reload_from(config, copy)
    get_current_vllm_config().lora_config = LoRAConfig(max_lora_rank=8)
    get_current_vllm_config().model_config = None
    reload_from(config, checkpoint)
    reload_from(config_of(copy), copy)  # the permutations show that it is the same run
    for before, new in ((config, copy), (config_of(copy), checkpoint)):
        with pytest.raises(RiaError, match="adapters may not fit"):
            reload_from(before, new)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A folder of compressed-tensors: int8 by channel, inputs by token."""
    folder = tmp_path_factory.mktemp("theirs")
    compressed_tensors_checkpoints.write(folder, "sparse-24-bitmask", "int", rounded=True)
    return folder


def unrounded(quantization):
    quantization["config_groups"]["group_0"]["input_activations"] = None


def narrower(quantization):
    quantization["config_groups"]["group_0"]["targets"] = ["re:.*down_proj"]


def with_scales_of_a_cache(quantization):
    quantization["kv_cache_scheme"] = {"num_bits": 8, "type": "float"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (unrounded, "stored otherwise"),
        (narrower, "stored otherwise"),
        (with_scales_of_a_cache, "kv_cache_scheme: .*Remove this key"),
    ],
)
def test_a_reload_of_other_peoples_weights_that_are_quantized_otherwise(theirs, tmp_path, change, message):
    config = config_of(theirs)
    reload_from(config, theirs)
    folder = shutil.copytree(theirs, tmp_path / "other")
    content = json.loads((folder / "config.json").read_text())
    change(content["quantization_config"])
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(RiaError, match=message):
        reload_from(config, folder)


def test_a_reload_is_checked_against_the_present_folder(checkpoint, copy):
    """vLLM may have another configuration of the model by then."""
    config = config_of(checkpoint)
    built_from = SimpleNamespace(model=str(checkpoint), revision=None)
    torch.manual_seed(9)
    tiny.write(tiny.FAMILIES["llama-gqa"], copy, seed=1)
    current = VllmConfig()
    with set_current_vllm_config(current):
        current.model_config = SimpleNamespace(
            model=str(copy), revision=None, runner_type="generate", head_dtype=None, dtype=None, hf_config=None
        )
        with pytest.raises(RiaError, match="other permutations"):
            check_reload(config, built_from, from_files=True)


def test_a_reload_of_weights_from_no_folder(checkpoint, tmp_path):
    """A trainer sends tensors by their names, and the folder that the server was started with may be gone."""
    config = config_of(checkpoint)
    reload_from(config, tmp_path / "gone")
    (tmp_path / "gone").mkdir()
    reload_from(config, tmp_path / "gone")


def test_a_reload_of_weights_that_no_config_describes(checkpoint, copy):
    """vLLM reads no config.json when it reloads, and nothing else says how channels are permuted."""
    config = config_of(checkpoint)
    (copy / "config.json").unlink()
    with pytest.raises(RiaError, match="config.json: no such file"):
        reload_from(config, copy)
    (copy / SINGLE_FILE).unlink()
    reload_from(config, copy)  # a trainer sends them
