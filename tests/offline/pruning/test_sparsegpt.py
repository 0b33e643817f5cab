import pytest
import torch

from ria_vllm.format.pattern import PATTERNS
from ria_vllm.offline.pruning.admm import output_error
from ria_vllm.offline.pruning.masks import mask
from ria_vllm.offline.pruning.sparsegpt import sparsegpt


def layer(out, channels, tokens, seed=0):
    """A weight and correlated input with channels of very different size."""
    draw = torch.Generator().manual_seed(seed)
    mixing = torch.randn(channels, channels, generator=draw) / channels**0.5 + torch.eye(channels)
    X = torch.randn(tokens, channels, generator=draw) @ mixing * torch.randn(channels, generator=draw).exp()
    return torch.randn(out, channels, generator=draw), X


def reference(W, gram, damping, kept=2, group=4):
    """The optimal brain surgeon's own recursion in float64: no Cholesky factor, no blocks.

    Columns go left to right. Removing w_j moves the columns to its right by -w_j / G_jj * G_j, G the inverse of H
    restricted to the columns that are left.
    """
    W, H = W.double().clone(), gram.double().clone()
    C = W.shape[1]
    H += damping * H.diagonal().mean() * torch.eye(C)
    keep = torch.ones_like(W, dtype=torch.bool)
    inverses = [torch.linalg.inv(H[j:, j:]) for j in range(C)]
    for j in range(C):
        if j % group == 0:
            costs = torch.stack([W[:, k] ** 2 / inverses[k][0, 0] for k in range(j, j + group)], dim=1)
            keep[:, j : j + group].scatter_(1, costs.topk(group - kept, largest=False).indices, False)
        move = torch.where(keep[:, j], 0.0, W[:, j] / inverses[j][0, 0])
        W[:, j:] -= move[:, None] * inverses[j][0]
    return W * keep, keep


@pytest.mark.parametrize("block, pattern", [(8, "2:4"), (128, "2:4"), (8, "8:16")])
def test_against_the_recursion(block, pattern):
    W, X = layer(10, 32, 200)
    found, keep = sparsegpt(W, X.T @ X, block=block, pattern=PATTERNS[pattern])
    expected, expected_keep = reference(W, X.T @ X, 0.01, PATTERNS[pattern].kept, PATTERNS[pattern].of)
    assert torch.equal(keep, expected_keep)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)


def test_better_than_masking_alone():
    W, X = layer(32, 64, 500)
    gram = X.T @ X
    V, keep = sparsegpt(W, gram)
    assert V.dtype == torch.float32 and (V[~keep] == 0).all()
    assert (keep.view(32, -1, 4).sum(-1) == 2).all()
    error = output_error(W, V, gram)
    assert error < 0.8 * output_error(W, W * mask(W.abs()), gram)
    assert error < output_error(W, W * keep, gram)


def test_dead_channels_and_dead_inputs():
    W, X = layer(8, 16, 60)
    X[:, 4] = 0
    for gram in (X.T @ X, torch.zeros(16, 16)):
        V, keep = sparsegpt(W, gram)
        assert torch.isfinite(V).all() and (keep.view(8, 4, 4).sum(-1) == 2).all()
    V, keep = sparsegpt(W, X.T @ X)
    assert not keep[:, 4].any()
