"""`python -m benchmarks.cpu_kernels`: its dense baselines are correct, and it compares with the fastest of them."""

from pathlib import Path

import int8_products
import pytest
import torch

from benchmarks import cpu_dense, cpu_kernels

ROOT = Path(__file__).parents[2]
RESULT = {
    "rows": [
        {
            "name": "some",
            "out_features": 8,
            "in_features": 64,
            "threads": 1,
            "tokens": tokens,
            "dense_seconds": {"bfloat16": 8.0, "float32": 4.0, "W8A8": w8a8, "W4A16": 9.0},
            "sparse_seconds": {"bfloat16": 2.0, "float32": 1.0, "int8": 4.0, "int4": 0.5},
        }
        for tokens, w8a8 in ((1, 6.0), (64, 3.0))
    ]
}


def test_tables_name_the_fastest_dense_baseline():
    cells = cpu_kernels.table(RESULT, "bfloat16").splitlines()[-1]
    assert cells == "| some (8 x 64) | 1 | 2.00 (float32) | 1.50 (W8A8) |"
    assert cpu_kernels.table(RESULT, "int8", "W8A8").splitlines()[-1] == "| some (8 x 64) | 1 | 1.50 | 0.75 |"
    assert cpu_kernels.table(RESULT, "int4", "W4A16").splitlines()[-1] == "| some (8 x 64) | 1 | 18.00 | 18.00 |"
    line = cpu_kernels.describe(RESULT["rows"][1], 1e9)
    assert "best W8A8" in line and "float32 1000.000 (3.00x best, 4.00x float32)" in line


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


def test_every_variant_is_measured_and_a_slow_baseline_only_twice(monkeypatch):
    monkeypatch.setattr(cpu_kernels, "SHAPES", {"small": (64, 128)})
    monkeypatch.setattr(cpu_kernels, "ROTATED_BYTES", 1)
    monkeypatch.setattr(cpu_kernels, "read_bandwidth", lambda: 1e9)
    calls = []

    def slow(x):
        calls.append(x)
        torch.randn(2000, 2000).sort()
        return x

    monkeypatch.setattr(cpu_kernels.cpu_dense, "w8a8", lambda *arguments: slow)
    (row,) = cpu_kernels.measure(["small"], [3], 0.0)["rows"]
    dense = set(cpu_kernels.DENSE) - ({"W4A16"} if cpu_dense.w4a16_missing() else set())
    assert set(row["dense_seconds"]) == dense and set(row["sparse_seconds"]) == set(cpu_kernels.SPARSE)
    assert all(seconds > 0 for kind in ("dense_seconds", "sparse_seconds") for seconds in row[kind].values())
    assert len(calls) == 2 and cpu_kernels.best_dense(row) != "W8A8"
