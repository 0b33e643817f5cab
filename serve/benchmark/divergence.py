"""The Kullback-Leibler divergence of two models, of each of which only the likeliest tokens are known."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import rel_entr

# Logprobs in float32 sum to one within about this.
SMALLEST_REST = 1e-6


@dataclass(frozen=True)
class Listed:
    """What a server said of one position.

    Attributes:
        ids: int64 [listed], different and ascending.
        logprobs: float64 [listed].
        limit: no token outside the list has a larger logprob.
        target: logprob of the text's own token, which is listed.
    """

    ids: np.ndarray
    logprobs: np.ndarray
    limit: float
    target: float


def divergences(reference: Sequence[Listed], side: Sequence[Listed]) -> tuple[np.ndarray, np.ndarray]:
    """The least KL(reference || side) that both lists allow, at each position, and what the reference gives to tokens
    that not both list.

    A token that one of the two does not list has at most the probability of its last one there, and all tokens sum to
    one. Among such distributions, the divergence is least where the ratio p/q of the tokens that neither lists is some
    r, and every token that one of them lists has that ratio too, unless its unknown side would exceed its limit. r is
    found by bisection. Those that neither lists count as one, without a limit, which hardly matters: they are many.

    Returns:
        float64 [positions] in nats, and float64 [positions] probabilities.
    """
    count, width = len(reference), max((len(one.ids) for one in (*reference, *side)), default=0)
    known, p_rest, q_rest = np.zeros(count), np.zeros(count), np.zeros(count)
    p_only, q_only = np.zeros((count, width)), np.zeros((count, width))  # of tokens that only one of the two lists
    for i, (ours, theirs) in enumerate(zip(reference, side, strict=True)):
        _, a, b = np.intersect1d(ours.ids, theirs.ids, assume_unique=True, return_indices=True)
        p, q = np.exp(ours.logprobs), np.exp(theirs.logprobs)
        known[i] = (p[a] * (ours.logprobs[a] - theirs.logprobs[b])).sum()
        p_rest[i], q_rest[i] = 1 - p[a].sum(), 1 - q[b].sum()
        p_only[i, : len(p) - len(a)], q_only[i, : len(q) - len(b)] = np.delete(p, a), np.delete(q, b)
    p_limit = np.exp([[one.limit] for one in reference])
    q_limit = np.exp([[one.limit] for one in side])
    p_neither = np.maximum(p_rest - p_only.sum(1), SMALLEST_REST)  # and of what only the side lists
    q_neither = np.maximum(q_rest - q_only.sum(1), SMALLEST_REST)  # and of what only the reference lists

    def split(r: np.ndarray) -> tuple[np.ndarray, ...]:
        """The unknown probabilities for a ratio, and what they leave for the tokens that neither lists."""
        q = np.minimum(q_limit, p_only / r[:, None])
        p = np.minimum(p_limit, q_only * r[:, None])
        return q, p, q_neither - q.sum(1), p_neither - p.sum(1)

    def bisect(too_low: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        low, high = np.full(count, 1e-12), np.full(count, 1e12)
        for _ in range(80):
            middle = np.sqrt(low * high)
            below = too_low(middle)
            low, high = np.where(below, middle, low), np.where(below, high, middle)
        return high

    def too_low(r: np.ndarray) -> np.ndarray:
        _, _, q_left, p_left = split(r)
        return (q_left <= 0) | (p_left > 0) & (r * q_left < p_left)

    ratio = bisect(too_low)
    # If nothing is left for the tokens that neither lists, the unknown p have a ratio of their own, which is smaller.
    p_ratio = np.minimum(ratio, bisect(lambda r: split(r)[3] > 0))
    q_unknown, _, q_left, _ = split(ratio)
    _, p_unknown, _, p_left = split(p_ratio)
    left = rel_entr(np.maximum(p_left, 0), np.maximum(q_left, SMALLEST_REST**2))
    return known + rel_entr(p_only, q_unknown).sum(1) + rel_entr(p_unknown, q_only).sum(1) + left, p_rest
