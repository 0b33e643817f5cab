from itertools import combinations

import pytest
import torch

from ria_vllm.errors import RiaError
from ria_vllm.offline.pruning.masks import Pattern, mask


def brute_force(S, n, m):
    """In each group, the choice of n columns with the largest sum; of several, the first in column order."""
    keep = torch.zeros(S.shape, dtype=torch.bool)
    for i in range(S.shape[0]):
        for start in range(0, S.shape[1], m):
            best = max(
                combinations(range(m), n), key=lambda c: (sum(S[i, start + j].item() for j in c), [-j for j in c])
            )
            for j in best:
                keep[i, start + j] = True
    return keep


@pytest.mark.parametrize("n,m", [(2, 4), (1, 4), (4, 8), (3, 5), (1, 2)])
def test_nm_against_every_choice(n, m):
    torch.manual_seed(n * 10 + m)
    S = torch.rand(9, 4 * m).double()
    assert torch.equal(mask(S, Pattern(n=n, m=m)), brute_force(S, n, m))


@pytest.mark.parametrize("n,m", [(2, 4), (4, 8)])
def test_nm_ties_go_to_the_lower_column(n, m):
    torch.manual_seed(3)
    S = torch.randint(0, 3, (40, 4 * m)).float()  # few distinct values: ties everywhere
    keep = mask(S, Pattern(n=n, m=m))
    assert torch.equal(keep, brute_force(S, n, m))
    assert (keep.view(40, -1, m).sum(-1) == n).all()


def test_nm_keeps_exactly_n_of_an_all_zero_group():
    keep = mask(torch.zeros(2, 8), Pattern(n=2, m=4))
    assert keep.tolist() == [[True, True, False, False] * 2] * 2


def test_nm_takes_a_permuted_view():
    torch.manual_seed(4)
    S = torch.rand(8, 16)
    assert torch.equal(mask(S.T, Pattern(n=2, m=4)), mask(S.T.contiguous(), Pattern(n=2, m=4)))


@pytest.mark.parametrize("fraction", [0.5, 0.3])
def test_unstructured_keeps_the_largest_of_each_row(fraction):
    torch.manual_seed(5)
    S = torch.rand(6, 20)
    S[3] *= 100  # rows compete within themselves only
    keep = mask(S, Pattern(fraction=fraction))
    for row, kept in zip(S, keep):
        expected = sorted(range(20), key=lambda j: -row[j].item())[: round(20 * fraction)]
        assert kept.nonzero().flatten().tolist() == sorted(expected)


@pytest.mark.parametrize(
    "text,expected,density",
    [
        ("2:4", Pattern(n=2, m=4), 0.5),
        ("1:4", Pattern(n=1, m=4), 0.25),
        (" 4:8 ", Pattern(n=4, m=8), 0.5),
        ("unstructured", Pattern(fraction=0.5), 0.5),
        ("Unstructured:0.3", Pattern(fraction=0.3), 0.3),
    ],
)
def test_parse(text, expected, density):
    pattern = Pattern.parse(text)
    assert pattern == expected and pattern.density == density
    assert Pattern.parse(str(pattern)) == pattern


@pytest.mark.parametrize(
    "text",
    ["", "2", "2:", "4:2", "0:4", "4:4", "2:128", "-2:4", "2:4:8", "unstructured:", "unstructured:1.5", "random"],
)
def test_nonsense_patterns_are_refused(text):
    with pytest.raises(RiaError, match="pattern"):
        Pattern.parse(text)


@pytest.mark.parametrize(
    "fields", [{}, {"n": 2}, {"n": 2, "m": 4, "fraction": 0.5}, {"n": 3, "m": 2}, {"fraction": 0.0}]
)
def test_inconsistent_patterns_cannot_be_made(fields):
    with pytest.raises(RiaError, match="pattern"):
        Pattern(**fields)


def test_columns_must_divide_into_groups():
    with pytest.raises(RiaError, match="18 input channels.*groups of 4"):
        mask(torch.rand(2, 18), Pattern(n=2, m=4))
