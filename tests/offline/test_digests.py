"""By what a recipe tells the local files that it names from others of the same name."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from compressing import digests as files_of
from compressing import edit_weights, interrupted_after_a_layer, run_small
from hub_texts import NEW, OLD, install
from safetensors.torch import load_file, save_file

from ria_vllm.checkpoint.reader import Reader
from ria_vllm.offline import digests
from ria_vllm.offline.run.compress import Settings

FIELDS = {"calibration_sha256", "source_weights_digest"}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def of_weights(*paths: Path) -> str:
    """As docs/reference.md has it."""
    tensors = {name: tensor for path in paths for name, tensor in load_file(path).items()}
    found = hashlib.sha256()
    for name in sorted(tensors):
        data = tensors[name].contiguous().flatten().view(torch.uint8).numpy().tobytes()
        found.update(name.encode() + b"\0" + data[:65536])
    return found.hexdigest()


def recipe_of(model: Path | str, out: Path, text: Path | str, **options) -> dict:
    run_small(model, out, text, **options)
    recipe = Reader(out).schema.recipe
    assert recipe == json.loads((out / "ria_report.json").read_text())["recipe"]
    return recipe


@pytest.fixture(scope="module")
def pruned(tiny, text, tmp_path_factory) -> Path:
    run_small(tiny("llama"), out := tmp_path_factory.mktemp("pruned") / "out", text)
    return out


def test_the_recipe_has_digests_of_the_text_and_of_the_model(pruned, tiny, text):
    recipe = Reader(pruned).schema.recipe
    assert recipe["calibration_sha256"] == sha256(text)
    assert recipe["source_weights_digest"] == of_weights(tiny("llama") / "model.safetensors")
    card = (pruned / "README.md").read_text()
    assert f"| calibration_sha256 | `{sha256(text)}` |" in card and recipe["source_weights_digest"] in card


def test_other_content_of_the_same_name_has_another_digest(pruned, tiny, text, tmp_path):
    other = tmp_path / "other" / text.name
    model = Path(shutil.copytree(tiny("llama"), tmp_path / "other" / tiny("llama").name))
    other.write_text(text.read_text() + "z")
    edit_weights(model, lambda tensors: tensors["model.norm.weight"].add_(1))
    first, second = Reader(pruned).schema.recipe, recipe_of(model, tmp_path / "out", other)
    assert (first["calibration"], first["source"]) == (second["calibration"], second["source"])
    assert all(first[name] != second[name] for name in FIELDS)


def test_what_the_model_writes_has_no_digest(model, tmp_path):
    assert FIELDS & recipe_of(model, tmp_path / "out", "self").keys() == {"source_weights_digest"}


def test_a_data_set_on_the_hub_has_its_commit(model, tmp_path, monkeypatch):
    """A run that is resumed goes on with the commit that it has begun with."""
    texts = [hashlib.sha256(bytes([i])).hexdigest() for i in range(40)]
    hub = install(monkeypatch, **{OLD: texts, NEW: texts[::-1]})
    recipe = recipe_of(model, tmp_path / "whole", "c4")
    assert (recipe["calibration"], recipe["calibration_revision"]) == ("c4", OLD)
    assert FIELDS & recipe.keys() == {"source_weights_digest"}
    with interrupted_after_a_layer():
        run_small(model, tmp_path / "out", "c4")
    hub.now = NEW
    run_small(model, tmp_path / "out", "c4", settings=Settings(resume=True))
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert recipe_of(model, tmp_path / "new", "c4")["calibration_revision"] == NEW


def test_files_may_be_divided_in_any_way(tmp_path):
    tensors = {"b": torch.randn(300, 300), "a": torch.arange(7), "c": torch.ones(2, dtype=torch.bfloat16)}
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
    save_file(tensors, one / "model.safetensors")
    # A shard may hold a tensor that the index has elsewhere: it is not read from there.
    save_file({"b": tensors["b"], "a": torch.zeros(7)}, two / "x.safetensors")
    save_file({name: tensors[name] for name in "ca"}, two / "y.safetensors")
    index = {"weight_map": {"b": "x.safetensors", "a": "y.safetensors", "c": "y.safetensors"}}
    (two / "model.safetensors.index.json").write_text(json.dumps(index))
    assert digests.of_weights(one) == digests.of_weights(two) == of_weights(one / "model.safetensors")
