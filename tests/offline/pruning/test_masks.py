from itertools import combinations

import pytest
import torch

from ria_vllm.format.pattern import PATTERNS
from ria_vllm.offline.pruning.masks import mask

each_pattern = pytest.mark.parametrize("pattern", PATTERNS.values(), ids=str)


def brute_force(S, n, m):
    """In each group, the choice of n columns with the largest sum; of several, the first in column order."""
    keep = torch.zeros(S.shape, dtype=torch.bool)
    for i in range(S.shape[0]):
        for start in range(0, S.shape[1], m):
            group = S[i, start : start + m].tolist()
            best = max(combinations(range(m), n), key=lambda c: (sum(group[j] for j in c), [-j for j in c]))
            for j in best:
                keep[i, start + j] = True
    return keep


@each_pattern
def test_against_every_choice(pattern):
    torch.manual_seed(24)
    S = torch.rand(3, 16).double()
    assert torch.equal(mask(S, pattern), brute_force(S, pattern.kept, pattern.of))


@each_pattern
def test_ties_go_to_the_lower_column(pattern):
    torch.manual_seed(3)
    S = torch.randint(0, 3, (6, 16)).float()  # few distinct values: ties everywhere
    keep = mask(S, pattern)
    assert torch.equal(keep, brute_force(S, pattern.kept, pattern.of))
    assert (keep.view(6, -1, pattern.of).sum(-1) == pattern.kept).all()


def test_two_of_an_all_zero_group_are_kept():
    keep = mask(torch.zeros(2, 8))
    assert keep.tolist() == [[True, True, False, False] * 2] * 2
