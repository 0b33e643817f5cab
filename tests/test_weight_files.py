"""The weight files of a folder: whatever is missing, damaged or too much is named."""

import shutil

import pytest
import torch
from damage import problems, rewrite
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ria_vllm.checkpoint.weight_files import weight_files

Q, DOWN = "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj"
INDEX = "model.safetensors.index.json"


def test_single_file_folders(pruned_llama):
    files = weight_files(pruned_llama.source)
    assert set(files) == set(pruned_llama.dense)
    assert {f.name for f in files.values()} == {"model.safetensors"}


@pytest.mark.parametrize("file", ["permutations.safetensors", "shard"])
@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_truncated_files(damage, file, size):
    path = damage.file_of(f"{Q}.compressed") if file == "shard" else damage.folder / file
    content = path.read_bytes()
    path.write_bytes(content[:size])
    found = problems(damage.folder)
    assert len(found) == 1 and str(path) in found[0] and "truncated" in found[0]


def test_missing_shard(damage):
    path = damage.file_of(f"{Q}.compressed")
    path.unlink()
    found = problems(damage.folder)
    assert str(path) in found[0] and "missing" in found[0] and "model.layers." in found[0]
    assert found[0].endswith("Get the file again.")
    for other in damage.folder.glob("model-*"):  # as where save_pretrained writes one file over several
        other.unlink()
    save_file({"model.norm.weight": torch.zeros(128)}, damage.folder / "model.safetensors")
    assert problems(damage.folder)[0].endswith(f"If model.safetensors is the model, remove {INDEX}.")


@pytest.mark.parametrize("shard", ["../model-00001-of-00009.safetensors", "/etc/passwd", "..", "sub/x.safetensors", ""])
def test_a_shard_outside_the_folder(damage, shard):
    damage.edit_json(INDEX, lambda content: content["weight_map"].update({f"{Q}.compressed": shard}))
    found = problems(damage.folder)
    assert len(found) == 1 and (repr(shard) in found[0] or "missing" in found[0])


def test_a_tensor_that_is_not_in_its_shard(damage):
    other = damage.file_of(f"{DOWN}.compressed").name
    damage.edit_json(INDEX, lambda content: content["weight_map"].update({f"{Q}.compressed": other}))
    assert f"{Q}.compressed" in problems(damage.folder)[0]


@pytest.mark.parametrize("name", ["\x1b]0;hello\x07", "a\nb", "a" * 1001, "\u202edetsurt"])
@pytest.mark.parametrize("file", ["permutations.safetensors", "shard", "index"])
def test_names_that_would_fool_a_reader(damage, name, file):
    """Escape sequences, new lines, right-to-left marks: nothing of the kind reaches a terminal."""
    if file == "index":
        damage.edit_json(
            INDEX, lambda content: content["weight_map"].update({name: "model-00001-of-00002.safetensors"})
        )
    else:
        path = damage.file_of(f"{Q}.{'compressed' if file == 'shard' else 'input_permutation'}")
        rewrite(path, lambda tensors: tensors.update({name: torch.zeros(2)}))
    found = problems(damage.folder)
    assert len(found) == 1 and found[0].replace("\n", "").isprintable()


@pytest.mark.parametrize("weight_map", [None, [], {}, {"a": 1}, "x"])
def test_an_index_without_a_map(damage, weight_map):
    damage.edit_json(INDEX, lambda content: content.update(weight_map=weight_map))
    assert INDEX in problems(damage.folder)[0]


def test_no_weights(damage):
    for path in damage.folder.glob("model*"):
        path.unlink()
    assert "no weights here" in problems(damage.folder)[0]


def test_a_second_set_of_weights(damage, tmp_path):
    """transformers prefers a single file to an index; without an index, vLLM loads all files."""
    folder, shard = damage.folder, next(iter(damage.folder.glob("model-*")))
    shutil.copyfile(shard, folder / "other.safetensors")
    assert not problems(folder)
    shutil.copyfile(shard, folder / "model.safetensors")
    assert f"model.safetensors: does not belong to {INDEX}, but would be loaded" in problems(folder)[0]
    (folder / "model.safetensors").unlink()
    (folder / INDEX).unlink()
    assert f"neither model.safetensors nor {INDEX}). There is model-00001" in problems(folder)[0]


@pytest.mark.parametrize(
    "name", ["consolidated.safetensors", "consolidated-00001-of-00002.safetensors", "sub/consolidated.safetensors"]
)
def test_weights_in_mistrals_format(damage, name):
    """vLLM would load them in the place of those that the index names."""
    assert not problems(damage.folder)
    (damage.folder / name).parent.mkdir(exist_ok=True)
    save_file({"norm.weight": torch.zeros(4)}, damage.folder / name)
    assert f"{name}: makes vLLM take this model for one in Mistral's own format" in problems(damage.folder)[0]


def test_a_stray_file_beside_the_single_one(damage):
    folder = damage.folder
    tensors = {}
    for path in sorted(folder.glob("model-*")):
        tensors |= load_file(path)
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        path.unlink()
    (folder / INDEX).unlink()
    save_file(tensors, folder / "model.safetensors", metadata)
    assert not problems(folder)
    save_file({"model.embed_tokens.weight": torch.zeros(4, 4)}, folder / "adapter_model.safetensors")
    assert "adapter_model.safetensors: does not belong to model.safetensors, but would be" in problems(folder)[0]


def test_a_tensor_that_the_index_does_not_name(damage):
    """Readers that go by files, as transformers and vLLM do, would take it; those that go by the index would not."""
    path = damage.file_of(f"{Q}.compressed")
    rewrite(path, lambda tensors: tensors.update({"model.embed_tokens.weight": torch.zeros(258, 128)}))
    found = problems(damage.folder)
    assert len(found) == 1 and str(path) in found[0] and "model.embed_tokens.weight" in found[0]
