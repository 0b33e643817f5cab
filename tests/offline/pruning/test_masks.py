from itertools import combinations

import pytest
import torch

from ria_vllm.errors import RiaError
from ria_vllm.offline.pruning.masks import mask


def brute_force(S, n=2, m=4):
    """In each group, the choice of two columns with the largest sum; of several, the first in column order."""
    keep = torch.zeros(S.shape, dtype=torch.bool)
    for i in range(S.shape[0]):
        for start in range(0, S.shape[1], m):
            best = max(
                combinations(range(m), n), key=lambda c: (sum(S[i, start + j].item() for j in c), [-j for j in c])
            )
            for j in best:
                keep[i, start + j] = True
    return keep


def test_against_every_choice():
    torch.manual_seed(24)
    S = torch.rand(9, 16).double()
    assert torch.equal(mask(S), brute_force(S))


def test_ties_go_to_the_lower_column():
    torch.manual_seed(3)
    S = torch.randint(0, 3, (40, 16)).float()  # few distinct values: ties everywhere
    keep = mask(S)
    assert torch.equal(keep, brute_force(S))
    assert (keep.view(40, -1, 4).sum(-1) == 2).all()


def test_two_of_an_all_zero_group_are_kept():
    keep = mask(torch.zeros(2, 8))
    assert keep.tolist() == [[True, True, False, False] * 2] * 2


def test_columns_must_divide_into_groups():
    with pytest.raises(RiaError, match="18 input channels.*groups of 4"):
        mask(torch.rand(2, 18))
