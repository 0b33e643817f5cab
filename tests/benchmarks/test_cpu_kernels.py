"""`python -m benchmarks.cpu_kernels`: its dense baselines are correct, and it compares with the fastest of them."""

from pathlib import Path

import int8_products
import pytest
import torch

from benchmarks import cpu_dense

ROOT = Path(__file__).parents[2]


def product(weight, x):
    """In float64, and that of the magnitudes."""
    return x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T


@pytest.mark.parametrize("limit", [None, "avx2"])
def test_every_dense_baseline_but_w4a16_is_correct(limit, monkeypatch):
    monkeypatch.setattr(cpu_dense, "limit", lambda: limit)
    torch.manual_seed(0)
    weight, x = torch.randn(64, 128), torch.randn(5, 128)
    one_of_two = torch.nn.functional.one_hot(torch.randint(2, (64,)), 2).flatten()
    for dtype in (torch.bfloat16, torch.float32):
        exact, size = product(weight, x)
        y = cpu_dense.unquantized(weight.to(dtype))(x.to(dtype))
        assert y.dtype == dtype and ((y.double() - exact).abs() <= 4 * torch.finfo(dtype).eps * size).all()
        if dtype == torch.float32 and not limit and torch.cpu._is_amx_tile_supported():
            with pytest.raises(RuntimeError, match="expect A to be bfloat16 or half"):
                cpu_dense.w8a8(weight, dtype)(x.to(dtype))
            continue
        columns = one_of_two if int8_products.saturate(dtype) else 1
        exact, size = product(weight * columns, x * columns)
        y = cpu_dense.w8a8(weight * columns, dtype)((x * columns).to(dtype))
        # Two roundings, each by up to half of 1/127 of the largest value, which is below four times the mean.
        assert y.dtype == dtype and ((y.double() - exact).abs() <= 4 / 127 * size).all()


def test_w4a16_is_correct():
    if reason := cpu_dense.w4a16_missing():
        pytest.skip(reason)
    torch.manual_seed(0)
    weight, x = torch.randn(64, 128), torch.randn(5, 128)
    exact, size = product(weight, x)
    y = cpu_dense.w4a16(weight, 64)(x.bfloat16())
    # Weights are rounded by up to half of 1/7 of the largest in a group, which is below four times the mean.
    assert y.dtype == torch.bfloat16 and ((y.double() - exact).abs() <= 2 / 7 * size).all()
    assert ((y.double() - exact).norm() <= 0.15 * exact.norm()).all()
