"""Which weights of a folder are meant: `compress`, `eval` and `distill` ask the same, of a folder and of a hub id."""

import shutil
from pathlib import Path

import pytest
import torch
from compressing import edit_config, edit_weights, edited, run_small
from hub_cache import NAME, Cache
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ria_vllm.errors import RiaError
from ria_vllm.offline.model.run.hf import from_hub, load_model

CPU = torch.device("cpu")


def check_refused(folder: Path, of_folder: str, of_hub: str, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused as a folder, with the message `of_folder`, and as a repository on the hub with the same files.

    Args:
        of_folder, of_hub: regular expressions; {place} is the folder with the files.
    """
    cache = Cache(folder.parent / "cache", folder, monkeypatch)
    for model, place, message in ((str(folder), folder, of_folder), (NAME, cache.commit(), of_hub)):
        for ask in (lambda: load_model(model, CPU), lambda: run_small(model, folder.parent / "out", text)):
            with pytest.raises(RiaError, match=message.format(place=place)):
                ask()


@pytest.fixture
def sharded(tiny, tmp_path) -> Path:
    folder = tmp_path / "in"
    AutoModelForCausalLM.from_pretrained(tiny("llama")).save_pretrained(folder, max_shard_size="200KB")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((tiny("llama") / file).read_bytes())
    assert len(list(folder.glob("model-*.safetensors"))) > 1 and (folder / "model.safetensors.index.json").is_file()
    return folder


def test_a_single_file_beside_shards_is_refused(sharded, tiny, text, monkeypatch):
    """transformers reads it, whatever the index says; vLLM reads the shards."""
    shutil.copy(tiny("llama") / "model.safetensors", sharded)
    message = "{place}/model.safetensors: .* unknown which model is meant"
    check_refused(sharded, message, message, text, monkeypatch)


def test_an_adapter_beside_the_weights_is_refused(tiny, text, tmp_path, monkeypatch):
    """Where PEFT is installed, transformers adds it to them: `eval` would measure another model than vLLM serves."""
    folder = Path(shutil.copytree(tiny("llama"), tmp_path / "folder"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)).save_pretrained(folder)
    assert AutoModelForCausalLM.from_pretrained(folder)._hf_peft_config_loaded
    message = "{}/adapter_config.json: .* unknown which model is meant.*merge_and_unload"
    check_refused(folder, message.format("{place}"), f"^{message.format(NAME)}", text, monkeypatch)


def test_weights_that_only_transformers_finds_are_refused(tiny, text, tmp_path, monkeypatch):
    """`eval` would measure them, and `compress` prune others."""
    folder = edited(tiny("llama"), tmp_path / "in", lambda tensors: None, transformers_weights="other.safetensors")
    shutil.copy(folder / "model.safetensors", folder / "other.safetensors")
    edit_weights(folder, lambda tensors: tensors["model.norm.weight"].mul_(2))
    norm = load_file(tiny("llama") / "model.safetensors")["model.norm.weight"]
    assert torch.equal(AutoModelForCausalLM.from_pretrained(folder, dtype="auto").model.norm.weight, norm)
    message = "{}: transformers would read 'other.safetensors'.* unknown which model is meant.*save_pretrained"
    check_refused(folder, message.format("{place}"), f"^{message.format(NAME)}", text, monkeypatch)


def test_named_weights_that_all_programs_find_are_read(sharded, text, tmp_path):
    """What is written from them is one file, and says nothing of an index that it does not have."""
    out = tmp_path / "out"
    edit_config(sharded, transformers_weights="model.safetensors.index.json")
    assert load_model(str(sharded), CPU) is not None
    run_small(sharded, out, text)
    assert (out / "model.safetensors").is_file() and not list(out.glob("*.index.json"))
    assert AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)[1]["missing_keys"] == set()


def test_pickled_weights_are_not_opened(tiny, text, tmp_path, monkeypatch):
    """Whatever torch's own check of them would say; nor where there are safetensors beside them."""
    folder = Path(shutil.copytree(tiny("llama"), tmp_path / "model"))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    monkeypatch.setattr(torch, "load", lambda *_, **__: 1 / 0)
    assert load_model(str(folder), CPU) is not None
    (folder / "model.safetensors").unlink()
    message = "{}: only pytorch_model.bin here. Pickled weights are not opened.*save_pretrained.*spaces/safetensors"
    check_refused(folder, message.format("{place}"), f"^{message.format(NAME)}", text, monkeypatch)


def test_pickled_weights_that_are_not_fetched_are_named(tiny, tmp_path, monkeypatch):
    cache, asked = Cache(tmp_path / "cache", tiny("llama"), monkeypatch), []
    (cache.commit() / "model.safetensors").unlink()
    assert from_hub(NAME) == cache.commit()  # offline, nobody knows what else there is
    with pytest.raises(RiaError, match="no weights here"):
        load_model(NAME, CPU)

    def list_repo_files(*which, **more):
        asked.append((which, more))
        return ["config.json", *(f"pytorch_model-0000{i}-of-00002.bin" for i in (2, 1)), "onnx/model.safetensors"]

    monkeypatch.setattr("huggingface_hub.list_repo_files", list_repo_files)
    for revision in (None, "main"):
        with pytest.raises(RiaError, match=f"^{NAME}: only pytorch_model-00001-of-00002.bin here. Pickled weights"):
            from_hub(NAME, revision)
    assert asked == [((NAME,), {"revision": None}), ((NAME,), {"revision": "main"})]


@pytest.mark.parametrize(
    ("files", "message"),
    [((), "no weights here"), (("model-00001-of-00002.safetensors",), "There is model-00001-of-00002.safetensors")],
)
def test_a_folder_without_weights_is_not_told_about_pickled_ones(files, message, tiny, tmp_path):
    folder = Path(shutil.copytree(tiny("llama"), tmp_path / "model"))
    for name in files:
        shutil.copy(folder / "model.safetensors", folder / name)
    (folder / "model.safetensors").unlink()
    with pytest.raises(RiaError, match=message) as raised:
        load_model(str(folder), CPU)
    assert str(raised.value).startswith(f"{folder}: ") and "ickled" not in str(raised.value)
