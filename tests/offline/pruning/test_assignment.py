from itertools import permutations

import pytest
import torch

from ria_vllm.offline.pruning.assignment import (
    coded_gain_matrix,
    gain_matrix,
    largest,
    levels,
    reassign,
    retained_score,
)


def brute_kept(columns, index):
    """[G] float64: gather each group, sort its scores in each row, and sum the larger half."""
    kept = index.shape[1] // 2
    return columns[index].double().sort(dim=1, descending=True).values[:, :kept].sum(dim=(1, 2))


def brute_gain(columns, index, position):
    """Put the channel of each group into each group, and score the changed group from scratch."""
    others = [j for j in range(index.shape[1]) if j != position]
    nothing = torch.cat([columns, torch.zeros_like(columns[:1])])  # scores are never negative: a zero adds none
    without = index.clone()
    without[:, position] = len(columns)
    base = brute_kept(nothing, without)
    gain = torch.empty(len(index), len(index), dtype=torch.float64)
    for g in range(len(index)):
        for c in range(len(index)):
            changed = torch.cat([index[g, others], index[c, [position]]])
            gain[g, c] = brute_kept(columns, changed[None])[0] - base[g]
    return gain


def total(gain, order):
    return gain[range(len(order)), list(order)].sum().item()


@pytest.mark.parametrize("count, kept", [(3, 2), (4, 2), (15, 8)])
def test_largest_is_the_head_of_a_sort(count, kept):
    torch.manual_seed(0)
    scores = torch.randint(0, 9, (count, 5, 7)).float()
    expected = scores.sort(dim=0, descending=True).values[:kept]
    assert torch.equal(torch.stack(largest(scores.unbind(0), kept)), expected)


@pytest.mark.parametrize("rows, group", [(3, 4), (5000, 4), (30, 16)])
def test_kept(rows, group):
    torch.manual_seed(1)
    columns, index = torch.rand(5 * group, rows), torch.randperm(5 * group).view(5, group)
    torch.testing.assert_close(retained_score(columns, index), brute_kept(columns, index).sum(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("rows, group", [(1, 4), (6, 4), (700, 4), (6, 16)])
def test_gain_matrix_against_every_placement(rows, group):
    torch.manual_seed(rows)
    columns, index = torch.rand(6 * group, rows), torch.randperm(6 * group).view(6, group)
    for position in range(group):
        expected = brute_gain(columns, index, position)
        torch.testing.assert_close(gain_matrix(columns, index, position).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_coded_gain_is_exact_where_no_two_scores_share_a_step(dtype):
    """Integer scores, with a level at each: differences between assignments are then exact."""
    torch.manual_seed(6)
    columns, index = torch.randint(0, 5, (24, 700)).float(), torch.randperm(24).view(6, 4)
    ladder = torch.arange(5.0)[:, None].expand(5, 700)
    for position in range(4):
        exact = brute_gain(columns, index, position)
        coded = coded_gain_matrix(columns, index, position, ladder, dtype).double()
        orders = [torch.randperm(6).tolist() for _ in range(50)]
        offsets = torch.tensor([total(exact, order) - total(coded, order) for order in orders])
        spread = torch.tensor([total(exact, order) for order in orders]).std()
        assert offsets.std() < {torch.float32: 1e-4, torch.bfloat16: 0.02}[dtype] * spread


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps", [1, 4])
def test_coded_gain_ranks_assignments_nearly_as_the_exact_one(steps, dtype):
    torch.manual_seed(steps)
    columns = torch.randn(400, 1500).abs() * torch.randn(400, 1).exp() * torch.rand(1500)
    index = torch.randperm(400).view(100, 4)
    before = retained_score(columns, index)
    exact = retained_score(columns, reassign(index, gain_matrix(columns, index, 1), 1)) - before
    coded = coded_gain_matrix(columns, index, 1, levels(columns, steps), dtype)
    found = retained_score(columns, reassign(index, coded, 1)) - before
    assert exact > 0 and exact * {1: 0.7, 4: 0.97}[steps] <= found <= exact * 1.0001


def test_levels_cut_every_row_into_even_shares():
    torch.manual_seed(3)
    columns = torch.rand(100, 7) * torch.arange(1, 8)
    ladder = levels(columns, 4)
    assert ladder.shape == (5, 7)
    assert (ladder[0] == 0).all() and torch.equal(ladder[-1], columns.amax(0))
    for step in range(4):
        share = ((columns >= ladder[step]) & (columns <= ladder[step + 1])).float().mean(0)
        assert ((share > 0.2) & (share < 0.3)).all()


def test_rows_of_zeros_have_finite_codes():
    columns = torch.rand(16, 9)
    columns[:, 4] = 0
    gain = coded_gain_matrix(columns, torch.arange(16).view(4, 4), 0, levels(columns, 4))
    assert torch.isfinite(gain).all()


def test_reassign_is_the_best_of_all_assignments():
    torch.manual_seed(2)
    columns, index = torch.rand(20, 11), torch.randperm(20).view(5, 4)
    for position in range(4):
        new = reassign(index, gain_matrix(columns, index, position), position)
        assert torch.equal(new.flatten().sort().values, torch.arange(20))
        others = [j for j in range(4) if j != position]
        assert torch.equal(new[:, others], index[:, others])
        best = 0.0
        for order in permutations(range(5)):
            trial = index.clone()
            trial[:, position] = index[list(order), position]
            best = max(best, brute_kept(columns, trial).sum().item())
        assert brute_kept(columns, new).sum().item() == pytest.approx(best, rel=1e-6)
