"""Files of two runs, and folds that cannot hold, are found and named."""

import shutil

import pytest
import torch
from damage import bind, problems, prove, rewrite
from safetensors.torch import load_file, save_file

Q, DOWN = "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj"
INDEX = "model.safetensors.index.json"
UP_OF_ALL = "model.layers.{i}.mlp.up_proj"


def other_run(damage):
    """Files of the same model compressed under other permutations: each valid by itself."""
    other = damage.folder.with_name("other")
    shutil.copytree(damage.folder, other)
    rewrite(other / "permutations.safetensors", lambda tensors: tensors.update({f"{DOWN}.input_permutation":
        tensors[f"{DOWN}.input_permutation"].flip(0).contiguous()}))  # fmt: skip
    bind(other)
    prove(other)
    assert problems(other) == []
    return other


@pytest.mark.parametrize("file", ["permutations.safetensors", "config.json", "model-00003-of-*.safetensors"])
def test_files_of_two_runs(damage, file):
    other = other_run(damage)
    (path,) = other.glob(file)
    shutil.copyfile(path, damage.folder / path.name)
    found = problems(damage.folder)
    assert len(found) == 1 and str(damage.folder) in found[0] and "files of one run" in found[0]
    assert ("permutations.safetensors" if file == "config.json" else path.name) in found[0]


def test_a_folder_without_digests_is_refused(damage):
    damage.edit_json("config.json", lambda c: c["quantization_config"].pop("permutations_digest"))
    found = problems(damage.folder)
    assert len(found) == 1 and "another run than config.json" in found[0] and "compress the model again" in found[0]


def test_a_shard_without_a_digest_is_refused(damage):
    path = damage.file_of(f"{Q}.compressed")
    save_file(load_file(path), path, metadata={"format": "pt"})
    found = problems(damage.folder)
    assert len(found) == 1 and str(path) in found[0] and "files of one run" in found[0]


@pytest.mark.parametrize("digest", ["0" * 63, ["0" * 64]])
def test_an_invalid_digest_is_refused(damage, digest):
    damage.edit_json("config.json", lambda c: c["quantization_config"].update(permutations_digest=digest))
    assert "config.json: quantization_config.permutations_digest" in problems(damage.folder)[0]


@pytest.mark.parametrize("left", ["permutations", "digest"])
def test_a_recipe_that_does_not_permute_has_no_permutations(damage, left):
    """As in a repository into which a run without permutations was uploaded over one with them."""
    damage.edit_json("config.json", lambda c: c["quantization_config"]["recipe"].update(permute="none"))
    if left == "permutations":
        damage.edit_json("config.json", lambda c: c["quantization_config"].pop("permutations_digest"))
    else:
        (damage.folder / "permutations.safetensors").unlink()
    found = problems(damage.folder)
    assert len(found) == 1 and "though the recipe" in found[0] and "files of one run" in found[0]


def edit_fold(number, **changes):
    def change(config):
        config["quantization_config"]["folds"][number].update(changes)

    return change


@pytest.mark.parametrize(
    "change, words",
    [
        (edit_fold(0, num_kv_heads=3), "do not fit"),
        (
            edit_fold(0, num_kv_heads=4),
            "v_proj: folds do not fit its rows: a permutation of rows 0 to 128",
        ),
        (edit_fold(1, producers=[{"name": "model.layers.{i}.mlp.up_proj", "rows": [0, 500]}]), "takes 500 of"),
        (edit_fold(1, producers=[{"name": "model.layers.{i}.mlp.up_proj", "rows": [0, 64]}]), "takes 64 of"),
        (edit_fold(1, producers=[{"name": "model.layers.{i}.mlp.up_proj"}] * 2), "two folds permute the same rows"),
        (
            edit_fold(1, producers=[{"name": UP_OF_ALL, "rows": [0, 5], "blocks": 64}]),
            "0 to 5 of each of 64 blocks",
        ),
    ],
)
def test_folds_that_cannot_hold(damage, change, words):
    damage.edit_json("config.json", change)
    found = problems(damage.folder)
    assert found and any(words in problem for problem in found), found
    assert all("model.layers." in problem for problem in found)


@pytest.mark.parametrize("name", [f"{Q}.weight", "model.norm.weight"])
def test_one_weight_under_a_short_name_too(damage, name):
    """Loaders add and strip "model."; they could load either."""
    short = name.removeprefix("model.")
    path = damage.file_of("model.norm.weight")
    rewrite(path, lambda tensors: tensors.update({short: torch.zeros(128)}))
    damage.edit_json(INDEX, lambda content: content["weight_map"].update({short: path.name}))
    (found,) = problems(damage.folder)
    assert f"{name} " in found and f" {short} " in found and "both stored, but they are one weight" in found
