"""Kept entries against masks and permutations written out."""

import pytest
import torch

from ria_vllm.format import permutation, sparse24
from ria_vllm.format.pattern import PATTERNS
from ria_vllm.offline.distill.student import layouts
from ria_vllm.offline.distill.student.layouts import Kept

ROWS, COLUMNS = 24, 64


def sparse(
    permuted: bool, pattern: str = "2:4"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(a pruned weight in the model's own order, its compressed values, its bitmask, the stored order)."""
    dense = torch.randn(ROWS, COLUMNS)
    compressed, bitmask = sparse24.compress(dense, None, PATTERNS[pattern])
    stored = dense * sparse24.mask_from_bitmask(bitmask)
    p = torch.randperm(COLUMNS).int() if permuted else None
    return stored if p is None else stored[:, permutation.invert(p).long()], compressed, bitmask, p


@pytest.mark.parametrize(
    ("permuted", "block", "pattern"), [(False, 1 << 20, "2:4"), (True, 5 * COLUMNS, "2:4"), (True, 5 * COLUMNS, "8:16")]
)
def test_what_is_taken_is_what_is_stored(permuted, block, pattern, monkeypatch):
    monkeypatch.setattr(layouts, "BLOCK", block)
    weight, compressed, bitmask, p = sparse(permuted, pattern)
    layout = Kept(bitmask, p)
    assert layout.shape == compressed.shape
    found = torch.cat([layout.take(weight, rows) for rows in layout.rows()])
    assert torch.equal(found, compressed)


@pytest.mark.parametrize(("permuted", "block"), [(False, 5 * COLUMNS), (True, 1 << 20)])
def test_what_is_put_comes_to_the_kept_places_and_to_no_other(permuted, block, monkeypatch):
    monkeypatch.setattr(layouts, "BLOCK", block)
    weight, compressed, bitmask, p = sparse(permuted)
    layout, dense = Kept(bitmask, p), torch.zeros(ROWS, COLUMNS)
    for rows in layout.rows():
        layout.put(2 * compressed[rows], dense, rows)
    assert torch.equal(dense, 2 * weight)
