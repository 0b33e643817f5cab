"""Permutations against their definition: the stored column j holds channel p[j]."""

import hashlib
import itertools

import pytest
import torch

from ria_vllm.format import permutation


def randperm(size: int, seed: int = 0) -> torch.Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))


def test_permuted_product_equals_the_plain_one():
    x, weight, p = torch.randn(5, 64).double(), torch.randn(9, 64).double(), randperm(64)
    stored = weight[:, p]
    torch.testing.assert_close(x[:, p] @ stored.T, x @ weight.T)
    assert torch.equal(stored[:, permutation.invert(p)], weight)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_invert_keeps_the_dtype(dtype):
    p = randperm(33).to(dtype)
    q = permutation.invert(p)
    assert q.dtype == dtype
    assert q[p.long()].tolist() == p[q.long()].tolist() == list(range(33))


def test_is_identity():
    assert permutation.is_identity(torch.arange(8, dtype=torch.int32))
    assert not permutation.is_identity(torch.tensor([0, 2, 1]))


def test_check_accepts_exactly_the_permutations():
    accepted = [t for t in itertools.product(range(-1, 4), repeat=3) if permutation.check(torch.tensor(t), 3) is None]
    assert accepted == list(itertools.permutations(range(3)))


@pytest.mark.parametrize(
    "p, words",
    [
        (torch.tensor([0, 1, 1, 3]), "channel 1 appears more than once"),
        (torch.tensor([0, 1, 2, 4]), "outside 0..3"),
        (torch.tensor([0, 1, 2, -1]), "outside 0..3"),
        (torch.tensor([0, 1, 2]), "shape"),
        (torch.tensor([[0, 1, 2, 3]]), "shape"),
        (torch.tensor([0.0, 1.0, 2.0, 3.0]), "dtype"),
    ],
)
def test_check_says_what_is_wrong(p, words):
    assert words in (permutation.check(p, 4) or "")


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (6, 2), (4, 1), (1, 1)])
def test_head_rows_give_the_consumer_its_input_in_its_order(heads, kv_heads):
    """Attention in full: permuting v's rows permutes the output projection's input, for any mixing of tokens."""
    head_dim, hidden, tokens, group = 8, 16, 5, heads // kv_heads
    inner = [randperm(head_dim, seed) for seed in range(kv_heads)]
    p = torch.cat([h * head_dim + inner[h // group] for h in range(heads)])
    x = torch.randn(tokens, hidden).double()
    v_weight = torch.randn(kv_heads * head_dim, hidden).double()
    mixing = torch.randn(heads, tokens, tokens).double()

    def attend(weight: torch.Tensor) -> torch.Tensor:
        v = (x @ weight.T).view(tokens, kv_heads, head_dim)
        return torch.stack([mixing[h] @ v[:, h // group] for h in range(heads)], 1).reshape(tokens, heads * head_dim)

    rows = permutation.head_rows(p, heads, kv_heads)
    torch.testing.assert_close(attend(v_weight[rows]), attend(v_weight)[:, p])


@pytest.mark.parametrize(
    "p, heads, kv_heads, words",
    [
        (torch.tensor([4, 1, 2, 3, 0, 5, 6, 7]), 2, 2, "another head"),
        (torch.tensor([1, 0, 2, 3, 4, 5, 6, 7]), 2, 1, "different permutations"),
        (torch.arange(8), 3, 1, "do not fit"),
        (torch.arange(8), 4, 3, "do not fit"),
        (torch.arange(8), 0, 1, "do not fit"),
        (torch.arange(8), 4, 0, "do not fit"),
    ],
)
def test_head_rows_say_why_not(p, heads, kv_heads, words):
    with pytest.raises(ValueError, match=words):
        permutation.head_rows(p, heads, kv_heads)


def test_digest_is_that_of_its_definition():
    """Names in sorted order, each with a zero byte and p as little-endian int32; of tensors as of arrays."""
    permutations = {"b": torch.tensor([1, 0, 2], dtype=torch.int32), "a.é": torch.tensor([0, 1])}
    content = (
        "a.é".encode() + bytes([0, 0, 0, 0, 0, 1, 0, 0, 0]) + b"b" + bytes([0, 1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0])
    )
    assert permutation.digest(permutations) == hashlib.sha256(content).hexdigest()
    assert permutation.digest({name: p.numpy() for name, p in permutations.items()}) == permutation.digest(permutations)
    assert permutation.digest({}) == hashlib.sha256().hexdigest()


def test_places_of_rows():
    assert permutation.places(12, 3, 5).tolist() == [3, 4]
    assert permutation.places(12, 1, 3, 3).tolist() == [1, 2, 5, 6, 9, 10]
    for start, end, blocks in ((0, 1, 5), (0, 5, 3), (-1, 2, 3), (2, 2, 3), (3, 2, 3)):
        with pytest.raises(ValueError, match="rows"):
            permutation.places(12, start, end, blocks)
