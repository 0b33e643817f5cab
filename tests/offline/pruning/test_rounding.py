"""Rounding on a mask. The oracles: all points of the grid, one by one, and the error in float64."""

import e4m3
import pytest
import torch
from solving import admm

from ria_vllm.format import formats
from ria_vllm.offline.pruning import rounding
from ria_vllm.offline.pruning.masks import mask
from ria_vllm.offline.pruning.rounding import Objective, nearest_scales, round_on_mask
from ria_vllm.offline.pruning.symmetric import SymmetricMatrix

FORMATS = [*formats.INTEGERS.values(), formats.FP8]
GROUPS = formats.INTEGERS[4, 64]


def layer(out, channels, tokens, seed=0):
    """A weight, correlated input with channels of very different size, and a 2:4 mask in a random order p."""
    draw = torch.Generator().manual_seed(seed)
    mixing = torch.randn(channels, channels, generator=draw) / channels**0.5 + torch.eye(channels)
    X = torch.randn(tokens, channels, generator=draw) @ mixing * torch.randn(channels, generator=draw).exp()
    W, p = torch.randn(out, channels, generator=draw), torch.randperm(channels, generator=draw)
    keep = mask((W.abs() * X.norm(dim=0))[:, p])[:, torch.argsort(p)]
    R = 0.3 * X @ torch.randn(channels, out, generator=draw) / channels**0.5  # what the output lacks
    return W, X, keep, p, R


def errors(V, W, X, R):
    """||X w + r - X v||^2 of each row, in float64."""
    return (X.double() @ (W.double() - V.double()).T + R.double()).square().sum(0)


def damped(X, R, damping):
    """The input and what lacks, with tokens that make it cost the damping to be far from the dense weight."""
    added = (damping * X.square().sum(0).mean()).sqrt() * torch.eye(X.shape[1])
    return torch.cat([X, added]), torch.cat([R, torch.zeros(X.shape[1], R.shape[1])])


def gram_of(X):
    return SymmetricMatrix.of(X.T @ X)


def in_order(V, p, weight_format, scales=None, dtype=torch.float32):
    """V, rounded to the nearest values with its columns in the order p."""
    return weight_format.quantize(V[:, p], dtype, scales)[0][:, torch.argsort(p)]


