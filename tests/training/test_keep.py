"""`keep_sparse`: only kept weights change, at every step, whatever trains them."""

import copy
import pickle

import pytest
import torch
from damage import prove
from quantized import quantized
from sparse_llama import TOKENS, load, loss_of, masks, outside, train
from torch import nn
from transformers.optimization import Adafactor

from ria_vllm.errors import RiaError
from ria_vllm.training import keep_sparse, save


class MovesEverything(torch.optim.Optimizer):
    """As Muon does: whatever an element's gradient, the element moves."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.add_(parameter.grad.sum() + 0.01)


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adafactor": lambda p: Adafactor(p, lr=1e-2, relative_step=False, scale_parameter=True, weight_decay=0.1),
    "muon": lambda p: torch.optim.Muon([one for one in p if one.dim() == 2], lr=1e-2, weight_decay=0.1),
    "moves-everything": MovesEverything,
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_optimizer_changes_only_kept_weights_at_every_step(pruned_llama, kind):
    model, kept = load(pruned_llama.folder), masks(pruned_llama.folder)
    keep_sparse(model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    train(model, OPTIMIZERS[kind](model.parameters()), after=lambda: check_zeros(model, kept))
    assert len(kept) == 14
    for name, mask in kept.items():
        moved = model.get_parameter(name) != before[name]
        assert not moved[~mask].any() and moved[mask].float().mean() > 0.9, name
    assert (model.lm_head.weight != before["lm_head.weight"]).any()


def check_zeros(model, kept):
    assert list(outside(model, kept)) == []


def test_without_it_pruned_weights_change(pruned_llama):
    """What the other tests see is due to `keep_sparse`."""
    model, kept = load(pruned_llama.folder), masks(pruned_llama.folder)
    train(model, OPTIMIZERS["adamw"](model.parameters()), steps=1)
    assert set(outside(model, kept)) == set(kept)


def test_the_steps_are_those_of_a_model_that_has_only_the_kept_weights(pruned_llama):
    """The oracle: weights are `values * mask` in the graph, so pruned ones have no gradient; clipped, accumulated."""
    kept = masks(pruned_llama.folder)
    model, oracle = load(pruned_llama.folder), load(pruned_llama.folder)
    keep_sparse(model)
    for name, mask in kept.items():
        module = oracle.get_submodule(name.removesuffix(".weight"))
        nn.utils.parametrize.register_parametrization(module, "weight", Masked(mask))
    found = []
    for one in (model, oracle):
        optimizer, norms = torch.optim.AdamW(one.parameters(), lr=1e-3, weight_decay=0.1), []
        for step in range(4):
            optimizer.zero_grad()
            for part in range(2):  # accumulated
                (loss_of(one, TOKENS[2 * step : 2 * step + 2][part::2]) / 2).backward()
            norms.append(nn.utils.clip_grad_norm_(one.parameters(), 0.5))
            optimizer.step()
        found.append(torch.stack(norms))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=0)
    for name in kept:
        want = oracle.get_submodule(name.removesuffix(".weight")).weight
        torch.testing.assert_close(model.get_parameter(name), want, rtol=0, atol=1e-5)


class Masked(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, weight):
        return weight * self.mask


def test_gradients_that_overflow_where_weights_are_pruned(pruned_llama):
    """inf * 0 is NaN, so a mask that multiplies would spread it."""
    model, kept = load(pruned_llama.folder), masks(pruned_llama.folder)
    keep_sparse(model)
    name, mask = next(iter(kept.items()))
    weight = model.get_parameter(name)
    weight.grad = torch.where(mask, 1.0, torch.inf)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert weight.isfinite().all() and not weight[~mask].any()


@pytest.mark.parametrize("changed", ["replaced", "in place"])
def test_gradients_that_someone_else_has_changed_since(pruned_llama, changed):
    """At every step: momentum would remember what was outside the mask once."""
    model, kept = load(pruned_llama.folder), masks(pruned_llama.folder)
    keep_sparse(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        loss_of(model).backward()
        for name in kept:
            weight = model.get_parameter(name)
            if changed == "in place":
                weight.grad.add_(1.0)
            else:
                weight.grad = None  # so that the next one may be in the same place
                weight.grad = torch.ones_like(weight)
        optimizer.step()
        for name, mask in kept.items():
            momentum = optimizer.state[model.get_parameter(name)]["momentum_buffer"]
            assert not momentum[~mask].any() and momentum[mask].any(), name


def test_a_kept_weight_may_be_zero(damage):
    """Masks are what the folder says, not where weights are not zero."""
    name = "model.layers.0.mlp.up_proj"
    damage.replace(f"{name}.compressed", torch.zeros_like)
    prove(damage.folder)
    model, mask = load(damage.folder), masks(damage.folder)[f"{name}.weight"]
    keep_sparse(model)
    train(model, OPTIMIZERS["adamw"](model.parameters()), steps=2)
    weight = model.get_parameter(f"{name}.weight")
    assert weight[mask].ne(0).float().mean() > 0.9 and not weight[~mask].any()


COPIES = [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]


@pytest.mark.parametrize("copied", COPIES)
def test_a_copy_is_kept_sparse_too(pruned_llama, copied):
    """Trainers copy models: for a reference, for an average, to other processes."""
    model, kept = load(pruned_llama.folder), masks(pruned_llama.folder)
    keep_sparse(model)
    twin = copied(model)
    train(twin, MovesEverything(twin.parameters()), after=lambda: check_zeros(twin, kept))
    before = load(pruned_llama.folder).state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_parameters_that_were_replaced(pruned_llama):
    """FSDP2 and `to("meta")` put other objects into the modules."""
    model, kept = load(pruned_llama.folder), masks(pruned_llama.folder)
    keep_sparse(model)
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.detach().clone())
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    loss_of(model).backward()
    assert not any(model.get_parameter(name).grad[~mask].any() for name, mask in kept.items())
    optimizer.step()
    check_zeros(model, kept)


def replaced(model, place="model.layers.0.mlp"):
    """The module `down_proj` there is another one now, with a copy of the weight."""
    parent = model.get_submodule(place)
    old = parent.down_proj
    parent.down_proj = nn.Linear(old.in_features, old.out_features, bias=False)
    with torch.no_grad():
        parent.down_proj.weight.copy_(old.weight)


@pytest.mark.parametrize("whole", [True, False])
def test_a_module_that_was_replaced_is_refused(pruned_llama, whole):
    """accelerate does so with `mixed_precision="fp8"`. Some trainers call a part of the model, not the whole."""
    model = load(pruned_llama.folder)
    keep_sparse(model)
    replaced(model)
    optimizer = MovesEverything(model.parameters())
    with pytest.raises(RiaError, match=r"layers.0.mlp.down_proj.weight"):
        model(TOKENS) if whole else optimizer.step()


@pytest.mark.parametrize("trained", ["weight", "adapter"])
def test_no_kept_weight_is_trained_beside_an_adapter(pruned_llama, trained):
    """PEFT's checkpoints would not hold them."""
    peft = pytest.importorskip("peft", reason="peft is not installed (pip install '.[train]')")
    model = load(pruned_llama.folder)
    keep_sparse(model)
    lora = peft.LoraConfig(r=4, target_modules="all-linear", modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(model, lora)
    name = "layers.1.mlp.up_proj.base_layer.weight"
    weight = next(parameter for key, parameter in model.named_parameters() if key.endswith(name))
    weight.requires_grad_(trained != "adapter")
    before = weight.detach().clone()
    optimizer = torch.optim.SGD([one for one in wrapped.parameters() if one.requires_grad], lr=0.1)
    loss_of(wrapped).backward()
    if trained == "adapter":
        optimizer.step()
    else:
        with pytest.raises(RiaError, match=rf"{name.replace('.base_layer', '')}: trained beside an adapter"):
            optimizer.step()
    assert torch.equal(weight, before)


def test_flattened_weights_are_refused(pruned_llama):
    """As in FSDP1 and DeepSpeed ZeRO-3."""
    model = load(pruned_llama.folder)
    keep_sparse(model)
    module = model.model.layers[1].mlp.up_proj
    module.weight = nn.Parameter(module.weight.detach().flatten())
    with pytest.raises(RiaError, match=r"model.layers.1.mlp.up_proj.weight: .*FSDP1.*use FSDP2"):
        model(TOKENS)


def test_a_model_that_is_dense_already(pruned_llama):
    model = load(pruned_llama.folder)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.add_(1e-3)
    with pytest.raises(RiaError, match=r"model.layers.1.mlp.up_proj.weight: not zero everywhere outside the mask"):
        keep_sparse(model)


@pytest.mark.parametrize("later", ["unfrozen", "added"])
def test_weights_that_an_optimizer_trains_only_later(pruned_llama, later):
    """What became dense meanwhile is not lost at the first step that trains it."""
    model = load(pruned_llama.folder)
    keep_sparse(model)
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.requires_grad_(False)
    others = [parameter for parameter in model.parameters() if later == "unfrozen" or parameter is not weight]
    optimizer = torch.optim.SGD(others, lr=0.1)
    train(model, optimizer, steps=1)
    weight.add_(1e-3)
    weight.requires_grad_()
    if later == "added":
        optimizer.add_param_group({"params": [weight]})
    with pytest.raises(RiaError, match=r"layers.1.mlp.up_proj.weight: not zero everywhere .*would lose"):
        train(model, optimizer, steps=1)


def test_a_dense_checkpoint_goes_on_with_the_masks_of_the_folder(pruned_llama, tmp_path, monkeypatch):
    model, kept = load(pruned_llama.folder), masks(pruned_llama.folder)
    model.save_pretrained(tmp_path / "checkpoint-1")
    again = load(tmp_path / "checkpoint-1")
    with pytest.raises(RiaError, match="give the folder as `like`"):
        keep_sparse(again)
    keep_sparse(again, like=pruned_llama.folder)
    train(again, MovesEverything(again.parameters()), after=lambda: check_zeros(again, kept))
    with monkeypatch.context() as patch:
        patch.setattr(type(again), "from_pretrained", None)  # the folder is known by now
        save(again, tmp_path / "new", like=pruned_llama.folder)
    assert list(outside(load(tmp_path / "new"), kept)) == []


def test_a_dense_checkpoint_rounds_its_inputs_as_the_folder_does(pruned_llama, tmp_path):
    folder = quantized(pruned_llama.folder, tmp_path / "int8", "int8", activations=True)
    whole = load(folder).eval()
    whole.save_pretrained(tmp_path / "checkpoint-1")
    again = load(tmp_path / "checkpoint-1").eval()
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        rounded, unrounded = whole(tokens).logits, again(tokens).logits
        keep_sparse(again, like=folder)
        assert torch.equal(again(tokens).logits, rounded) and not torch.equal(unrounded, rounded)
