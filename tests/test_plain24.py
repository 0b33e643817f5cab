"""Plain 2:4 weights are compressed as `sparse24.compress` does, which sorts magnitudes, and others are recognized."""

import pytest
import torch
from compressed_tensors_writer import random_24

from ria_vllm.format import sparse24

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8]


def matrix(dtype, rows=9, columns=264):
    weight = random_24(rows, columns, dtype=torch.float32) * 40
    weight[0] = 0
    weight[1, :4] = torch.tensor([-0.0, 3, 0, -128])
    return weight.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [1, 1000, 1 << 22])
def test_the_same_as_by_magnitude(dtype, block, monkeypatch):
    monkeypatch.setattr(sparse24, "_GATHERED", block)
    dense = matrix(dtype)
    compressed, bitmask = sparse24.compress_pruned(dense)
    expected, expected_bitmask = sparse24.compress(dense.float())
    assert compressed.dtype == dtype and torch.equal(compressed.float(), expected)
    assert torch.equal(bitmask, expected_bitmask)


def test_every_pattern_of_a_group():
    patterns = torch.tensor([[pattern >> i & 1 for i in range(4)] for pattern in range(16)])
    for pattern in patterns:
        for dense in (torch.cat([pattern, patterns[3]])[None], torch.cat([patterns[3], pattern])[None]):
            found = sparse24.compress_pruned(dense.int())
            assert (found is None) == (pattern.sum() > 2)
            if found is not None:
                assert torch.equal(sparse24.decompress(*found), dense.int())


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_weight_too_many(dtype):
    dense = matrix(dtype)
    dense[-1, -4:] = torch.tensor([1, 0, 1, 1]).to(dtype)
    assert sparse24.compress_pruned(dense) is None


def test_a_transposed_matrix():
    dense = matrix(torch.float32, rows=8, columns=16)
    for part, expected in zip(sparse24.compress_pruned(dense.t().contiguous().t()), sparse24.compress_pruned(dense)):
        assert torch.equal(part, expected)