def beside_the_grid(weight_format, values, channels, seed):
    """float64 [16], the errors of rows: the least of all points of the grid, tried one by one at the scales that were
    found; after rounding on the mask; and rounded to the nearest."""
    W, X, keep, p, R = layer(16, channels, 50, seed)
    solved = admm(W, X.T @ X, keep, damping=1e-6, cross_term=R.T @ X)
    plain = weight_format.quantize(solved, torch.float32)[0]
    found, scales = round_on_mask(W, solved, keep, Objective(gram_of(X), R.T @ X, 0.0), weight_format, p, 20)
    points = torch.cartesian_prod(*[values] * (channels // 2))
    best = torch.empty(16, dtype=torch.float64)
    for i in range(16):
        wanted = X.double() @ W[i].double() + R[:, i].double()
        best[i] = (wanted - points @ X[:, keep[i]].double().T * scales[i].double()).square().sum(1).min()
    return best, errors(found, W, X, R), errors(plain, W, X, R)


@pytest.mark.parametrize("seed", range(3))
def test_against_every_point_of_the_grid_of_e4m3(seed):
    best, lost, nearest = beside_the_grid(formats.FP8, e4m3.VALUES, 4, seed)
    assert (best * (1 - 1e-5) < lost).all() and (lost < best * 1.05).all() and (lost <= nearest).all()


@pytest.mark.parametrize("seed", range(3))
def test_against_every_point_of_the_grid_of_integers(seed):
    best, lost, nearest = beside_the_grid(formats.INT4, torch.arange(-8.0, 8.0, dtype=torch.float64), 8, seed)
    assert (lost > best * (1 - 1e-5)).all()
    assert lost.sum() < 1.1 * best.sum() and (lost / best < 1.001).double().mean() > 0.6
    assert (nearest - best).sum() > 4 * (lost - best).sum()


@pytest.mark.parametrize("weight_format", FORMATS, ids=str)
@pytest.mark.parametrize("tokens", [600, 20], ids=["many tokens", "fewer tokens than channels"])
def test_each_pass_lowers_the_error_of_every_row(weight_format, tokens):
    W, X, keep, p, R = layer(40, 256, tokens)
    solved = admm(W, X.T @ X, keep, cross_term=R.T @ X)
    scales = [None, weight_format.scales_of(solved[:, p])]
    scales[0] = nearest_scales(solved[:, p], weight_format, damped(X, R, 0.1)[0].square().sum(0)[p])
    plain = torch.stack([errors(in_order(solved, p, weight_format, s), W, *damped(X, R, 0.1)) for s in scales])
    last, first = plain.amin(0), None
    for passes in range(5):
        V, _ = round_on_mask(W, solved.clone(), keep, Objective(gram_of(X), R.T @ X, 0.1), weight_format, p, passes)
        lost = errors(V, W, *damped(X, R, 0.1))
        assert (lost <= last * (1 + 1e-5)).all(), passes
        first, last = lost if first is None else first, lost
    assert last.sum() < 0.999 * first.sum()
    assert (V[~keep] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("weight_format", FORMATS, ids=str)
def test_the_result_is_what_is_read_back(weight_format, dtype):
    W, X, keep, p, R = layer(24, 128, 300)
    V, scales = round_on_mask(
        W.to(dtype), admm(W, X.T @ X, keep), keep, Objective(gram_of(X), R.T @ X), weight_format, p
    )
    assert scales.dtype == weight_format.scale_dtype
    stored, same = weight_format.quantize(V[:, p], dtype, scales)
    assert same is scales and torch.equal(stored, V[:, p].to(dtype))
    parts = weight_format.encode(stored, keep[:, p], scales)
    assert weight_format.check(parts, tuple(W.shape)) is None
    assert torch.equal(weight_format.decode(parts, dtype), stored)
    values = parts["compressed"].float() if weight_format == formats.FP8 else weight_format.integers(parts)
    assert values.min() >= weight_format.smallest and values.max() <= weight_format.largest


@pytest.mark.parametrize("groups", (1, 2, 4))
def test_scales_of_few_groups_are_multiples(groups):
    """Of a number with four bits: others have products that bfloat16 does not hold."""
    W, X, keep, p, R = layer(400, 64 * groups, 300)
    W *= torch.logspace(-2, 2, 64 * groups)
    weight_format = formats.INTEGERS[4, 64]
    _, scales = round_on_mask(W, admm(W, X.T @ X, keep), keep, Objective(gram_of(X), R.T @ X), weight_format, p)
    assert torch.equal(weight_format.storable(scales), scales)


@pytest.mark.parametrize("weight_format", [formats.INT4, GROUPS], ids=str)
def test_groups_are_those_of_the_stored_order(weight_format):
    W, X, keep, p, R = layer(24, 128, 300)
    solved = admm(W, X.T @ X, keep, cross_term=R.T @ X)
    want, scales = round_on_mask(
        W[:, p], solved[:, p], keep[:, p], Objective(gram_of(X[:, p]), R.T @ X[:, p]), weight_format
    )
    found, found_scales = round_on_mask(W, solved, keep, Objective(gram_of(X), R.T @ X), weight_format, p)
    # Sums in another order may round an entry the other way; the groups of the model's own order would differ all over.
    assert (found[:, p] - want).abs().gt(1e-3).double().mean() < 0.01
    torch.testing.assert_close(errors(found, W, X, R), errors(want, W[:, p], X[:, p], R), rtol=0.01, atol=0)
    assert found_scales.shape == scales.shape


def test_wide_inputs_and_many_rows_give_the_same(monkeypatch):
    W, X, keep, p, R = layer(50, 640, 900)  # three blocks of the half-stored matrix
    solved = admm(W, X.T @ X, keep)
    arguments = W, keep, Objective(gram_of(X), R.T @ X), GROUPS, p
    want = round_on_mask(W, solved.clone(), *arguments[1:])
    again = round_on_mask(W, solved.clone(), *arguments[1:])
    assert torch.equal(want[0], again[0]) and torch.equal(want[1], again[1])
    monkeypatch.setattr(rounding, "DENSE_WIDTH", 0)
    wide = round_on_mask(W, solved.clone(), *arguments[1:])
    assert torch.equal(want[0], wide[0]) and torch.equal(want[1], wide[1])
    monkeypatch.setattr(rounding, "ENTRIES_AT_ONCE", 0)
    monkeypatch.setattr(rounding, "LEAST_ROWS", 16)
    few = round_on_mask(W, solved.clone(), *arguments[1:])
    torch.testing.assert_close(errors(few[0], W, X, R), errors(want[0], W, X, R), rtol=0.01, atol=0)


@pytest.mark.parametrize("damping", [0.0, 0.2])
@pytest.mark.parametrize("weight_format", [formats.INT4, GROUPS], ids=str)
def test_dead_channels_and_empty_rows(weight_format, damping):
    W, X, keep, p, R = layer(12, 128, 80)
    X[:, [1, 6]] = 0
    W[3] = 0
    R[:, 3] = 0
    solved = admm(W, X.T @ X, keep)
    plain = in_order(solved, p, weight_format, weight_format.scales_of(solved[:, p]))
    V, scales = round_on_mask(W, solved, keep, Objective(gram_of(X), R.T @ X, damping), weight_format, p)
    assert V.isfinite().all() and (scales > 0).all() and scales.isfinite().all()
    assert (V[3] == 0).all()
    assert errors(V, W, X, R).sum() < 0.9 * errors(plain, W, X, R).sum()


def test_no_input_at_all_rounds_to_the_nearest():
    W, _, keep, p, _ = layer(6, 128, 20)
    solved = W * keep
    nothing = SymmetricMatrix.of(torch.zeros(128, 128))
    V, scales = round_on_mask(W, solved.clone(), keep, Objective(nothing), GROUPS, p)
    off = (V - solved)[:, p].view(6, 2, 64).abs()
    inside = solved[:, p].view(6, 2, 64).abs() <= 7.5 * scales.float()[..., None]
    assert (off <= 0.5001 * scales.float()[..., None])[inside].all()


@pytest.mark.parametrize("weight_format", FORMATS, ids=str)
def test_scales_by_error_cost_less_than_any_other_of_the_range(weight_format):
    W, X, keep, p, _ = layer(20, 256, 300)
    W = (W * keep)[:, p]
    cost = X.square().sum(0)[p]
    found = nearest_scales(W, weight_format, cost)
    assert found.dtype == weight_format.scale_dtype

    def lost(scales):
        off = weight_format.quantize(W, torch.float32, scales)[0] - W
        return (off.square() * cost).view(20, found.shape[1], -1).sum(-1)

    fitting = weight_format.scales_of(W)
    assert (lost(found) <= lost(fitting)).all()
    assert lost(found).sum() < (0.9 if "int4" in weight_format.name else 0.999) * lost(fitting).sum()
    for factor in (0.5, 0.6, 0.7, 0.8, 0.9, 1.1):
        other = (fitting.float() * factor).to(fitting.dtype)
        assert lost(found).sum() < lost(other).sum()


def test_the_damping_of_divided_inputs_is_that_of_before():
    """The damped matrix is the one of the undivided inputs, divided; in any order."""
    X = layer(8, 128, 300)[1]
    scales = torch.exp2(torch.randint(-3, 4, (128,), generator=torch.Generator().manual_seed(1)).float())
    p = torch.randperm(128, generator=torch.Generator().manual_seed(2))
    found = rounding._System(
        gram_of(X / scales), p, rounding.damping_of(gram_of(X / scales).diagonal(), 0.1, scales), 64
    )
    want = (X.T @ X + 0.1 * (X.T @ X).diagonal().mean() * torch.eye(128)) / scales / scales[:, None]
    torch.testing.assert_close(found.matrix, want[p][:, p], rtol=1e-4, atol=1e-4)
