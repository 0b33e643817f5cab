"""2:4 masks: of every four consecutive input channels of a row, two weights are kept."""

from collections.abc import Sequence

import torch

from ria_vllm.errors import RiaError

PATTERN = "2:4"
KEPT, GROUP = 2, 4


def mask(S: torch.Tensor) -> torch.Tensor:
    """Keep the two largest scores of each group; of equal scores, the one in the lower column.

    Args:
        S: [out, in] scores, any floating dtype.

    Returns:
        bool [out, in], True = kept.

    Raises:
        RiaError: `in` is not a multiple of 4.
    """
    rows, columns = S.shape
    if columns % GROUP:
        raise RiaError(f"{columns} input channels do not divide into groups of {GROUP}")
    groups = S.reshape(rows, columns // GROUP, GROUP).unbind(-1)
    return torch.stack(kept_of_groups(groups), dim=-1).reshape(rows, columns)


def kept_of_groups(scores: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Which scores are among the two largest of their group; of equal ones, the one that comes first.

    Args:
        scores: 4 tensors of one shape, one for each place in a group.

    Returns:
        4 bool tensors of this shape.
    """
    # A score's rank is the number of scores in its group that beat it: at first, all that come after it. For such small
    # groups, counting is many times faster than sorting.
    rank = [torch.full_like(score, GROUP - 1 - place, dtype=torch.int8) for place, score in enumerate(scores)]
    for low in range(GROUP):
        for high in range(low + 1, GROUP):
            low_wins = (scores[low] >= scores[high]).view(torch.int8)
            rank[high] += low_wins
            rank[low] -= low_wins
    return [r < KEPT for r in rank]
