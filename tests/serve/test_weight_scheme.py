"""How stored tensors become the parts of a weight format."""

import pytest
import torch

from ria_vllm import sparse24
from ria_vllm.formats import INTEGERS
from ria_vllm.serve.weight_scheme import WeightScheme, narrowed, row_scales


def test_dummies_get_a_valid_bitmask():
    loaded = {"compressed": torch.randn(8, 32), "bitmask": torch.zeros(8, 8, dtype=torch.uint8)}
    with pytest.raises(ValueError, match="row 0"):
        WeightScheme().weights(loaded, (8,), torch.float32)
    weights = WeightScheme().weights(loaded, (8,), torch.float32, dummy=True)
    assert sparse24.check_bitmask(weights.parts["bitmask"]) is None


def test_scales_of_rows():
    assert row_scales(torch.tensor([2.0, 3.0]), (1, 2)).tolist() == [[2.0], [3.0], [3.0]]
    assert row_scales(torch.tensor([[2.0], [5.0]]), (1, 1)).tolist() == [[2.0], [5.0]]


def test_scales_are_narrowed_without_loss():
    scales = {dtype: torch.tensor([[1 / 3, 2e-6]]).to(dtype).float() for dtype in (torch.bfloat16, torch.float16)}
    for stored, numbers in scales.items():
        for served in (torch.bfloat16, torch.float16, torch.float32):
            assert narrowed(numbers, served).dtype == stored
    odd = torch.tensor([[1 / 3]])
    assert narrowed(odd, torch.bfloat16) is odd
    assert narrowed(odd, torch.float16, dummy=True).dtype == torch.float16


@pytest.mark.parametrize(("bits", "size"), [(4, 64), (8, None)])
def test_dummies_of_plain_integers_are_2_of_4(bits, size):
    scheme = WeightScheme(INTEGERS[bits, size], dense=True)
    loaded = {
        part: torch.randint(0, 100, spec.shape(8, 64)).to(spec.dtype)
        for part, spec in scheme.tensors(torch.bfloat16).items()
    }
    assert scheme.weights(dict(loaded), (8,), torch.bfloat16) is None
    weights = scheme.weights(dict(loaded), (8,), torch.bfloat16, dummy=True)
    assert sparse24.check_bitmask(weights.parts["bitmask"]) is None
