"""What trainers change beside the weights is what the written folder says, and all else stays as it was."""

import json
import shutil

import pytest
import torch
from sparse_llama import load
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer, GenerationConfig
from wrappers import compressed_wrapper

from ria_vllm.errors import RiaError
from ria_vllm.training import save

NO_CHANGE = ("quantization_config",)  # the recipe tells of the training


def read(path):
    return json.loads(path.read_text())


def same_but(new, like, **changes):
    """config.json has these changes, and no other."""
    left, right = read(new / "config.json"), read(like / "config.json")
    for name in NO_CHANGE:
        left.pop(name), right.pop(name)
    assert left == right | changes


@pytest.fixture
def like(pruned_llama, tmp_path):
    folder = tmp_path / "like"
    shutil.copytree(pruned_llama.folder, folder)
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    (folder / "special_tokens_map.json").write_text("{}")
    (folder / "LICENSE").write_text("as before")
    return folder


@pytest.mark.parametrize("generation", [None, {"eos_token_id": [2, 9], "temperature": 0.6, "do_sample": True}])
def test_tokens_that_a_trainer_has_set(like, tmp_path, generation):
    path = like / "generation_config.json"
    path.unlink(missing_ok=True)
    if generation is not None:
        path.write_text(json.dumps(generation))
    model = load(like)
    model.config.eos_token_id = model.generation_config.eos_token_id = [7, 2]
    model.config.pad_token_id = model.generation_config.pad_token_id = 5
    model.config.use_cache = False
    saved = save(model, tmp_path / "new", like=like)
    tokens = {"eos_token_id": [7, 2], "pad_token_id": 5}
    assert saved.settings == [*tokens, *(f"generation_config.{name}" for name in tokens)]
    same_but(tmp_path / "new", like, **tokens)
    written = read(tmp_path / "new" / "generation_config.json")
    if generation is not None:
        assert written.items() >= (generation | tokens).items()
    # As vLLM reads them.
    found = GenerationConfig.from_pretrained(tmp_path / "new")
    assert (found.eos_token_id, found.pad_token_id) == ([7, 2], 5)
    assert found.bos_token_id == (AutoConfig.from_pretrained(like).bos_token_id if generation is None else None)
    assert found.temperature == (generation or {}).get("temperature")


def test_the_text_model_of_a_wrapper(tmp_path):
    """Its settings are in a part of config.json, whichever class has loaded it."""
    compressed_wrapper(tmp_path, "gemma3")
    for auto in (AutoModelForImageTextToText, AutoModelForCausalLM):
        model = auto.from_pretrained(tmp_path / "out", dtype=torch.float32)
        new = tmp_path / auto.__name__
        assert save(model, new, like=tmp_path / "out").settings == []
        same_but(new, tmp_path / "out")
        model.config.get_text_config().eos_token_id = 11
        saved = save(model, new, like=tmp_path / "out", overwrite=True)
        assert [name.rpartition(".")[2] for name in saved.settings] == ["eos_token_id"]
        same_but(new, tmp_path / "out", text_config=read(tmp_path / "out" / "config.json")["text_config"] | {
            "eos_token_id": 11
        })  # fmt: skip


def test_what_the_model_computes_with(like, tmp_path):
    """A longer context, say: in transformers' new words, in a file of the old ones, too."""
    model = load(like)
    model.config.rms_norm_eps = 0.125
    model.config.rope_parameters["rope_theta"] = 5e5
    try:
        save(model, tmp_path / "new", like=like)
    except RiaError as error:  # never half of it
        assert "config.json: the settings rope_parameters" in str(error)
    else:
        found = AutoConfig.from_pretrained(tmp_path / "new")
        assert found.rms_norm_eps == 0.125 and found.rope_parameters["rope_theta"] == 5e5


def test_the_tokenizer(like, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(like)
    other = next(token for token, number in tokenizer.get_vocab().items() if number == 77)
    tokenizer.eos_token = other
    tokenizer.chat_template = "{{ messages[-1]['content'] }}"
    save(load(like), tmp_path / "new", like=like, tokenizer=tokenizer)
    found = AutoTokenizer.from_pretrained(tmp_path / "new")
    assert found.eos_token_id == 77 and found.chat_template == tokenizer.chat_template
    assert found("Some words.").input_ids == AutoTokenizer.from_pretrained(like)("Some words.").input_ids
    assert not (tmp_path / "new" / "special_tokens_map.json").exists()
    assert (tmp_path / "new" / "LICENSE").read_text() == "as before"
    assert not any(path.is_symlink() for path in (tmp_path / "new").rglob("*"))
    save(load(like), tmp_path / "same", like=like)
    assert AutoTokenizer.from_pretrained(tmp_path / "same").chat_template == "{{ messages[0]['content'] }}"
