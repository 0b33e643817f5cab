"""Kept weights that are trained beside an adapter of PEFT, whose checkpoints hold only the adapter."""

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from sparse_llama import load, loss_of, masks, outside
from test_resuming import Remember, equal, trainer
from transformers import TrainerCallback

from ria_vllm.checkpoint.reader import Reader
from ria_vllm.errors import RiaError
from ria_vllm.training import BesideAdapters, keep_sparse, read_trained, save, write_trained

peft = pytest.importorskip("peft", reason="peft is not installed (pip install '.[train]')")

NORM, UP = "model.layers.1.input_layernorm.weight", "model.layers.1.mlp.up_proj.weight"
STEPS = {"max_steps": 4, "save_steps": 2, "gradient_accumulation_steps": 2}


def beside(folder, trained=("mlp.up_proj", "mlp.down_proj", "norm"), **settings):
    """LoRA around the linears, and beside it some of the model's own weights that are trained, too."""
    model = load(folder)
    keep_sparse(model, **settings)
    lora = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**lora))
    for name, parameter in wrapped.named_parameters():
        if "lora_" not in name and any(part in name for part in trained):
            parameter.requires_grad_()
    return wrapped


def run(model, folder, resume=None, callbacks=(BesideAdapters,), **settings):
    training = trainer(model, folder, **(STEPS | settings))
    for callback in callbacks:
        training.add_callback(callback)
    training.train(resume_from_checkpoint=resume)
    return training


@pytest.mark.parametrize("resume", [True, "checkpoint-2", "moved"])
def test_a_run_that_resumes_ends_in_the_same_weights(pruned_llama, tmp_path, resume):
    folder, runs = pruned_llama.folder, tmp_path / "runs"
    whole = beside(folder)
    run(whole, runs)
    shutil.rmtree(runs / "checkpoint-4")
    again, settings = beside(folder), {}
    assert not equal(again.state_dict(), whole.state_dict())
    if resume == "moved":
        shutil.move(runs / "checkpoint-2", runs / "elsewhere")
        settings["resume_from_checkpoint"] = str(runs / "elsewhere")
    elif resume is not True:
        settings["resume_from_checkpoint"] = str(runs / resume)
    run(again, runs, settings.get("resume_from_checkpoint", True), **settings)
    assert equal(again.state_dict(), whole.state_dict())
    before, after = load(folder), again.unload()
    moved = {name for name, tensor in before.state_dict().items() if not torch.equal(tensor, after.state_dict()[name])}
    assert {NORM, UP} <= moved and not any("self_attn" in name for name in moved)
    assert list(outside(after, masks(folder))) == []


def test_the_best_weights(pruned_llama, tmp_path):
    model, remember = beside(pruned_llama.folder), Remember()
    every = {"max_steps": 2, "save_steps": 1, "eval_steps": 1, "eval_strategy": "steps", "metric_for_best_model": "s"}
    training = trainer(model, tmp_path / "runs", load_best_model_at_end=True, **every)
    training.evaluate = lambda **_: {"eval_s": -training.state.global_step}
    training.add_callback(remember)
    training.add_callback(BesideAdapters)
    training.train()
    assert training.state.best_model_checkpoint.endswith("checkpoint-1") and equal(model.state_dict(), remember.first)


@pytest.mark.parametrize("trained", ["mlp.up_proj", "norm", "embed_tokens"])
def test_what_checkpoints_would_lose_is_not_trained(pruned_llama, tmp_path, trained):
    """Otherwise a run that resumes would go on from the weights of the folder."""
    model = beside(pruned_llama.folder, [trained])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RiaError, match=rf"{trained}.*: trained beside an adapter .*BesideAdapters"):
        run(model, tmp_path / "runs", callbacks=())
    assert equal(model.state_dict(), before)


def test_adapters_alone_need_nothing(pruned_llama, tmp_path):
    run(beside(pruned_llama.folder, []), tmp_path / "runs", callbacks=(), max_steps=1)


