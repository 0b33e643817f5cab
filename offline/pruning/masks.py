"""Masks: of every so many consecutive input channels of a row, half of the weights are kept."""

from collections.abc import Sequence

import torch

from ria_vllm.format.pattern import TWO_OF_FOUR, Pattern


def mask(S: torch.Tensor, pattern: Pattern = TWO_OF_FOUR) -> torch.Tensor:
    """Keep the largest scores of each group; of equal scores, the one in the lower column.

    Args:
        S: [out, in] scores, any floating dtype; `in` divides into the pattern's groups.

    Returns:
        bool [out, in], True = kept.
    """
    rows, columns = S.shape
    groups = S.reshape(rows, columns // pattern.of, pattern.of)
    if pattern.of > 4:  # twice as fast where the scores of each place lie together, which costs a copy
        groups = groups.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    return torch.stack(kept_of_groups(groups.unbind(-1)), dim=-1).reshape(rows, columns)


def kept_of_groups(scores: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Which scores are in the larger half of their group; of equal ones, the one that comes first.

    Args:
        scores: tensors of one shape, one for each place in a group.

    Returns:
        As many bool tensors of this shape.
    """
    # A score's rank is the number of scores in its group that beat it: at first, all that come after it. For such small
    # groups, counting is many times faster than sorting.
    group = len(scores)
    rank = [torch.full_like(score, group - 1 - place, dtype=torch.int8) for place, score in enumerate(scores)]
    for low in range(group):
        for high in range(low + 1, group):
            low_wins = (scores[low] >= scores[high]).view(torch.int8)
            rank[high] += low_wins
            rank[low] -= low_wins
    return [r < group // 2 for r in rank]
