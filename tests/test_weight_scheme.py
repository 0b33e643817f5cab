"""How stored tensors become the parts of a weight format."""

import torch

from ria_vllm.format.formats import INTEGERS
from ria_vllm.format.weight_scheme import WeightScheme, row_scales


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
            assert weights.parts["weight_scale"].dtype == stored
            assert torch.equal(weights.parts["weight_scale"].float(), loaded["weight_scale"])
        mixed = scheme.weights(loaded, (8,), torch.bfloat16, stored_scales={torch.float16, torch.bfloat16})
        assert mixed.parts["weight_scale"].dtype == torch.float32
