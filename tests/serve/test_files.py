"""What is read before the weights: from a folder, and from a stand-in for the hub."""

import json
import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest
import tiny
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from ria_vllm.errors import RiaError
from ria_vllm.schema import PERMUTATIONS_FILE, REARRANGED_BY_VLLM
from ria_vllm.serve.config import RiaConfig
from ria_vllm.serve.files import permutations_of, stored_modules


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files") / "out"
    tiny.write(tiny.FAMILIES["llama-gqa"], folder)
    return folder


@pytest.fixture
def copy(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "copy")


def config_of(folder) -> RiaConfig:
    config = RiaConfig.from_config(json.loads((folder / "config.json").read_text())["quantization_config"])
    config.maybe_update_config(str(folder))
    return config


def test_local_folder(checkpoint):
    config = config_of(checkpoint)
    assert len(config.pruned) == 14
    assert len(config.permutations) == 14
    assert config.folding.folded == {
        f"model.layers.{i}.{n}" for i in (0, 1) for n in ("self_attn.o_proj", "mlp.down_proj")
    }


def test_names_follow_vllms_mapper(checkpoint):
    from vllm.model_executor.models.utils import WeightsMapper

    config = config_of(checkpoint)
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"model.": "language_model.model."}))
    name = "language_model.model.layers.1.mlp.down_proj"
    assert name in config.pruned and name in config.permutations and name in config.folding.folded
    assert "language_model.model.layers.1.mlp.up_proj" in config.folding.row_orders
    assert config.schema.ignored("lm_head")


def test_config_survives_the_way_to_a_worker(checkpoint):
    import copy as copying
    import pickle

    config = config_of(checkpoint)
    for other in (pickle.loads(pickle.dumps(config)), copying.deepcopy(config)):
        assert other.pruned == config.pruned
        assert all((other.permutations[n] == p).all() for n, p in config.permutations.items())


def test_missing_permutations(copy):
    (copy / PERMUTATIONS_FILE).unlink()
    with pytest.raises(RiaError, match="permutations.safetensors is missing"):
        config_of(copy)


def test_damaged_permutation_is_named(copy):
    stored = load_file(copy / PERMUTATIONS_FILE)
    stored["model.layers.1.mlp.down_proj.input_permutation"][5] = 0
    save_file(stored, copy / PERMUTATIONS_FILE)
    with pytest.raises(RiaError, match=r"layers\.1\.mlp\.down_proj.*more than once|layers\.1\.mlp\.down_proj.*channel"):
        config_of(copy)


def test_permutation_of_a_dense_linear(copy):
    stored = load_file(copy / PERMUTATIONS_FILE) | {"lm_head.input_permutation": torch.arange(128, dtype=torch.int32)}
    save_file(stored, copy / PERMUTATIONS_FILE)
    with pytest.raises(RiaError, match="a permutation for lm_head"):
        config_of(copy)


def test_truncated_permutations(copy):
    path = copy / PERMUTATIONS_FILE
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(RiaError, match="broken or truncated"):
        config_of(copy)


def test_folder_without_weights_goes_by_the_ignore_list(copy):
    for path in copy.glob("*.safetensors"):
        path.unlink()
    config = config_of(copy)
    assert config.pruned is None
    assert not config._is_pruned("lm_head") and config._is_pruned("model.layers.0.mlp.up_proj")


def test_hub(checkpoint, monkeypatch, tmp_path):
    """A repository with an index; the revision is passed on."""
    calls = []
    index = tmp_path / "index.json"
    index.write_text(json.dumps({"weight_map": {"a.b.compressed": "x", "a.b.bitmask": "x", "norm.weight": "x"}}))

    def download(repo, name, revision=None):
        calls.append((repo, name, revision))
        if name == PERMUTATIONS_FILE:
            return str(checkpoint / name)
        if name.endswith("index.json"):
            return str(index)
        raise EntryNotFoundError("404")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert stored_modules("who/what", "v2") == {"a.b": True, "norm": False}
    assert len(permutations_of("who/what", "v2", True)) == 14
    assert {revision for _, _, revision in calls} == {"v2"}


def test_hub_without_the_file(monkeypatch):
    def absent(*_, **__):
        raise EntryNotFoundError("404")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", absent)
    assert permutations_of("who/what", None, False) == {}
    with pytest.raises(RiaError, match="who/what: permutations.safetensors is missing"):
        permutations_of("who/what", None, True)


def test_hub_that_cannot_be_reached(monkeypatch):
    def offline(*_, **__):
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(RiaError, match="Download the whole repository"):
        permutations_of("who/what", None, True)
    assert permutations_of("who/what", None, False) == {}


@pytest.mark.parametrize("family", REARRANGED_BY_VLLM)
def test_families_whose_heads_vllm_rearranges_are_refused(checkpoint, family):
    """Named by vLLM's own sources: their models change tensors by the names that dense weights have."""
    config = RiaConfig.from_config(json.loads((checkpoint / "config.json").read_text())["quantization_config"])
    with pytest.raises(RiaError, match=f"heads of {family} .*`ria-vllm export`"):
        config.maybe_update_config(str(checkpoint), SimpleNamespace(model_type=family))


def test_other_orders_in_the_folder_of_a_reload(checkpoint, copy):
    config = config_of(checkpoint)
    config.check_orders(str(copy), None)
    stored = load_file(copy / PERMUTATIONS_FILE)
    name = "model.layers.1.mlp.down_proj.input_permutation"
    stored[name] = stored[name].flip(0).contiguous()
    save_file(stored, copy / PERMUTATIONS_FILE)
    config.check_orders(str(copy), None)  # looked at once
    with pytest.raises(RiaError, match=f"{copy}/?: .*other channel orders.*Start a server"):
        config_of(checkpoint).check_orders(str(copy), None)


def test_a_missing_value_projection_is_the_keys(checkpoint):
    config = config_of(checkpoint)
    config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    attention = "model.layers.1.self_attn."
    assert config.parts_of(f"{attention}qkv_proj") == tuple(f"{attention}{x}_proj" for x in "qkv")
    config.stored -= {f"{attention}v_proj"}
    assert config.parts_of(f"{attention}qkv_proj") == tuple(f"{attention}{x}_proj" for x in "qkk")
