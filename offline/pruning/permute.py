"""Channel permutation: reorder the input channels so that a mask retains more of the score.

(Zhang et al., "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models", ICLR 2024.)
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

from ria_vllm.format.pattern import TWO_OF_FOUR, Pattern
from ria_vllm.offline.pruning.assignment import coded_gain_matrix, gain_matrix, levels, reassign, retained_score

# After a round that raises the retained score by a smaller fraction than this, another is not worthwhile.
WORTHWHILE = 2e-4
# Up to this many groups, the exact gain matrix is the faster one.
EXACT_GROUPS = 64
LADDER_STEPS = 4


def search(
    S: torch.Tensor,
    rounds: int = 8,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    pattern: Pattern = TWO_OF_FOUR,
) -> torch.Tensor:
    """Search for the permutation of input channels that retains the most score.

    Sort the channels by their summed score and deal them out to the groups in passes, every second pass reversed (the
    paper's heuristic). Then solve linear sum assignments, for one position of the groups at a time, in rounds, as long
    as they gain. Between rounds, channels are shuffled within their groups, so that the next round can move
    what the last one could not. A round is kept only if the score that it really retains is higher.

    Args:
        S: [rows, channels] scores; those of linears that share their input are stacked. The channels divide into the
            pattern's groups.
        rounds: stop after this many rounds with a gain.
        seed: for the shuffles; the same seed gives the same permutation.
        dtype: of the products that compare assignments; see `coded_gain_matrix`.

    Returns:
        int64 [channels] on the device of S: stored column j holds channel p[j]. It never retains less than the model's
        own order or the heuristic's.
    """
    channels = S.shape[1]
    index = torch.arange(channels, device=S.device).view(-1, pattern.of)
    if channels == pattern.of:
        return index.flatten()
    columns = S.T.float().contiguous()
    best = retained_score(columns, index)
    dealt = deal(columns, pattern)
    if (score := retained_score(columns, dealt)) >= best:
        index, best = dealt, score
    return _improve(columns, index, best, rounds, seed, dtype).flatten()


def search_heads(
    S: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    of_search: Mapping[str, Any] = MappingProxyType({}),
) -> torch.Tensor:
    """Like `search`, for an attention output projection, in an order that the value projection's rows can follow.

    Attention mixes tokens, but not the channels of a head. So channels move only within their head, and in the same way
    in all query heads that share a key-value head.

    Args:
        S: [rows, num_heads * head_dim] scores.
        of_search: further arguments of `search`.

    Returns:
        int64 [num_heads * head_dim].
    """
    share = num_heads // num_kv_heads
    heads = S.view(-1, num_kv_heads, share, head_dim)
    order = []
    for kv in range(num_kv_heads):
        stacked = heads[:, kv].reshape(-1, head_dim)
        inner = search(stacked, **of_search)
        order += [inner + (kv * share + query) * head_dim for query in range(share)]
    return torch.cat(order)


def deal(columns: torch.Tensor, pattern: Pattern = TWO_OF_FOUR) -> torch.Tensor:
    """The heuristic order, int64 [G, m].

    Of the channels ranked by summed score, each group gets one from each of m equal parts.
    """
    passes = columns.sum(1, dtype=torch.float64).argsort(stable=True).view(pattern.of, -1)
    return torch.stack([row.flip(0) if turn % 2 else row for turn, row in enumerate(passes)], dim=1)


def _improve(
    columns: torch.Tensor, index: torch.Tensor, best: torch.Tensor, rounds: int, seed: int, dtype: torch.dtype
) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    groups = len(index)
    ladder = levels(columns, LADDER_STEPS) if groups > EXACT_GROUPS else None
    # With few groups a round is cheap and has little choice, so more of them may fail before the search stops.
    patience = 1 + 32 // groups
    trial, idle = index, 0
    while rounds > 0 and idle < patience:
        for position in range(index.shape[1]):
            if ladder is None:
                gain = gain_matrix(columns, trial, position)
            else:
                gain = coded_gain_matrix(columns, trial, position, ladder, dtype)
            trial = reassign(trial, gain, position)
        score = retained_score(columns, trial)
        idle = idle + 1 if score <= best * (1 + WORTHWHILE) else 0
        if score > best:
            index, best, rounds = trial, score, rounds - 1
        order = torch.rand(index.shape, generator=draw).argsort(dim=1).to(index.device)
        trial = index.gather(1, order)  # within the groups
    return index
