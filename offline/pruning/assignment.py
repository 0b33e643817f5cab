"""The linear sum assignment at the heart of the permutation search.

`columns` [C, rows] holds, for each channel, its scores over the rows of W; `index` [G, m] holds the channels of each
group. In each row, a mask keeps the larger half of a group's scores.
"""

from collections.abc import Sequence

import torch
from scipy.optimize import linear_sum_assignment

# Rows in a slice; small enough that its temporaries stay in the cache.
ROWS_AT_ONCE = 512
# The number of channels from which the levels of a row are estimated.
SAMPLED_CHANNELS = 128


def largest(scores: Sequence[torch.Tensor], count: int) -> list[torch.Tensor]:
    """The `count` largest, element by element, of several tensors of one shape, in descending order."""
    top: list[torch.Tensor] = []
    for value in scores:
        for rank, current in enumerate(top):
            top[rank], value = torch.maximum(current, value), torch.minimum(current, value)
        if len(top) < count:
            top.append(value)
    return top


def retained_score(columns: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The score that a mask retains, summed over groups and rows; a float64 scalar."""
    total = torch.zeros((), dtype=torch.float64, device=columns.device)
    for rows in columns.split(ROWS_AT_ONCE, dim=1):
        for value in largest([rows[channels] for channels in index.unbind(1)], index.shape[1] // 2):
            total += value.sum(1).sum(dtype=torch.float64)
    return total


def gain_matrix(columns: torch.Tensor, index: torch.Tensor, position: int) -> torch.Tensor:
    """Entry (g, c): what group g gains if the channel that group c has at `position` takes that place in g.

    The other m - 1 channels of g are fixed. Let t_g be, for each row, the (m/2)-th largest of their scores. The mask
    keeps the new channel where it beats t_g, so it adds sum_rows relu(S_c - t_g) to a term that depends on g alone. And
    sum relu(a - b) = (sum |a - b| + sum a - sum b) / 2, so one matrix of L1 distances is enough; no candidate group is
    ever gathered or sorted.

    Args:
        columns: [C, rows] float32.
        index: int64 [G, m].

    Returns:
        [G, G] float32. The total gain of an assignment differs from its retained score by a constant.
    """
    gain = columns.new_zeros(len(index), len(index))
    for rows in columns.split(ROWS_AT_ONCE, dim=1):
        threshold, candidate = _placements(rows, index, position)
        gain += torch.cdist(threshold, candidate, p=1)
        gain += candidate.sum(1)[None, :] - threshold.sum(1)[:, None]
    return gain / 2


def levels(columns: torch.Tensor, count: int) -> torch.Tensor:
    """[count + 1, rows]: for each row a ladder from 0 to its largest score, with about equally many scores per step."""
    sample = columns[:: max(1, len(columns) // SAMPLED_CHANNELS)]
    ordered = sample.T.sort(dim=1).values
    inner = [ordered[:, (len(sample) - 1) * step // count] for step in range(1, count)]
    return torch.stack([torch.zeros_like(ordered[:, 0]), *inner, columns.amax(0)])


def coded_gain_matrix(
    columns: torch.Tensor,
    index: torch.Tensor,
    position: int,
    ladder: torch.Tensor,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """`gain_matrix` approximated by matrix products: nearly as good, and many times faster for many groups.

    relu(a - b) is the length of the interval [b, a]. Cut it at the levels of the row's ladder. Let d_l be the height of
    step l, and q_l(x) the length of [0, x] inside that step, divided by sqrt(d_l). Then
    sum_l q_l(a) (sqrt(d_l) - q_l(b)) equals relu(a - b) where a and b lie in different steps, and approximates it
    smoothly where they share one. So the gain is -q(b) . q(a) plus a term that depends on a alone. Terms that depend on
    the group alone or the channel alone are the same for all assignments. For the same reason the codes q may be
    centred, which makes bf16 precise enough for them.

    Args:
        ladder: [steps + 1, rows], as returned by `levels`.
        dtype: of the products: float32, or bfloat16 where that is faster.

    Returns:
        [G, G] float32, up to terms that depend on the group alone or on the channel alone.
    """
    gain = columns.new_zeros(len(index), len(index))
    for rows, steps in zip(columns.split(ROWS_AT_ONCE, dim=1), ladder.split(ROWS_AT_ONCE, dim=1)):
        floor, height = steps[:-1], steps.diff(dim=0)
        scale = torch.where(height > 0, height, 1.0).rsqrt()
        threshold, candidate = (
            (part[:, None] - floor).clamp_(min=0).minimum(height).mul_(scale)
            for part in _placements(rows, index, position)
        )
        centre = candidate.mean(0)
        threshold, candidate = (part.sub_(centre).flatten(1).to(dtype) for part in (threshold, candidate))
        gain -= threshold @ candidate.T
    return gain


def reassign(index: torch.Tensor, gain: torch.Tensor, position: int) -> torch.Tensor:
    """Redistribute the channels at one position of all groups for the largest total gain.

    Args:
        index: int64 [G, m], the channels of each group.
        gain: [G, G], up to terms that depend on the group alone or on the channel alone.

    Returns:
        The new `index`.
    """
    # Without those terms the solver starts near its dual solution, and is ten times faster for a thousand groups.
    gain = gain - gain.mean(0, keepdim=True)
    gain -= gain.mean(1, keepdim=True)
    choice = linear_sum_assignment(gain.cpu().numpy(), maximize=True)[1]
    index = index.clone()
    index[:, position] = index[torch.as_tensor(choice, device=index.device), position]
    return index


def _placements(rows: torch.Tensor, index: torch.Tensor, position: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[G, rows] each: the threshold that a channel must beat in each group, and the scores of each candidate."""
    others = [rows[index[:, j]] for j in range(index.shape[1]) if j != position]
    return largest(others, index.shape[1] // 2)[-1], rows[index[:, position]]
