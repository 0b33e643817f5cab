"""SmoothQuant's scales against its formula, and norms that absorb them."""

from math import log2

import pytest
import torch

from ria_vllm.offline.sublayer.smoothing import divided, migration_scales


@pytest.mark.parametrize("strength", [0.2, 0.5, 1.0])
def test_scales_are_the_formulas_nearest_powers_of_two(strength):
    torch.manual_seed(0)
    inputs, weights = torch.rand(200) * 100, torch.rand(200) * 0.1
    found = migration_scales(inputs, weights, strength).tolist()
    formula = [
        strength * log2(x) - (1 - strength) * log2(w) for x, w in zip(inputs.tolist(), weights.tolist(), strict=True)
    ]
    mean = sum(formula) / len(formula)
    assert all(abs(log2(s) - (f - mean)) <= 0.5 + 1e-9 and log2(s).is_integer() for s, f in zip(found, formula))
    assert len(set(found)) > 3


def test_channels_that_are_always_zero_keep_their_scale():
    scales = migration_scales(torch.tensor([0.0, 8, 8, 2]), torch.tensor([1.0, 0, 1, 1]), 1.0)
    assert scales.tolist() == [1, 1, 2, 0.5]
    assert migration_scales(torch.zeros(3), torch.zeros(3), 0.5).tolist() == [1, 1, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_norm_and_its_scales_multiply_to_what_it_was(dtype):
    torch.manual_seed(0)
    gain, scales = torch.randn(500).to(dtype), torch.exp2(torch.randint(-4, 5, (500,)).double())
    new, exact = divided(gain, scales, 1)
    assert new.dtype == dtype
    torch.testing.assert_close((new.double() + 1) * exact, gain.double() + 1, rtol=1e-15, atol=0)
    assert (exact.log2() - scales.log2()).abs().median() < 0.05


def test_what_cannot_be_divided_stays():
    """Gemma's norm with a gain of -1 gives zeros."""
    new, exact = divided(torch.tensor([-1.0, 0.5]), torch.tensor([2.0, 2.0]).double(), 1)
    assert new.tolist() == [-1, -0.25] and exact.tolist() == [1, 2]
