import pytest
import torch

from ria_vllm.offline.prune import Pattern, mask
from ria_vllm.offline.reconstruct import admm, admm_solver, output_error


def layer(out, channels, tokens, seed=0):
    """A weight, correlated input with channels of very different size, and a 2:4 mask."""
    draw = torch.Generator().manual_seed(seed)
    mixing = torch.randn(channels, channels, generator=draw) / channels**0.5 + torch.eye(channels)
    X = torch.randn(tokens, channels, generator=draw) @ mixing * torch.randn(channels, generator=draw).exp()
    W = torch.randn(out, channels, generator=draw)
    return W, X, mask(W.abs() * X.norm(dim=0), Pattern(n=2, m=4))


def objective(W, V, X):
    return (X.double() @ (W.double() - V.double()).T).norm().item()


def least_squares(W, X, keep):
    """Row by row in float64, over the kept columns alone."""
    X, W = X.double(), W.double()
    best = torch.zeros_like(W)
    for i in range(W.shape[0]):
        columns = keep[i].nonzero().flatten()
        best[i, columns] = torch.linalg.lstsq(X[:, columns], X @ W[i]).solution
    return best


def test_admm_against_least_squares():
    W, X, keep = layer(24, 32, 400)
    best = objective(W, least_squares(W, X, keep), X)
    found = objective(W, admm(W, X.T @ X, keep, damping=1e-6), X)
    assert best < 0.8 * objective(W, W * keep, X)
    assert best <= found < 1.01 * best


def test_admm_is_float32_and_zero_outside_the_mask():
    W, X, keep = layer(8, 16, 50)
    V = admm(W.bfloat16(), X.T @ X, keep)
    assert V.dtype == torch.float32
    assert (V[~keep] == 0).all() and (V[keep] != 0).all()


@pytest.mark.parametrize("iterations", [0, 1, 20])
@pytest.mark.parametrize("damping", [1e-4, 0.01, 1.0])
def test_no_row_serves_worse_than_masked(iterations, damping):
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


def test_no_input_at_all_leaves_the_masked_weight():
    W, _, keep = layer(6, 16, 20)
    torch.testing.assert_close(admm(W, torch.zeros(16, 16), keep), W * keep)
    assert output_error(W, W * keep, torch.zeros(16, 16)) == 0.0


def test_one_solver_serves_linears_of_one_input():
    W, X, keep = layer(12, 16, 80)
    solver = admm_solver(X.T @ X)
    for rows in (slice(0, 5), slice(5, 12)):
        torch.testing.assert_close(solver.solve(W[rows], keep[rows]), admm(W[rows], X.T @ X, keep[rows]))


def test_output_error_is_the_relative_error_of_the_output():
    W, X, keep = layer(12, 16, 80)
    expected = objective(W, W * keep, X) / objective(W, torch.zeros_like(W), X)
    assert output_error(W, W * keep, X.T @ X) == pytest.approx(expected, rel=1e-4)
    assert output_error(W, W, X.T @ X) == 0.0
