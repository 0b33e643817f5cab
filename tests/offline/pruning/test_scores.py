"""Scores against the papers' formulas, one weight at a time, in float64."""

import math

import pytest
import torch

from ria_vllm.offline.pruning.scores import score

METHODS = ("ria", "wanda", "magnitude")


def reference(method, W, norm):
    W, norm = W.double(), norm.double()
    S = torch.zeros_like(W)
    for i in range(W.shape[0]):
        for j in range(W.shape[1]):
            w = abs(W[i, j].item())
            column = sum(abs(v) for v in W[:, j].tolist())
            row = sum(abs(v) for v in W[i].tolist())
            relative = w / column + w / row
            size = norm[j].item()
            S[i, j] = {"ria": relative * math.sqrt(size), "wanda": w * size, "magnitude": w}[method]
    return S


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matches_the_formula(method, dtype):
    torch.manual_seed(0)
    W = torch.randn(7, 12).to(dtype)
    norm = torch.rand(12) * 30 + 0.1
    S = score(method, W, norm)
    assert S.dtype == torch.float32
    torch.testing.assert_close(S.double(), reference(method, W, norm), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_zero_rows_and_columns_score_zero(method):
    torch.manual_seed(1)
    W = torch.randn(6, 8)
    W[2] = 0
    W[:, 5] = 0
    norm = torch.rand(8)
    norm[1] = 0
    S = score(method, W, norm)
    assert torch.isfinite(S).all()
    assert (S[2] == 0).all() and (S[:, 5] == 0).all()
    assert method == "magnitude" or (S[:, 1] == 0).all()
    live = (W != 0) & (norm != 0)
    assert (S[live] > 0).all()