@pytest.mark.parametrize("saved", ["none", "lora_only", "all"])
@pytest.mark.parametrize("place", ["layers.0.mlp.up_proj", "layers.0.mlp.down_proj", "norm"])
def test_biases_that_peft_saves(pruned_llama, tmp_path, saved, place):
    """Others would be lost. PEFT's own file is the oracle."""
    model = load(pruned_llama.folder)
    module = model.model.get_submodule(place)
    module.bias = torch.nn.Parameter(torch.zeros(module.weight.shape[0]))
    keep_sparse(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, bias=saved, target_modules=["up_proj"]))
    module.bias.requires_grad_().grad = torch.ones_like(module.bias)
    optimizer = torch.optim.SGD([one for one in wrapped.parameters() if one.requires_grad], lr=0.1)
    wrapped.save_pretrained(tmp_path)
    if any(name.endswith("bias") for name in load_file(tmp_path / "adapter_model.safetensors")):
        assert saved != "none"
        optimizer.step()
        assert module.bias.all()
    else:
        assert saved != "all"
        with pytest.raises(RiaError, match=rf"{place}.bias: trained beside an adapter"):
            optimizer.step()


def test_a_loop_that_saves_them_itself(pruned_llama, tmp_path):
    folder = pruned_llama.folder
    model = beside(folder, beside_adapters=True)
    loss_of(model).backward()
    torch.optim.AdamW(model.parameters(), lr=1e-2).step()
    model.save_pretrained(tmp_path / "checkpoint")
    write_trained(model, tmp_path / "checkpoint")
    base = load(folder)
    keep_sparse(base)
    again = peft.PeftModel.from_pretrained(base, tmp_path / "checkpoint", is_trainable=True)
    assert not equal(again.state_dict(), model.state_dict())
    read_trained(again, tmp_path / "checkpoint")
    assert equal(again.state_dict(), model.state_dict())
    bare = load(folder)
    keep_sparse(bare)
    read_trained(bare, tmp_path / "checkpoint")
    save(bare, tmp_path / "bare", like=folder)
    save(model.unload(), tmp_path / "unloaded", like=folder)
    one, two = Reader(tmp_path / "bare"), Reader(tmp_path / "unloaded")
    assert all(torch.equal(one.tensor(name), two.tensor(name)) for name in one.files)


def damaged(state, how):
    if how == "another":
        return state | {"model.layers.9.mlp.up_proj.weight": state[UP].clone()}
    if how == "shape":
        return state | {UP: state[UP][:, 2:].contiguous()}
    return state | {UP: state[UP] + 1}


MESSAGES = {
    "gone": "no such file",
    "cut": "broken or truncated",
    "another": r"layers.9.mlp.up_proj.weight: not a parameter",
    "shape": r"up_proj.weight: of shape \(",
    "dense": r"up_proj.weight: not zero everywhere outside the mask",
}


@pytest.mark.parametrize("how", MESSAGES)
def test_files_that_are_not_of_the_model(pruned_llama, tmp_path, how):
    model = beside(pruned_llama.folder)
    write_trained(model, tmp_path)
    (path,) = tmp_path.iterdir()
    if how == "gone":
        path.unlink()
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-8])
    else:
        save_file(damaged(load_file(path), how), path)
    with torch.no_grad():
        model.get_base_model().model.norm.weight.add_(1)
        before = copy.deepcopy(model.state_dict())
    with pytest.raises(RiaError, match=MESSAGES[how]):
        read_trained(model, tmp_path)
    assert equal(model.state_dict(), before)


def test_a_merged_adapter_beside_weights_that_are_read(pruned_llama, tmp_path):
    """It is outside the masks, but not of the weights in the file."""
    model = beside(pruned_llama.folder, ["norm"], beside_adapters=True)
    write_trained(model, tmp_path)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.base_model.merge_adapter()
    norm = model.get_base_model().model.norm.weight
    before = norm.detach().clone()
    with torch.no_grad():
        norm.add_(1)
    read_trained(model, tmp_path)
    assert torch.equal(norm, before)


def test_checkpoints_that_do_not_hold_all(pruned_llama, tmp_path):
    """Of another run, without the trained weights, or with fewer of them."""
    folder, runs, others = pruned_llama.folder, tmp_path / "runs", tmp_path / "others"
    for place in (runs, others):
        run(beside(folder), place, max_steps=2, save_only_model=True)
    with pytest.raises(RiaError, match=r"of another checkpoint.*resume_from_checkpoint"):
        run(beside(folder), runs, str(others / "checkpoint-2"))
    with pytest.raises(RiaError, match=r"q_proj.weight: trained now, but not in"):
        run(beside(folder, ["mlp.up_proj", "mlp.down_proj", "norm", "q_proj"]), runs, True)
    state = json.loads((runs / "checkpoint-2" / "trainer_state.json").read_text())
    del state["stateful_callbacks"]["BesideAdapters"]
    (runs / "checkpoint-2" / "trainer_state.json").write_text(json.dumps(state))
    with pytest.raises(RiaError, match="written without BesideAdapters"):
        run(beside(folder), runs, True)


