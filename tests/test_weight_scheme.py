"""How stored tensors become the parts of a weight format."""

import pytest
import torch

from ria_vllm.format import sparse24
from ria_vllm.format.formats import INTEGERS
from ria_vllm.format.weight_scheme import WeightScheme, row_scales


def test_dummies_get_a_valid_bitmask():
    loaded = {"compressed": torch.randn(8, 32), "bitmask": torch.zeros(8, 8, dtype=torch.uint8)}
    with pytest.raises(ValueError, match="row 0"):
        WeightScheme().weights(loaded, (8,), torch.float32)
    weights = WeightScheme().weights(loaded, (8,), torch.float32, dummy=True)
    assert sparse24.check_bitmask(weights.parts["bitmask"]) is None


def test_scales_of_rows():
    assert row_scales(torch.tensor([2.0, 3.0]), (1, 2)).tolist() == [[2.0], [3.0], [3.0]]
    assert row_scales(torch.tensor([[2.0], [5.0]]), (1, 1)).tolist() == [[2.0], [5.0]]


def test_scales_of_groups_keep_their_dtype_whatever_their_values():
    scheme = WeightScheme(INTEGERS[4, 32])
    for numbers in (torch.tensor([[1 / 3, 2e-6]] * 8), torch.ones(8, 2)):
        loaded = {"compressed": torch.zeros(8, 16, dtype=torch.uint8), "bitmask": torch.full((8, 8), 0b00110011).byte()}
        for stored in (torch.bfloat16, torch.float16, torch.float32):
            loaded["weight_scale"] = numbers.to(stored).float()
            weights = scheme.weights(loaded, (8,), torch.bfloat16, stored_scales={stored})
            dummies = scheme.weights(loaded | {"weight_scale": torch.zeros(8, 2)}, (8,), torch.float16, True, {stored})
            assert weights.parts["weight_scale"].dtype == dummies.parts["weight_scale"].dtype == stored
            assert torch.equal(weights.parts["weight_scale"].float(), loaded["weight_scale"])
        mixed = scheme.weights(loaded, (8,), torch.bfloat16, stored_scales={torch.float16, torch.bfloat16})
        assert mixed.parts["weight_scale"].dtype == torch.float32


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
