"""How stored tensors become the parts of a weight format."""

import pytest
import torch

from ria_vllm import sparse24
from ria_vllm.serve.weight_scheme import WeightScheme, is_two_of_four, row_scales


def test_dummies_get_a_valid_bitmask():
    loaded = {"compressed": torch.randn(8, 32), "bitmask": torch.zeros(8, 8, dtype=torch.uint8)}
    with pytest.raises(ValueError, match="row 0"):
        WeightScheme().weights(loaded, (8,), torch.float32)
    weights = WeightScheme().weights(loaded, (8,), torch.float32, dummy=True)
    assert sparse24.check_bitmask(weights.parts["bitmask"]) is None


def test_scales_of_rows():
    assert row_scales(torch.tensor([2.0, 3.0]), (1, 2)).tolist() == [[2.0], [3.0], [3.0]]
    assert row_scales(torch.tensor([[2.0], [5.0]]), (1, 1)).tolist() == [[2.0], [5.0]]


def test_two_of_four():
    assert is_two_of_four(torch.tensor([[1.0, 0, 2, 0, 0, 0, 0, 3]]))
    assert not is_two_of_four(torch.tensor([[1.0, 4, 2, 0, 0, 0, 0, 3]]))
