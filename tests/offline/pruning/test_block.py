import math

import pytest
import torch

from ria_vllm.offline.pruning.block import Training, train_block
from ria_vllm.offline.pruning.masks import mask


class Sublayer(torch.nn.Module):
    """A gated MLP behind a norm, on a residual stream."""

    def __init__(self, hidden=16, inner=32, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.norm = torch.nn.RMSNorm(hidden)
        self.gate = torch.nn.Linear(hidden, inner, bias=False)
        self.up = torch.nn.Linear(hidden, inner, bias=False)
        self.down = torch.nn.Linear(inner, hidden, bias=False)

    def forward(self, h):
        x = self.norm(h)
        return h + self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))


@pytest.fixture
def problem():
    """A pruned sublayer, its masks, inputs, and the dense one's outputs."""
    model = Sublayer()
    draw = torch.Generator().manual_seed(1)
    inputs = [torch.randn(2, 24, 16, generator=draw) for _ in range(6)]
    with torch.no_grad():
        targets = [model(h) for h in inputs]
        masks = {}
        for name in ("gate", "up", "down"):
            linear = model.get_submodule(name)
            masks[f"{name}.weight"] = mask(linear.weight.abs())
            linear.weight.mul_(masks[f"{name}.weight"])
    model.requires_grad_(False)
    params = {name: p for name, p in model.named_parameters() if name in masks}
    return model, params, masks, inputs, targets


def loss(model, inputs, targets):
    with torch.no_grad():
        errors = [((model(h) - t).square().sum(-1) / t.square().sum(-1)).mean() for h, t in zip(inputs, targets)]
    return sum(errors).item() / len(errors)


def unmeasured():
    return 0.0


def test_lowers_the_loss_and_keeps_the_zeros(problem):
    model, params, masks, inputs, targets = problem
    before, norm = loss(model, inputs, targets), model.norm.weight.clone()
    how = Training(passes=20, lr=0.02, dtype=torch.float32)
    losses = train_block(model, params, masks.__getitem__, inputs, targets, how, lambda: loss(model, inputs, targets))
    assert losses == pytest.approx((before, loss(model, inputs, targets)), rel=1e-4) and losses[1] < 0.65 * before
    for name, p in params.items():
        assert (p[~masks[name]] == 0).all() and (p[masks[name]] != 0).all()
        assert not p.requires_grad and p.grad is None
    assert torch.equal(model.norm.weight, norm)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_is_adam_on_what_the_masks_keep(problem, dtype):
    """What torch's Adam does on dense float32 weights with masked gradients, in units of a weight's size."""
    model, params, masks, inputs, targets = problem
    start = {name: p.clone() for name, p in params.items()}
    train_block(
        model, params, masks.__getitem__, inputs, targets, Training(passes=3, lr=0.01, seed=5, dtype=dtype), unmeasured
    )
    trained = {name: p.clone() for name, p in params.items()}

    for name, p in params.items():
        p.data = start[name]
        p.requires_grad_(True)
    kept = [p.detach()[masks[name]] for name, p in params.items()]
    units = [math.sqrt(float(torch.linalg.vector_norm(weights)) ** 2 / len(weights)) for weights in kept]
    for weights, unit in zip(kept, units, strict=True):
        assert unit == pytest.approx(float(weights.double().square().mean().sqrt()), rel=1e-6)
    adam = torch.optim.Adam([{"params": [p]} for p in params.values()])
    order, step = torch.Generator().manual_seed(5), 0
    for _ in range(3):
        for i in torch.randperm(len(inputs), generator=order).tolist():
            for group, unit in zip(adam.param_groups, units, strict=True):
                group["lr"] = 1e-2 * (1 + math.cos(math.pi * step / 18)) / 2 * unit
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                missing = model(inputs[i]).float() - targets[i]
            adam.zero_grad()
            (missing.square().sum(-1) / targets[i].square().sum(-1)).mean().backward()
            for name, p in params.items():
                p.grad *= masks[name]
            adam.step()
            step += 1
    for name, p in params.items():
        torch.testing.assert_close(trained[name], p.detach(), rtol=0, atol=1e-7)  # processors round differently


def test_steps_are_as_large_as_the_weights(problem):
    """A weight that is an eighth, where what it gives counts eight times, becomes an eighth of what it would."""
    model, params, masks, inputs, targets = problem
    start, forward, ends = {name: p.clone() for name, p in params.items()}, model.down.forward, []
    for factor in (1.0, 0.125):
        for name, p in params.items():
            p.data = start[name] * (factor if name == "down.weight" else 1)
        model.down.forward = lambda x, factor=factor: forward(x) / factor
        train_block(
            model, params, masks.__getitem__, inputs, targets, Training(passes=2, dtype=torch.float32), unmeasured
        )
        ends.append({name: p / (factor if name == "down.weight" else 1) for name, p in params.items()})
    for name, weight in ends[0].items():
        moved = (weight - start[name] * masks[name]).norm()
        assert moved > 0.01 * weight.norm() and (ends[1][name] - weight).norm() < 0.01 * moved, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_any_dtype(problem, dtype):
    """Only the first rounding differs: what is trained is float32."""
    model, params, masks, inputs, targets = problem
    ends = []
    rounded = {name: p.to(dtype) for name, p in params.items()}
    for start in (rounded, {name: p.float() for name, p in rounded.items()}):
        for name, p in params.items():
            p.data = start[name].clone()
        train_block(model, params, masks.__getitem__, inputs, targets, Training(passes=2), unmeasured)
        assert all(p.dtype == torch.float32 for p in params.values())
        ends.append(torch.cat([p.detach().flatten() for p in params.values()]))
    assert torch.equal(*ends)
    assert not torch.equal(ends[0], ends[0].bfloat16().float())


def test_what_lies_outside_a_mask_becomes_zero(problem):
    model, params, masks, inputs, targets = problem
    model.gate.weight.data[~masks["gate.weight"]] = 1.0
    train_block(model, params, masks.__getitem__, inputs, targets, Training(passes=1), unmeasured)
    assert (model.gate.weight[~masks["gate.weight"]] == 0).all()


def test_a_huge_token_does_not_dominate(problem):
    """One token has a thousand times the norm of the others and cannot be fitted; the others are still learned."""
    model, params, masks, inputs, targets = problem
    for h, t in zip(inputs, targets):
        h[0, 0], t[0, 0] = 1000 * torch.ones(16), -1000 * torch.ones(16)
    others = [h[:, 1:] for h in inputs], [t[:, 1:] for t in targets]
    before = loss(model, *others)
    train_block(model, params, masks.__getitem__, inputs, targets, Training(passes=20, lr=0.02), unmeasured)
    assert loss(model, *others) < 0.6 * before


def test_a_loss_that_is_not_finite_leaves_nothing_to_measure(problem):
    model, params, masks, inputs, targets = problem
    inputs = [h * float("nan") for h in inputs]
    assert train_block(model, params, masks.__getitem__, inputs, targets, Training(), unmeasured) is None
