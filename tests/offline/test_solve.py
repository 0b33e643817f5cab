"""The linears of one stage, solved for integer weights."""

import pytest
import torch

from ria_vllm.format import formats
from ria_vllm.offline.calibration.statistics import Statistics
from ria_vllm.offline.model.topology import Group
from ria_vllm.offline.pruning.drift import InputDrift
from ria_vllm.offline.pruning.symmetric import SymmetricMatrix
from ria_vllm.offline.recipe import Recipe
from ria_vllm.offline.sublayer.solve import ToPrune, find_permutations, solve

INT4 = {"weights": "int4", "group_size": 64}
FORMAT = formats.INTEGERS[4, 64]


@pytest.fixture
def stage():
    """Two linears with one input that has drifted: weights, statistics, X and the dense model's input."""
    draw = torch.Generator().manual_seed(0)
    mixing = torch.randn(128, 128, generator=draw) / 128**0.5 + torch.eye(128)
    X = torch.randn(500, 128, generator=draw) @ mixing * torch.randn(128, generator=draw).exp()
    D = X + 0.1 * X @ torch.randn(128, 128, generator=draw) / 128**0.5
    drift = InputDrift((D - X).T @ X, SymmetricMatrix.of((D - X).T @ (D - X)))
    found = Statistics(X.norm(dim=0), SymmetricMatrix.of(X.T @ X), drift)
    weights = {name: torch.randn(size, 128, generator=draw).bfloat16() for name, size in (("a", 48), ("b", 80))}
    return weights, dict.fromkeys(weights, found), X, D


def pruned(stage, recipe, **options):
    weights, statistics, _, _ = stage
    permutations = find_permutations([Group(tuple(weights))], weights, statistics, recipe)
    linears = {name: ToPrune(weights[name], statistics[name], permutations[name]) for name in weights}
    return solve(linears, recipe, torch.bfloat16, lambda name: name, **options)


def error(V, W, X, D):
    wanted = D.double() @ W.double().T
    return float((wanted - X.double() @ V.double().T).norm() / wanted.norm())


def test_what_is_trained_starts_at_the_least_squares_of_its_own_damping(stage):
    """Solved row by row, on the mask that was chosen."""
    weights, _, X, D = stage
    X, D = X.double(), D.double()
    kept_to_dense = {}
    for reconstruct, damping in (("admm", 0.2), ("short", 1.0)):
        recipe = Recipe(reconstruct=reconstruct, samples=32, seq_len=512)
        found = pruned(stage, recipe, damping=recipe.damping)
        added = damping * X.square().sum(0).mean()
        for name, dense in weights.items():
            W, mask = dense.double(), found[name].mask
            system, target = X.T @ X + added * torch.eye(128), W @ (D.T @ X + added * torch.eye(128))
            want = torch.zeros_like(W)
            for row, keep in enumerate(mask):
                want[row, keep] = torch.linalg.solve(system[keep][:, keep], target[row, keep])
            assert (found[name].weight.double() - want).norm() < 0.03 * want.norm(), (reconstruct, name)
            kept_to_dense[reconstruct, name] = float((want - W)[mask].norm())
    for name in weights:
        assert kept_to_dense["short", name] < 0.7 * kept_to_dense["admm", name]


def test_rounding_is_a_part_of_the_reconstruction(stage):
    weights, _, X, D = stage
    exact, rounded = pruned(stage, Recipe()), pruned(stage, Recipe(**INT4))
    for name, W in weights.items():
        linear, p = rounded[name], rounded[name].p
        assert torch.equal(linear.mask, exact[name].mask) and torch.equal(p, exact[name].p)
        stored, back = linear.weight[:, p], torch.argsort(p)
        assert torch.equal(FORMAT.quantize(stored, torch.bfloat16, linear.scale)[0], stored)
        plain = FORMAT.quantize(exact[name].weight[:, p], torch.bfloat16)[0][:, back]
        best, simple = error(exact[name].weight, W, X, D), error(plain, W, X, D)
        assert error(linear.weight, W, X, D) - best < 0.4 * (simple - best)
        assert linear.record["error_after"] == pytest.approx(error(linear.weight, W, X, D), rel=1e-3)


def test_without_reconstruction_weights_are_the_nearest_by_scales_that_weigh_channels(stage):
    weights, _, X, _ = stage
    exact, rounded = pruned(stage, Recipe(reconstruct="none")), pruned(stage, Recipe(reconstruct="none", **INT4))
    for name in weights:
        linear, p = rounded[name], rounded[name].p
        stored, wanted = (one.weight[:, p].float() for one in (linear, exact[name]))
        scales = linear.scale.float().repeat_interleave(64, 1)
        inside = wanted.abs() < 7.5 * scales
        assert inside.double().mean() > 0.95
        assert ((stored - wanted).abs() <= 0.535 * scales)[inside].all()
        plain = FORMAT.quantize(wanted, torch.bfloat16)[0].float()
        cost = X.square().sum(0)[p]
        assert ((stored - wanted).square() * cost).sum() < 0.9 * ((plain - wanted).square() * cost).sum()
