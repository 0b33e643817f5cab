"""`python -m benchmarks.cpu_kernels`: its dense baselines are correct, and it compares with the fastest of them."""

import os
import subprocess
import sys
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


def test_a_baseline_that_was_left_out_is_in_no_table():
    row = RESULT["rows"][0] | {"dense_seconds": {"bfloat16": 8.0, "float32": 4.0, "W8A8": 6.0}}
    row |= {"sparse_seconds": dict.fromkeys(cpu_kernels.SPARSE, 1.0)}
    assert "int4 1000.000 (4.00x best)" in cpu_kernels.describe(row, 1e9)
    assert "int8 1000.000 (4.00x best, 6.00x W8A8)" in cpu_kernels.describe(row, 1e9)
    tables = cpu_kernels.tables({"rows": [row]})
    assert "int4 against the fastest dense baseline" in tables and "dense W4A16" not in tables
    assert "int8 against dense W8A8" in tables


@pytest.mark.parametrize("limit", cpu_dense.LIMITS)
def test_no_limit_applies_to_w4a16(limit, monkeypatch):
    monkeypatch.setattr(cpu_dense, "limit", lambda: limit)  # oneDNN would keep the variables for all tests after this
    monkeypatch.setattr(cpu_kernels, "ROTATED_BYTES", 1)
    dense = [kind for side, kind in cpu_kernels.variants_of(torch.randn(64, 128)) if side == "dense"]
    assert dense == ["bfloat16", "float32", "W8A8"]


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


@pytest.mark.slow
def test_limit_reaches_every_library():
    code = """
import torch
from benchmarks import cpu_dense
from ria_vllm.serve.kernels.cpu import backend as cpu
cpu_dense.unquantized(torch.ones(64, 64))(torch.ones(2, 64))
print(cpu.instruction_set(), cpu_dense.limit(), torch.backends.cpu.get_cpu_capability())
"""
    environment = {**os.environ, **cpu_dense.LIMITS["avx2"], "ONEDNN_VERBOSE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    if "this machine lacks these instructions" in done.stderr:
        pytest.skip("this machine has no AVX2")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "avx2 avx2 AVX2"
    assert "isa:Intel AVX2\n" in done.stdout and "brg_matmul:avx2," in done.stdout
