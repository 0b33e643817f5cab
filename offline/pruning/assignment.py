"""The linear assignment at the heart of the permutation search.

Scores come as `columns` [C, rows], one vector of scores over the rows of W for every channel, and `index` [G, m], the
channels of every group. An N:M mask keeps the n largest of a group's m scores in every row.
"""

from collections.abc import Sequence

import torch
from scipy.optimize import linear_sum_assignment

# Rows a slice, so that what a slice makes stays in the cache.
ROWS_AT_ONCE = 512
# Channels whose scores set the levels of a row.
SAMPLED_CHANNELS = 128


def largest(scores: Sequence[torch.Tensor], n: int) -> list[torch.Tensor]:
    """Elementwise the n largest of several tensors of one shape, in falling order: a sorting network, no gather."""
    top: list[torch.Tensor] = []
    for value in scores:
        for rank, current in enumerate(top):
            top[rank], value = torch.maximum(current, value), torch.minimum(current, value)
        if len(top) < n:
            top.append(value)
    return top


def kept(columns: torch.Tensor, index: torch.Tensor, n: int) -> torch.Tensor:
    """float64 scalar: the score that an n:m mask keeps, summed over groups and rows."""
    total = torch.zeros((), dtype=torch.float64, device=columns.device)
    for rows in columns.split(ROWS_AT_ONCE, dim=1):
        for value in largest([rows[channels] for channels in index.unbind(1)], n):
            total += value.sum(1).sum(dtype=torch.float64)
    return total


def gain_matrix(columns: torch.Tensor, index: torch.Tensor, position: int, n: int) -> torch.Tensor:
    """What group g gains when the channel that group c has at `position` takes that place in g.

    With the other m - 1 channels of g fixed, let t_g be, row by row, the n-th largest of their scores. The channel is
    kept where it beats t_g, so it adds sum_rows relu(S_c - t_g) to a term that depends on g alone. And
    sum relu(a - b) = (sum |a - b| + sum a - sum b) / 2: one L1 distance matrix, with no candidate group ever gathered
    or sorted.

    Args:
        columns: [C, rows] float32.
        index: int64 [G, m].

    Returns:
        [G, G] float32; an assignment's gain differs from its retained score by a constant.
    """
    gain = columns.new_zeros(len(index), len(index))
    for rows in columns.split(ROWS_AT_ONCE, dim=1):
        threshold, candidate = _placements(rows, index, position, n)
        gain += torch.cdist(threshold, candidate, p=1)
        gain += candidate.sum(1)[None, :] - threshold.sum(1)[:, None]
    return gain / 2


def levels(columns: torch.Tensor, count: int) -> torch.Tensor:
    """[count + 1, rows]: for every row a ladder from 0 to its largest score, with as many scores in every step."""
    sample = columns[:: max(1, len(columns) // SAMPLED_CHANNELS)]
    ordered = sample.T.sort(dim=1).values
    inner = [ordered[:, (len(sample) - 1) * step // count] for step in range(1, count)]
    return torch.stack([torch.zeros_like(ordered[:, 0]), *inner, columns.amax(0)])


def coded_gain_matrix(
    columns: torch.Tensor,
    index: torch.Tensor,
    position: int,
    n: int,
    ladder: torch.Tensor,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """`gain_matrix` by matrix products: many times faster for many groups, nearly as good, up to constants.

    relu(a - b) is the length that [b, a] has. Cut the scores of a row at the levels of a ladder, and let q_l(x) be the
    length of x inside step l over the root of the step's height d_l. Then sum_l q_l(a) (sqrt(d_l) - q_l(b)) is
    relu(a - b) exactly where a and b lie in different steps, and a smooth stand-in where they share one. So the gain
    is -q(b) . q(a) plus a term in a alone; what depends on the group or the channel alone is the same for all
    assignments, which is also why the codes may be centred, and then bf16 holds them.

    Args:
        ladder: [steps + 1, rows] as `levels` gives it.
        dtype: of the products: float32, or bfloat16 where that is the faster one.

    Returns:
        [G, G] float32, up to terms that depend on the group alone or on the channel alone.
    """
    gain = columns.new_zeros(len(index), len(index))
    for rows, steps in zip(columns.split(ROWS_AT_ONCE, dim=1), ladder.split(ROWS_AT_ONCE, dim=1)):
        floor, height = steps[:-1], steps.diff(dim=0)
        scale = torch.where(height > 0, height, 1.0).rsqrt()
        threshold, candidate = (
            (part[:, None] - floor).clamp_(min=0).minimum(height).mul_(scale)
            for part in _placements(rows, index, position, n)
        )
        centre = candidate.mean(0)
        threshold, candidate = (part.sub_(centre).flatten(1).to(dtype) for part in (threshold, candidate))
        gain -= threshold @ candidate.T
    return gain


def reassign(index: torch.Tensor, gain: torch.Tensor, position: int) -> torch.Tensor:
    """Deal the channels at one position of all groups out again, for the largest total gain.

    Args:
        index: int64 [G, m], the channels of every group.
        gain: [G, G], up to terms that depend on the group alone or on the channel alone.
    """
    # Without those terms the solver starts near its dual solution: ten times faster for a thousand groups.
    gain = gain - gain.mean(0, keepdim=True)
    gain -= gain.mean(1, keepdim=True)
    choice = linear_sum_assignment(gain.cpu().numpy(), maximize=True)[1]
    index = index.clone()
    index[:, position] = index[torch.as_tensor(choice, device=index.device), position]
    return index


def _placements(
    rows: torch.Tensor, index: torch.Tensor, position: int, n: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """[G, rows] each: what a channel has to beat in every group, and the channels that the groups have to offer."""
    others = [rows[index[:, j]] for j in range(index.shape[1]) if j != position]
    return largest(others, n)[-1], rows[index[:, position]]
