"""The linear assignment at the heart of the permutation search.

Scores come as `grouped` [G, m, rows]: G groups of m channels, each channel one vector of scores over the rows of W.
An N:M mask keeps the n largest of a group's m scores in every row; `retained` is their sum.
"""

from collections.abc import Sequence

import torch
from scipy.optimize import linear_sum_assignment

# Rows a slice: the two matrices that cdist streams then stay in the cache.
ROWS_AT_ONCE = 512


def largest(scores: Sequence[torch.Tensor], n: int) -> list[torch.Tensor]:
    """Elementwise the n largest of several tensors of one shape, in falling order: a sorting network, no gather."""
    top: list[torch.Tensor] = []
    for value in scores:
        for rank, current in enumerate(top):
            top[rank], value = torch.maximum(current, value), torch.minimum(current, value)
        if len(top) < n:
            top.append(value)
    return top


def kept(grouped: torch.Tensor, n: int) -> torch.Tensor:
    """[G] float64: what an n:m mask keeps of every group's score, summed over the rows."""
    total = torch.zeros(grouped.shape[0], dtype=torch.float64, device=grouped.device)
    for part in grouped.split(ROWS_AT_ONCE * 8, dim=2):
        for value in largest(part.unbind(1), n):
            total += value.sum(1, dtype=torch.float64)
    return total


def gain_matrix(grouped: torch.Tensor, position: int, n: int) -> torch.Tensor:
    """What group g gains when the channel that group c has at `position` takes that place in g.

    With the other m - 1 channels of g fixed, let t_g be, row by row, the n-th largest of their scores. The channel is
    kept where it beats t_g, so it adds sum_rows relu(S_c - t_g) to a term that depends on g alone. And
    sum relu(a - b) = (sum |a - b| + sum a - sum b) / 2: one L1 distance matrix, with no group ever gathered or sorted.

    Args:
        grouped: [G, m, rows] float32.

    Returns:
        [G, G] float32; an assignment's gain differs from its retained score by a constant.
    """
    groups, _, rows = grouped.shape
    gain = grouped.new_zeros(groups, groups)
    for part in grouped.split(ROWS_AT_ONCE, dim=2):
        others = [part[:, j] for j in range(part.shape[1]) if j != position]
        threshold, candidate = largest(others, n)[-1], part[:, position].contiguous()
        gain += torch.cdist(threshold, candidate, p=1)
        gain += candidate.sum(1)[None, :] - threshold.sum(1)[:, None]
    return gain / 2


def reassign(index: torch.Tensor, gain: torch.Tensor, position: int) -> torch.Tensor:
    """Deal the channels at one position of all groups out again, for the largest total gain.

    Args:
        index: int64 [G, m], the channels of every group.
        gain: [G, G] as `gain_matrix` gives it.
    """
    choice = linear_sum_assignment(gain.cpu().numpy(), maximize=True)[1]
    index = index.clone()
    index[:, position] = index[torch.as_tensor(choice, device=index.device), position]
    return index
