"""The 2:4 tensor against definitions written out bit by bit."""

import pytest
import torch
from compressed_tensors_writer import random_24

from ria_vllm.format import sparse24
from ria_vllm.format.pattern import PATTERNS, TWO_OF_FOUR

each_pattern = pytest.mark.parametrize("pattern", PATTERNS.values(), ids=str)


def random_mask(rows: int, columns: int, seed: int = 0, pattern=TWO_OF_FOUR) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(rows, columns // pattern.of, pattern.of, generator=generator).argsort(-1)
    return (order < pattern.kept).view(rows, columns)


@each_pattern
@pytest.mark.parametrize("dtype", sparse24.VALUE_DTYPES)
@pytest.mark.parametrize("shape", [(1, 64), (7, 128), (33, 192)])
def test_round_trip_is_exact(dtype, shape, pattern):
    mask = random_mask(*shape, pattern=pattern)
    dense = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    compressed, bitmask = sparse24.compress(dense, mask, pattern)
    assert compressed.shape == (shape[0], shape[1] // 2) and compressed.dtype == dtype
    assert bitmask.shape == (shape[0], shape[1] // 8) and bitmask.dtype == torch.uint8
    assert sparse24.check_bitmask(bitmask, shape, pattern) is None
    assert torch.equal(sparse24.decompress(compressed, bitmask), dense * mask)
    assert torch.equal(sparse24.mask_from_bitmask(bitmask), mask)
    assert torch.equal(sparse24.bitmask_of(dense * mask, pattern), bitmask)


@each_pattern
def test_a_pattern_is_each_wider_one_and_no_narrower_one(pattern):
    """Half of each 8 columns alone, so that the last eight of 8 x 3 are decompressed, too."""
    _, bitmask = sparse24.compress(torch.randn(64, 64, generator=torch.Generator().manual_seed(1)), None, pattern)
    for other in PATTERNS.values():
        wrong = sparse24.check_bitmask(bitmask, pattern=other)
        assert (wrong is None) == (other.of >= pattern.of)
        assert wrong is None or f"a group of {other.of} without exactly {other.kept} kept values" in wrong
    if pattern.of <= 8:
        dense, mask = torch.randn(3, 24, generator=torch.Generator().manual_seed(2)), random_mask(3, 24, 3, pattern)
        assert torch.equal(sparse24.decompress(*sparse24.compress(dense, mask, pattern)), dense * mask)


def test_bits_and_values_lie_where_the_format_says():
    dense = torch.arange(1.0, 65.0).view(1, 64)
    mask = random_mask(1, 64)
    compressed, bitmask = sparse24.compress(dense, mask)
    for byte in range(8):
        for bit in range(8):
            assert bool(int(bitmask[0, byte]) >> bit & 1) == bool(mask[0, 8 * byte + bit])
    assert compressed[0].tolist() == [float(c + 1) for c in range(64) if mask[0, c]]


def test_a_group_of_zeros_still_stores_two_values():
    compressed, bitmask = sparse24.compress(torch.zeros(2, 64))
    assert compressed.shape == (2, 32) and sparse24.check_bitmask(bitmask) is None


def test_without_a_mask_the_two_largest_magnitudes_stay():
    dense = torch.randn(16, 64, generator=torch.Generator().manual_seed(5))
    found = sparse24.decompress(*sparse24.compress(dense))
    for row in range(16):
        for group in range(0, 64, 4):
            values = dense[row, group : group + 4].tolist()
            kept = sorted(values, key=abs)[2:]
            assert found[row, group : group + 4].tolist() == [v if v in kept else 0.0 for v in values]


def test_of_equals_the_left_ones_stay():
    found = sparse24.decompress(*sparse24.compress(torch.ones(1, 64)))
    assert found.view(-1, 4).tolist() == [[1.0, 1.0, 0.0, 0.0]] * 16


def test_the_largest_magnitude_of_int8_is_kept():
    values, bitmask = sparse24.compress(torch.tensor([[-128, 127, 1, 0, 0, 3, 2, -4]], dtype=torch.int8))
    assert values.tolist() == [[-128, 127, 3, -4]] and bitmask.item() == 0b10100011


def test_non_contiguous_input():
    dense = torch.randn(64, 24, generator=torch.Generator().manual_seed(7)).t()
    mask = random_mask(24, 64).t().contiguous().t()
    assert not dense.is_contiguous() and not mask.is_contiguous()
    for given in (None, mask):
        expected = sparse24.compress(dense.contiguous(), None if given is None else given.contiguous())
        assert all(map(torch.equal, sparse24.compress(dense, given), expected))


@pytest.mark.parametrize(
    "mask",
    [torch.ones(2, 64, dtype=torch.bool), torch.zeros(2, 64, dtype=torch.bool), random_mask(2, 32), random_mask(3, 64)],
)
def test_a_mask_that_is_not_2_of_4_is_refused(mask):
    with pytest.raises(ValueError, match="2:4"):
        sparse24.compress(torch.randn(2, 64), mask)


def test_columns_in_multiples_of_eight():
    with pytest.raises(ValueError, match="multiples of 8"):
        sparse24.compress(torch.randn(2, 60))


@each_pattern
def test_every_single_bit_flip_of_the_bitmask_is_caught(pattern):
    _, bitmask = sparse24.compress(torch.randn(3, 64, generator=torch.Generator().manual_seed(9)), None, pattern)
    for row in range(3):
        for byte in range(8):
            for bit in range(8):
                flipped = bitmask.clone()
                flipped[row, byte] ^= 1 << bit
                wrong, wide = sparse24.check_bitmask(flipped, pattern=pattern), max(8, pattern.of)
                assert wrong is not None and f"row {row}, columns {8 * byte // wide * wide} to" in wrong


@pytest.mark.parametrize(
    "bitmask, shape, words",
    [
        (torch.full((4, 8), 0x33, dtype=torch.uint8), (4, 128), "expected 4 x 128"),
        (torch.full((4, 8), 0x33, dtype=torch.uint8), (5, 64), "expected 5 x 64"),
        (torch.full((4, 8), 0x33, dtype=torch.int8), None, "int8"),
        (torch.full((8,), 0x33, dtype=torch.uint8), None, "a matrix"),
        (torch.full((4, 4), 0x33, dtype=torch.uint8), None, "multiple of 64"),
        (torch.zeros(4, 0, dtype=torch.uint8), None, "multiple of 64"),
        (torch.zeros(0, 8, dtype=torch.uint8), None, "no rows"),
    ],
)
def test_check_says_what_is_wrong(bitmask, shape, words):
    assert words in (sparse24.check_bitmask(bitmask, shape) or "")


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8]


def plain_24(dtype, rows=9, columns=264):
    weight = random_24(rows, columns, dtype=torch.float32) * 40
    weight[0] = 0
    weight[1, :4] = torch.tensor([-0.0, 3, 0, -128])
    return weight.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [1, 1000, 1 << 22])
def test_plain_weights_are_compressed_as_by_magnitude(dtype, block, monkeypatch):
    monkeypatch.setattr(sparse24, "_GATHERED", block)
    dense = plain_24(dtype)
    compressed, bitmask = sparse24.compress_pruned(dense)
    expected, expected_bitmask = sparse24.compress(dense.float())
    assert compressed.dtype == dtype and torch.equal(compressed.float(), expected)
    assert torch.equal(bitmask, expected_bitmask)


def test_every_pattern_of_a_plain_group():
    patterns = torch.tensor([[pattern >> i & 1 for i in range(4)] for pattern in range(16)])
    for pattern in patterns:
        for dense in (torch.cat([pattern, patterns[3]])[None], torch.cat([patterns[3], pattern])[None]):
            found = sparse24.compress_pruned(dense.int())
            assert (found is None) == (pattern.sum() > 2)
            if found is not None:
                assert torch.equal(sparse24.decompress(*found), dense.int())


@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_weights_with_one_too_many(dtype):
    dense = plain_24(dtype)
    dense[-1, -4:] = torch.tensor([1, 0, 1, 1]).to(dtype)
    assert sparse24.compress_pruned(dense) is None


def test_a_transposed_matrix():
    dense = plain_24(torch.float32, rows=8, columns=16)
    for part, expected in zip(sparse24.compress_pruned(dense.t().contiguous().t()), sparse24.compress_pruned(dense)):
        assert torch.equal(part, expected)