@pytest.mark.parametrize("settings", [{"save_total_limit": 1}, {"enable_jit_checkpoint": True}])
def test_settings_that_keep_checkpoints_without_the_weights(pruned_llama, tmp_path, settings):
    training = trainer(beside(pruned_llama.folder), tmp_path, **(STEPS | settings))
    with pytest.raises(RiaError, match=f"{next(iter(settings))}.*beside the adapter"):
        BesideAdapters().on_train_begin(training.args, training.state, training.control, training.model)


@pytest.mark.parametrize("first", ["keep_sparse", "peft"])
def test_copies_are_not_trained(pruned_llama, first):
    """PEFT would train and save them, but not keep them sparse."""
    model = load(pruned_llama.folder)
    if first == "keep_sparse":
        keep_sparse(model)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["mlp", "lm_head"])
    wrapped = peft.get_peft_model(model, config)
    keep_sparse(wrapped, beside_adapters=True)
    loss_of(wrapped).backward()
    with pytest.raises(RiaError, match=r"layers.0.mlp.\w+.weight: trained as a copy by PEFT \(`modules_to_save`\)"):
        torch.optim.SGD(wrapped.parameters(), lr=0.1).step()


def test_adapters_that_take_their_values_from_the_weights(pruned_llama, tmp_path):
    """PiSSA makes the weights dense, and the first step would take away what is outside the masks."""
    model = load(pruned_llama.folder)
    keep_sparse(model)
    config = peft.LoraConfig(r=4, target_modules=["up_proj"], init_lora_weights="pissa")
    wrapped = peft.get_peft_model(model, config)
    with pytest.raises(RiaError, match=r"layers.0.mlp.up_proj.weight: not zero everywhere outside the mask"):
        run(wrapped, tmp_path / "runs", max_steps=1)


@pytest.mark.parametrize("how", ["merged", "pissa"])
def test_a_loop_does_not_lose_what_adapters_put_outside_the_masks(pruned_llama, how):
    model = load(pruned_llama.folder)
    keep_sparse(model)
    if how == "merged":
        first = peft.LoraConfig(r=4, target_modules=["up_proj"], init_lora_weights=False)
        model = peft.get_peft_model(model, first).merge_and_unload()
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"]))
    else:
        config = peft.LoraConfig(r=4, target_modules=["up_proj"], init_lora_weights="pissa")
        wrapped = peft.get_peft_model(model, config)
    keep_sparse(wrapped, beside_adapters=True)
    wrapped.requires_grad_()
    before = copy.deepcopy(wrapped.state_dict())
    loss_of(wrapped).backward()
    with pytest.raises(RiaError, match=r"layers.0.mlp.up_proj.weight: not zero everywhere .*would lose"):
        torch.optim.SGD(wrapped.parameters(), lr=0.1).step()
    assert equal(wrapped.state_dict(), before)


class Merges(TrainerCallback):
    """As trainers do that generate text, before each step: rounding leaves something outside the masks."""

    def __init__(self):
        self.left = []

    def on_step_begin(self, args, state, control, model=None, **_):
        with torch.no_grad():
            model.base_model.merge_adapter()
            model.base_model.unmerge_adapter()
            self.left.append(model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight.clone())


def test_adapters_that_are_merged_for_a_while(pruned_llama, tmp_path):
    model, merges, kept = load(pruned_llama.folder), Merges(), masks(pruned_llama.folder)
    keep_sparse(model)
    config = peft.LoraConfig(r=4, target_modules=["up_proj"], use_dora=True, init_lora_weights=False)
    model = peft.get_peft_model(model, config)
    for name, parameter in model.requires_grad_().named_parameters():
        if "magnitude" in name:
            parameter.data *= 1.1  # as in a run that resumes
    run(model, tmp_path / "runs", callbacks=(BesideAdapters, merges), max_steps=1, save_strategy="no")
    assert merges.left[0][~kept["model.layers.0.mlp.up_proj.weight"]].any()
    assert list(outside(model.unload(), kept)) == []
