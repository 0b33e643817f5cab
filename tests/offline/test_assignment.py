from itertools import permutations

import pytest
import torch

from ria_vllm.offline.assignment import gain_matrix, kept, largest, reassign


def brute_kept(grouped, n):
    """[G] float64 by sorting."""
    return grouped.double().sort(dim=1, descending=True).values[:, :n].sum(dim=(1, 2))


@pytest.mark.parametrize("n,m", [(2, 4), (1, 4), (3, 4), (4, 8)])
def test_largest_is_the_head_of_a_sort(n, m):
    torch.manual_seed(0)
    scores = torch.randint(0, 9, (m, 5, 7)).float()
    expected = scores.sort(dim=0, descending=True).values[:n]
    assert torch.equal(torch.stack(largest(scores.unbind(0), n)), expected)


@pytest.mark.parametrize("rows", [3, 5000])
def test_kept(rows):
    torch.manual_seed(1)
    grouped = torch.rand(5, 4, rows)
    torch.testing.assert_close(kept(grouped, 2), brute_kept(grouped, 2), rtol=1e-6, atol=0)


@pytest.mark.parametrize("n,m", [(2, 4), (1, 4), (3, 4), (4, 8)])
@pytest.mark.parametrize("rows", [1, 6, 700])
def test_gain_matrix_against_every_placement(n, m, rows):
    """Put the channel of every group into every group and score the changed group from nothing."""
    torch.manual_seed(n + m + rows)
    G = 6
    grouped = torch.rand(G, m, rows)
    for position in range(m):
        gain = gain_matrix(grouped, position, n)
        without = grouped.clone()
        without[:, position] = 0  # scores are never negative: a zero adds nothing to the n largest
        base = brute_kept(without, n)
        for g in range(G):
            for c in range(G):
                changed = grouped[g : g + 1].clone()
                changed[0, position] = grouped[c, position]
                added = (brute_kept(changed, n)[0] - base[g]).item()
                assert gain[g, c].item() == pytest.approx(added, rel=1e-4, abs=1e-4)


def test_reassign_is_the_best_of_all_assignments():
    torch.manual_seed(2)
    G, n, m = 5, 2, 4
    columns = torch.rand(G * m, 11)
    index = torch.randperm(G * m).view(G, m)
    for position in range(m):
        new = reassign(index, gain_matrix(columns[index], position, n), position)
        assert torch.equal(new.flatten().sort().values, torch.arange(G * m))
        others = [j for j in range(m) if j != position]
        assert torch.equal(new[:, others], index[:, others])
        best = 0.0
        for order in permutations(range(G)):
            trial = index.clone()
            trial[:, position] = index[list(order), position]
            best = max(best, brute_kept(columns[trial], n).sum().item())
        assert brute_kept(columns[new], n).sum().item() == pytest.approx(best, rel=1e-6)
