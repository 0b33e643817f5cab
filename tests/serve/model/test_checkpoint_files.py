"""What is read before the weights, from a folder and from a stand-in for the hub."""

import json
import shutil

import huggingface_hub
import pytest
import tiny
import torch
from checkpoint_folder import config_of
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ria_vllm.checkpoint.weight_files import INDEX_FILE, SINGLE_FILE
from ria_vllm.errors import RiaError
from ria_vllm.format.schema import PERMUTATIONS_FILE, PROOFS_FILE
from ria_vllm.serve.model.checkpoint_files import FILES, OTHERS, folder_of
from ria_vllm.serve.model.config import RiaConfig


def test_missing_permutations(copy):
    (copy / PERMUTATIONS_FILE).unlink()
    with pytest.raises(RiaError, match="permutations.safetensors is missing"):
        config_of(copy)


def test_weights_of_another_run(checkpoint, copy, tmp_path):
    torch.manual_seed(3)
    tiny.write(tiny.FAMILIES["llama-gqa"], tmp_path / "other", seed=1)
    shutil.copy(tmp_path / "other" / SINGLE_FILE, copy / SINGLE_FILE)
    with pytest.raises(RiaError, match="its weights are not stored under the permutations that config.json names"):
        config_of(copy)


def test_damaged_permutation_is_named(copy):
    stored = load_file(copy / PERMUTATIONS_FILE)
    stored["model.layers.1.mlp.down_proj.input_permutation"][5] = 0
    save_file(stored, copy / PERMUTATIONS_FILE)
    with pytest.raises(RiaError, match=r"layers\.1\.mlp\.down_proj.*more than once|layers\.1\.mlp\.down_proj.*channel"):
        config_of(copy)


def split(folder, index=True):
    """Two shards in place of the single weight file; returns their paths."""
    with safe_open(folder / SINGLE_FILE, framework="pt") as file:
        metadata = file.metadata()
    stored = load_file(folder / SINGLE_FILE)
    (folder / SINGLE_FILE).unlink()
    shards = [folder / f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for shard, names in zip(shards, (list(stored)[::2], list(stored)[1::2])):
        save_file({name: stored[name] for name in names}, shard, metadata)
    if index:
        weight_map = {name: shard.name for shard in shards for name in load_file(shard)}
        (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    return shards


def test_shards_without_an_index(checkpoint, copy):
    """What `hf download --include "*.safetensors" config.json` leaves. vLLM loads all of them, so all are read."""
    split(copy, index=False)
    config, whole = config_of(copy), config_of(checkpoint)
    assert config.pruned == whole.pruned and config.stored == whole.stored
    assert set(config.permutations) == set(whole.permutations)


def test_a_missing_shard_without_an_index(copy):
    split(copy, index=False)[1].unlink()
    with pytest.raises(RiaError, match="1 of the 2 files model-"):
        config_of(copy)


def test_a_second_weight_file_without_an_index(copy):
    """vLLM would load both."""
    save_file({"lm_head.bias": torch.zeros(8)}, copy / "old.safetensors")
    with pytest.raises(RiaError, match="old.safetensors: its weights are not stored under the permutations"):
        config_of(copy)
    (copy / "old.safetensors").rename(copy / ".old.safetensors")  # vLLM does not see it
    config_of(copy)


@pytest.mark.parametrize("index", [True, False])
def test_a_folder_without_weights(copy, index):
    for shard in split(copy, index):
        shard.unlink()
    with pytest.raises(RiaError, match="no weights here .*object store has to be served from a local copy"):
        config_of(copy)


def test_a_repository_on_the_hub(monkeypatch, copy):
    asked = []

    def download(repository, revision=None, **patterns):
        asked.append((repository, revision, patterns))
        return str(copy)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    config = RiaConfig.from_config(json.loads((copy / "config.json").read_text())["quantization_config"])
    config.maybe_update_config("who/what", revision="v2")
    assert asked == [("who/what", "v2", {"allow_patterns": FILES, "ignore_patterns": OTHERS})]
    assert len(config.pruned) == 14 and config.permutations.keys() == config_of(copy).permutations.keys()
    files = [path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file()]
    assert PROOFS_FILE in files
    others = ["original/consolidated.00.safetensors", "consolidated.safetensors", "pytorch_model.bin"]
    filtered = huggingface_hub.utils.filter_repo_objects(files + others, allow_patterns=FILES, ignore_patterns=OTHERS)
    assert sorted(filtered) == sorted(files)


def test_a_repository_that_cannot_be_got(monkeypatch):
    def download(*_, **__):
        raise LocalEntryNotFoundError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(RiaError, match="who/what: .*no route to host.*`hf download who/what`"):
        folder_of("who/what", None)
