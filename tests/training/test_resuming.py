"""Checkpoints of a model that is kept sparse: trainers resume from them, and `from_pretrained` and `save` read them."""

import copy
import pickle

import pruned_moe
import pytest
import torch
from safetensors.torch import load_file
from sparse_llama import TOKENS, load, masks, outside
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, Trainer, TrainerCallback, TrainingArguments
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


class Remember(TrainerCallback):
    """The weights after the first step."""

    def on_step_end(self, args, state, control, model, **_):
        if state.global_step == 1:
            self.first = copy.deepcopy(model.state_dict())


@pytest.mark.parametrize("name", ["mixtral", "gemma3"])
def test_transformers_trainer_loads_the_best_weights(name, written, tmp_path):
    folder, load = written(name)
    model, remember = load(folder), Remember()
    keep_sparse(model)
    every = {"max_steps": 2, "save_steps": 1, "eval_steps": 1, "eval_strategy": "steps"}
    training = trainer(model, tmp_path / "runs", load_best_model_at_end=True, metric_for_best_model="score", **every)
    training.evaluate = lambda **_: {"eval_score": -training.state.global_step}
    training.add_callback(remember)
    training.train()
    assert training.state.best_model_checkpoint.endswith("checkpoint-1") and equal(model.state_dict(), remember.first)


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


def test_experts_that_are_not_pruned_under_the_names_of_the_files(tmp_path):
    folder, _ = pruned_moe.write(pruned_moe.FAMILIES["mixtral"], tmp_path, dense_layer=0)
    model = load(folder)
    model.save_pretrained(tmp_path / "checkpoint-1")
    keep_sparse(model)
    of_files = load_file(tmp_path / "checkpoint-1" / "model.safetensors")
    state = {name: tensor for name, tensor in model.state_dict().items() if ".0.mlp.experts." not in name}
    state |= {name: tensor for name, tensor in of_files.items() if ".0.block_sparse_moe.experts." in name}
    expected = r"layers\.0\.mlp\.experts\.\w+: not in the checkpoint, which has .*\.experts\.\d"
    with pytest.raises(RiaError, match=expected):
        model.load_state_dict(state, strict=False)


LORA = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize("name", ["prompt_embeddings", LORA])
def test_adapters_of_a_model_that_is_kept_sparse(name, written):
    """PEFT loads them by `load_state_dict` of all of the model, and then has no place for some of them."""
    folder, load = written("mixtral")
    model = load(folder)
    keep_sparse(model)
    assert name in model.load_state_dict({name: torch.zeros(2)}, strict=False).unexpected_keys


def test_parts_of_a_checkpoint(pruned_llama):
    """One of its files, say."""
    model = load(pruned_llama.folder)
    keep_sparse(model)
    state = {name: tensor + 1 for name, tensor in model.state_dict().items() if "norm" in name}
    model.load_state_dict(state, strict=False)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in state.items())


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


def test_a_merged_weight_that_is_not_loaded(pruned_llama):
    """Adapters are loaded while others are merged, which PEFT takes out again before the next step."""
    model = load(pruned_llama.folder)
    keep_sparse(model)
    state, name = copy.deepcopy(model.state_dict()), "model.layers.0.mlp.up_proj.weight"
    with torch.no_grad():
        model.get_parameter(name).add_(1.0)
    merged = torch.nn.ModuleDict({"model": model})
    others = {f"model.{other}": tensor for other, tensor in state.items() if other != name}
    assert merged.load_state_dict(others, strict=False).missing_keys == [f"model.{name}"]
    merged.load_state_dict(others | {f"model.{name}": state[name]})
    assert equal(model.state_dict(), state)
