import pytest
import torch
from solving import admm

from ria_vllm.offline.pruning.admm import admm_solver, output_error
from ria_vllm.offline.pruning.drift import InputDrift, OutputDrift
from ria_vllm.offline.pruning.masks import mask
from ria_vllm.offline.pruning.symmetric import SymmetricMatrix


def layer(out, channels, tokens, seed=0):
    """A weight, correlated input with channels of very different size, and a 2:4 mask."""
    draw = torch.Generator().manual_seed(seed)
    mixing = torch.randn(channels, channels, generator=draw) / channels**0.5 + torch.eye(channels)
    X = torch.randn(tokens, channels, generator=draw) @ mixing * torch.randn(channels, generator=draw).exp()
    W = torch.randn(out, channels, generator=draw)
    return W, X, mask(W.abs() * X.norm(dim=0))


def gram_of(X):
    return SymmetricMatrix.of(X.T @ X)


def objective(W, V, X):
    return (X.double() @ (W.double() - V.double()).T).norm().item()


def least_squares(W, X, keep, Y=None):
    """The best kept weights, row by row in float64, for the output Y, or X W^T."""
    X, W = X.double(), W.double()
    Y = X @ W.T if Y is None else Y.double()
    best = torch.zeros_like(W)
    for i in range(W.shape[0]):
        columns = keep[i].nonzero().flatten()
        best[i, columns] = torch.linalg.lstsq(X[:, columns], Y[:, i]).solution
    return best


def test_admm_against_least_squares():
    W, X, keep = layer(24, 32, 400)
    best = objective(W, least_squares(W, X, keep), X)
    found = objective(W, admm(W, X.T @ X, keep, damping=1e-6), X)
    assert best < 0.8 * objective(W, W * keep, X)
    assert best <= found < 1.01 * best


def drifted(W, X, seed=1):
    """An output that is not X W^T, and the two kinds of drift that lead to it."""
    dense = X + 0.05 * X @ torch.randn(X.shape[1], X.shape[1], generator=torch.Generator().manual_seed(seed))
    Y, D = dense @ W.T, dense - X
    R = Y - X @ W.T
    return Y, [InputDrift(D.T @ X, gram_of(D)), OutputDrift(R.T @ X, R.square().sum().item())]


def test_admm_against_least_squares_if_the_input_has_drifted():
    W, X, keep = layer(24, 32, 400)
    Y, drifts = drifted(W, X)
    best = least_squares(W, X, keep, Y)
    lost = lambda V: (Y.double() - X.double() @ V.double().T).norm().item()  # noqa: E731
    for drift in drifts:
        V = admm(W, X.T @ X, keep, damping=1e-6, cross_term=drift.cross_term(W))
        assert lost(best) <= lost(V) < 1.01 * lost(best)
        assert lost(V) < 0.97 * lost(admm(W, X.T @ X, keep, damping=1e-6))
        expected = lost(V) / Y.norm().item()
        assert output_error(W, V, gram_of(X), drift) == pytest.approx(expected, rel=1e-3)


def test_no_row_is_worse_than_masked_if_the_input_has_drifted():
    W, X, keep = layer(40, 32, 20, seed=3)
    Y, drifts = drifted(W, X)
    for drift in drifts:
        V = admm(W, X.T @ X, keep, damping=1.0, cross_term=drift.cross_term(W))
        before, after = ((Y - X @ B.T).norm(dim=0) for B in (W * keep, V))
        assert (after <= before * (1 + 1e-4)).all() and (after < 0.99 * before).any()


def test_a_chosen_mask_keeps_the_pattern_and_is_better():
    W, X, keep = layer(300, 32, 400)
    V, chosen = admm_solver(gram_of(X)).solve(W, keep, choose=lambda rows: mask(rows.abs() * X.norm(dim=0)))
    assert (chosen.view(300, -1, 4).sum(-1) == 2).all() and (chosen != keep).any()
    assert (V[~chosen] == 0).all()
    assert objective(W, V, X) < 0.97 * objective(W, admm(W, X.T @ X, keep), X)


def test_admm_is_float32_and_zero_outside_the_mask():
    W, X, keep = layer(8, 16, 50)
    V = admm(W.bfloat16(), X.T @ X, keep)
    assert V.dtype == torch.float32
    assert (V[~keep] == 0).all() and (V[keep] != 0).all()


@pytest.mark.parametrize(("iterations", "damping"), [(0, 0.01), (1, 1e-4), (20, 1.0)])
def test_no_row_is_worse_than_masked(iterations, damping):
    W, X, keep = layer(40, 32, 20, seed=3)  # fewer tokens than channels
    V = admm(W, X.T @ X, keep, iterations=iterations, damping=damping)
    before = (X @ (W - W * keep).T).norm(dim=0)
    after = (X @ (W - V).T).norm(dim=0)
    assert (after <= before * (1 + 1e-4)).all()


def test_dead_channels():
    W, X, keep = layer(12, 16, 80)
    X[:, [1, 6]] = 0
    for damping in (0.0, 0.01):
        V = admm(W, X.T @ X, keep, damping=damping)
        assert torch.isfinite(V).all()
        assert objective(W, V, X) < objective(W, W * keep, X)


def test_output_error_is_the_relative_error_of_the_output():
    W, X, keep = layer(12, 16, 80)
    expected = objective(W, W * keep, X) / objective(W, torch.zeros_like(W), X)
    assert output_error(W, W * keep, gram_of(X)) == pytest.approx(expected, rel=1e-4)
    assert output_error(W, W, gram_of(X)) == 0.0


def test_scales_that_have_migrated_change_nothing():
    """Damping is that of the inputs before. With powers of two, nothing is rounded otherwise."""
    W, X, keep = layer(40, 64, 300)
    scales = torch.exp2(torch.randint(-3, 4, (64,), generator=torch.Generator().manual_seed(1)).float())
    want, _ = admm_solver(gram_of(X)).solve(W, keep)
    gram = gram_of(X / scales)
    found, _ = admm_solver(gram, scales=scales).solve(W * scales, keep)
    torch.testing.assert_close(found / scales, want, rtol=1e-5, atol=1e-5)
    without, _ = admm_solver(gram).solve(W * scales, keep)
    assert (without / scales - want).norm() > 1e-2 * want.norm()
