"""Running sums against whole matrices in float64."""

import pytest
import torch

from ria_vllm.errors import RiaError
from ria_vllm.offline.calibration import statistics
from ria_vllm.offline.calibration.statistics import GramSum, StatisticsSum

CPU = torch.device("cpu")


@pytest.mark.parametrize("gram_block", [7, 64, 1000])
def test_blocks_of_a_gram_matrix_make_the_whole(gram_block, monkeypatch):
    monkeypatch.setattr(statistics, "BLOCK", gram_block)
    X = torch.randn(50, 130)
    total = GramSum(130, torch.device("cpu"))
    total.add(X)
    total.add(X)
    expected = 2 * X.double().T @ X.double()
    torch.testing.assert_close(total.diagonal(), expected.diagonal(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(total.finish().dense().double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("with_gram", [False, True])
@pytest.mark.parametrize("kind", ["input", "output"])
def test_sums_over_chunks_are_those_of_all_tokens(with_gram, kind):
    draw = torch.Generator().manual_seed(0)
    X, other, W = (torch.randn(size, generator=draw) for size in ((90, 24), (90, 24), (10, 24)))
    total = StatisticsSum(24, with_gram, CPU, torch.float32)
    for rows in (slice(0, 40), slice(40, 90)):
        total.add(X[rows])
        if kind == "input":
            total.add_input_drift(X[rows], other[rows])
        else:
            total.add_output_drift(X[rows], (other[rows] - X[rows]) @ W.T)
    found = total.finish("x")
    X, D, W64 = X.double(), other.double() - X.double(), W.double()
    close = dict(rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(found.norm.double(), X.norm(dim=0), **close)
    assert found.norm.dtype == torch.float32 and (found.gram is not None) == with_gram
    if with_gram:
        torch.testing.assert_close(found.gram.dense().double(), X.T @ X, **close)
    torch.testing.assert_close(found.drift.cross_term(W).double(), (D @ W64.T).T @ X, **close)
    assert found.drift.squared_residual(W) == pytest.approx((D @ W64.T).square().sum().item(), rel=1e-5)


@pytest.mark.parametrize("gram_block", [100, 1000])
def test_products_of_bfloat16_are_exact_and_those_of_drifts_nearly(gram_block, monkeypatch):
    """However the processor multiplies, it sums in float32; and other products are as before."""
    monkeypatch.setattr(statistics, "BLOCK", gram_block)
    before = torch.backends.mkldnn.matmul.fp32_precision
    X, missing = torch.randn(512, 256).bfloat16().float(), torch.randn(512, 192)
    total = StatisticsSum(256, True, CPU, torch.bfloat16)
    total.add(X)
    total.add_output_drift(X, missing)
    found, W = total.finish("x"), torch.randn(192, 256)
    exact, wanted = X.double().T @ X.double(), missing.double().T @ X.double()
    assert (found.gram.dense().double() - exact).norm() < 1e-6 * exact.norm()
    assert (found.drift.cross_term(W).double() - wanted).norm() < 3e-3 * wanted.norm()
    assert torch.backends.mkldnn.matmul.fp32_precision == before


@pytest.mark.parametrize("kind", ["input", "output"])
def test_divided_statistics_are_those_of_divided_inputs(kind):
    draw = torch.Generator().manual_seed(0)
    X, other, W = (torch.randn(size, generator=draw) for size in ((90, 300), (90, 300), (10, 300)))
    scales = torch.exp2(torch.randint(-3, 4, (300,), generator=draw).float())
    found = []
    for divisor in (torch.ones(300), scales):
        total = StatisticsSum(300, True, CPU, torch.float32)
        total.add(X / divisor)
        if kind == "input":
            total.add_input_drift(X / divisor, other / divisor)
        else:
            total.add_output_drift(X / divisor, (other - X) @ W.T)
        found.append(total.finish("x"))
    before, want = found
    before.divide(scales)
    assert torch.equal(before.norm, want.norm) and torch.equal(before.scales, scales) and want.scales is None
    assert torch.equal(before.gram.dense(), want.gram.dense())
    assert torch.equal(before.drift.cross_term(W), want.drift.cross_term(W))
    assert before.drift.squared_residual(W) == want.drift.squared_residual(W)


@pytest.mark.parametrize(
    ("dtype", "advice"), [(torch.bfloat16, "Give --compute-dtype float32"), (torch.float32, "Check that")]
)
@pytest.mark.parametrize(("with_gram", "value"), [(False, float("nan")), (True, float("inf"))])
def test_activations_that_are_not_finite_are_named(value, with_gram, dtype, advice):
    X = torch.ones(6, 8)
    X[3, 5] = value
    total = StatisticsSum(8, with_gram, CPU, dtype)
    total.add(X)
    with pytest.raises(RiaError, match=f"model: a.b: NaN or infinite values in its input.*{advice}"):
        total.finish("model: a.b")


@pytest.mark.parametrize(("kind", "value"), [("input", float("nan")), ("output", float("inf"))])
def test_a_dense_model_that_alone_is_not_finite_is_named(value, kind):
    """No reconstruction has a smaller error than NaN, so weights would silently stay as they are."""
    X, dense = torch.ones(6, 8), torch.ones(6, 8)
    dense[3, 5] = value
    total = StatisticsSum(8, True, CPU, torch.float16)
    total.add(X)
    (total.add_input_drift if kind == "input" else total.add_output_drift)(X, dense)
    with pytest.raises(RiaError, match="model: a.b: NaN or infinite values in the dense model's.*dtype float32"):
        total.finish("model: a.b")
