"""Checkpoints of a model that is kept sparse: trainers resume from them, and `from_pretrained` and `save` read them."""

import copy
import pickle

import pruned_moe
import pytest
import torch
from safetensors.torch import load_file
from sparse_llama import TOKENS, load, masks, outside
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, Trainer, TrainingArguments
from wrappers import compressed_wrapper

from ria_vllm.checkpoint.reader import Reader
from ria_vllm.errors import RiaError
from ria_vllm.training import keep_sparse, save


@pytest.fixture
def written(pruned_llama, tmp_path):
    """Writes a compressed folder of a family: (the folder, how its models are loaded)."""

    def write(name):
        auto = AutoModelForImageTextToText if name == "gemma3" else AutoModelForCausalLM
        if name == "llama":
            folder = pruned_llama.folder
        elif name in pruned_moe.FAMILIES:
            folder, _ = pruned_moe.write(pruned_moe.FAMILIES[name], tmp_path)
        else:
            folder = compressed_wrapper(tmp_path, name)
        return folder, lambda path: auto.from_pretrained(path, dtype=torch.float32)

    return write


def trainer(model, folder, **settings):
    rows = torch.cat([TOKENS, TOKENS.flip(0)])
    data = [{"input_ids": row, "labels": row, "token_type_ids": torch.zeros_like(row)} for row in rows]
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=2, learning_rate=1e-2, weight_decay=0.1, use_cpu=True,
        report_to="none", **settings,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=data, eval_dataset=data[:2])


def moved(model):
    """Kept sparse, and every kept weight moved."""
    keep_sparse(model)
    draw = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=draw).to(parameter)
    torch.optim.SGD(model.parameters(), lr=1e-2).step()
    return model


def equal(left, right):
    return left.keys() == right.keys() and all(torch.equal(tensor, right[name]) for name, tensor in left.items())


@pytest.mark.parametrize("name", ["llama", "mixtral", "gemma3"])
def test_transformers_trainer_resumes_to_the_same_weights(name, written, tmp_path):
    folder, load = written(name)
    found, before = [], load(folder).state_dict()
    for resume in (None, str(tmp_path / "runs" / "checkpoint-2")):
        model = load(folder)
        keep_sparse(model)
        settings = {"max_steps": 4, "gradient_accumulation_steps": 2, "save_steps": 2}
        trainer(model, tmp_path / "runs", **settings).train(resume_from_checkpoint=resume)
        found.append(model.state_dict())
    assert equal(*found)
    pruned = [weight for weight in found[0] if not torch.equal(found[0][weight], before[weight]) and "proj" in weight]
    assert any(".experts." in weight for weight in pruned) == (name in pruned_moe.FAMILIES)
    for weight in pruned:
        assert not found[0][weight][before[weight] == 0].any(), weight
    if name == "llama":
        assert list(outside(model, masks(folder))) == []


@pytest.mark.parametrize("name", ["gpt_oss", "granitemoe", "gemma3"])
def test_a_checkpoint_is_read_and_saved_compressed(name, written, tmp_path):
    folder, load = written(name)
    model = moved(load(folder))
    model.save_pretrained(tmp_path / "checkpoint-1")
    assert load_file(tmp_path / "checkpoint-1" / "model.safetensors").keys() <= model.state_dict().keys()
    again = load(tmp_path / "checkpoint-1")
    assert equal(again.state_dict(), model.state_dict())
    for number, one in enumerate((model, again, copy.deepcopy(model), pickle.loads(pickle.dumps(model)))):
        save(one, tmp_path / f"new-{number}", like=folder)
    before, first, *others = (Reader(path) for path in (folder, *sorted(tmp_path.glob("new-*"))))
    assert list(first.problems()) == [] and len(others) == 3
    assert not any(torch.equal(first.tensor(name), before.tensor(name)) for name in before.dense_names)
    for other in others:
        assert first.files.keys() == other.files.keys()
        assert all(torch.equal(first.tensor(name), other.tensor(name)) for name in first.files)


def test_a_model_that_was_not_loaded_by_transformers(written, tmp_path):
    """By `load_state_dict`, into a model without weights."""
    folder, load = written("mixtral")
    model = moved(load(folder))
    other = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    other.load_state_dict(model.state_dict())
    for one, name in ((model, "new"), (other, "other")):
        save(one, tmp_path / name, like=folder)
    first, second = Reader(tmp_path / "new"), Reader(tmp_path / "other")
    assert all(torch.equal(first.tensor(name), second.tensor(name)) for name in first.files)


@pytest.mark.parametrize("name", ["mixtral", "gemma3"])
def test_a_checkpoint_under_the_names_of_the_files(name, written, tmp_path):
    """`load_state_dict` finds nothing of what has another name in it, and a trainer would go on."""
    folder, load = written(name)
    model = load(folder)
    model.save_pretrained(tmp_path / "checkpoint-1")
    keep_sparse(model)
    state = load_file(tmp_path / "checkpoint-1" / "model.safetensors")
    for one in (model, copy.deepcopy(model), torch.nn.ModuleList([model])):
        prefix = "0." if isinstance(one, torch.nn.ModuleList) else ""
        with pytest.raises(RiaError, match=r": not in the checkpoint, which has .* instead.*`from_pretrained`"):
            one.load_state_dict({prefix + name: tensor for name, tensor in state.items()}, strict=False)
    again = load(tmp_path / "checkpoint-1")
    keep_sparse(again, like=folder)
    assert equal(again.state_dict(), model.state_dict())


def test_a_checkpoint_with_other_masks(pruned_llama):
    """Of the dense model, or of another compression into the same folder: the next step would drop what it holds."""
    model, dense = load(pruned_llama.folder), load(pruned_llama.source)
    keep_sparse(model)
    wrapped, optimizer = torch.nn.ModuleDict({"model": model}), torch.optim.SGD(model.parameters(), lr=1e-3)
    sparse = copy.deepcopy(model.state_dict())
    for one, state in (model, dense.state_dict()), (wrapped, torch.nn.ModuleDict({"model": dense}).state_dict()):
        optimizer.step()
        one.load_state_dict(state)
        with pytest.raises(RiaError, match=r"layers.0.*: not zero .*The next step would lose.* other masks"):
            optimizer.step()
        model.load_state_dict(sparse)
