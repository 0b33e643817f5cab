"""The least divergence that two lists allow, against a general optimizer and against complete distributions."""

import numpy as np
import pytest
from scipy.optimize import minimize

from ria_vllm.serve.benchmark.divergence import Listed, divergences


def distribution(generator, size: int, sharpness: float) -> np.ndarray:
    weights = np.exp(generator.normal(size=size) * sharpness)
    return weights / weights.sum()


def listed(probabilities: np.ndarray, top: int, target: int) -> Listed:
    order = np.argsort(-probabilities)[:top]
    ids = np.array(sorted({*order.tolist(), target}))
    logprobs = np.log(probabilities)
    return Listed(ids, logprobs[ids], logprobs[order[-1]], logprobs[target])


def kl(p: np.ndarray, q: np.ndarray) -> float:
    return float((p * np.log(p / q)).sum())


def cases(count: int, size: int):
    """(p, q, target): independent ones, near ones, and ones whose likeliest tokens are the other's unlikeliest."""
    generator = np.random.default_rng(0)
    for number in range(count):
        p = distribution(generator, size, generator.uniform(0.2, 3))
        q = distribution(generator, size, generator.uniform(0.2, 3))
        if number % 3 == 1:
            q = p * np.exp(generator.normal(size=size) * 0.1)
            q /= q.sum()
        if number % 3 == 2:
            q = np.empty(size)
            q[np.argsort(p)] = np.sort(distribution(generator, size, 2))[::-1]
        yield p, q, int(generator.integers(size))


@pytest.mark.parametrize("top", [2, 3, 6])
def test_it_is_what_a_general_optimizer_finds(top):
    """SLSQP over the unknown probabilities, with their limits and sums; those that neither lists are one."""
    tried = compared = 0
    for p, q, target in cases(30, 12):
        ours, theirs = listed(p, top, target), listed(q, top, target)
        (found,), _ = divergences([ours], [theirs])
        both, p_only = np.intersect1d(ours.ids, theirs.ids), np.setdiff1d(ours.ids, theirs.ids)
        q_only, some = np.setdiff1d(theirs.ids, ours.ids), 1e-9
        if not len(p_only) + len(q_only):
            continue
        rest_p, rest_q = 1 - p[ours.ids].sum(), 1 - q[theirs.ids].sum()

        def complete(unknown):
            """The whole distributions: what both list, what only one lists, and the rest."""
            of_p, of_q = np.split(unknown, [len(q_only)])
            full_p = np.concatenate([p[both], p[p_only], of_p, [rest_p - of_p.sum()]])
            return full_p, np.concatenate([q[both], of_q, q[q_only], [rest_q - of_q.sum()]])

        limits = [(some, np.exp(ours.limit))] * len(q_only) + [(some, np.exp(theirs.limit))] * len(p_only)
        left = {"type": "ineq", "fun": lambda unknown: [full[-1] - some for full in complete(unknown)]}
        best = minimize(
            lambda unknown: kl(*(np.maximum(full, some) for full in complete(unknown))),
            np.concatenate([p[q_only], q[p_only]]), bounds=limits, constraints=[left], method="SLSQP",
            options={"maxiter": 1000, "ftol": 1e-12},
        )  # fmt: skip
        assert found <= best.fun + 1e-5
        tried, compared = tried + 1, compared + (best.fun - found < 1e-4)
    assert tried >= 15 and compared >= 0.8 * tried  # the optimizer stops early now and then


@pytest.mark.parametrize("top", [1, 4, 16, 100])
def test_it_is_at_most_the_true_divergence_and_at_least_that_of_one_bucket(top):
    for p, q, target in cases(60, 200):
        ours, theirs = listed(p, top, target), listed(q, top, target)
        (found,), (unlisted,) = divergences([ours], [theirs])
        both = np.intersect1d(ours.ids, theirs.ids)
        others = np.setdiff1d(np.arange(200), both)
        bucket = kl(np.append(p[both], p[others].sum()), np.append(q[both], q[others].sum()))
        assert bucket - 1e-9 <= found <= kl(p, q) + 1e-9
        assert unlisted == pytest.approx(p[others].sum())


def test_it_is_exact_with_all_tokens_listed():
    pairs = [(listed(p, 50, 0), listed(q, 50, 0), kl(p, q)) for p, q, _ in cases(20, 50)]
    ours, theirs, expected = zip(*pairs)
    found, unlisted = divergences(ours, theirs)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(unlisted, 0, atol=1e-12)


def test_positions_do_not_depend_on_each_other():
    """Lists of different lengths share arrays."""
    lists = [(listed(p, top, 3), listed(q, top, 3)) for top, (p, q, _) in zip((1, 7, 30) * 4, cases(12, 40))]
    together = divergences(*zip(*lists))[0]
    alone = [divergences([ours], [theirs])[0][0] for ours, theirs in lists]
    np.testing.assert_allclose(together, alone, rtol=1e-9)


def test_equal_lists_do_not_diverge():
    p, _, _ = next(cases(1, 40))
    (found,), _ = divergences([listed(p, 5, 0)], [listed(p, 5, 0)])
    assert found == pytest.approx(0, abs=1e-12)


def test_a_token_that_the_side_no_longer_lists_counts():
    """The reference is sure of a token that is not among the side's: it has at most 0.1 there."""
    ours = Listed(np.array([1, 5]), np.log([0.9, 0.02]), np.log(0.02), np.log(0.9))
    theirs = Listed(np.array([2, 5]), np.log([0.5, 0.1]), np.log(0.1), np.log(0.5))
    (found,), (unlisted,) = divergences([ours], [theirs])
    assert unlisted == pytest.approx(0.98)
    # 2 has at most 0.02 in the reference; the best is that the other 0.06 are spread over the 0.3 that are left.
    least = 0.9 * np.log(0.9 / 0.1) + 0.02 * np.log(0.02 / 0.1) + 0.02 * np.log(0.02 / 0.5) + 0.06 * np.log(0.06 / 0.3)
    assert found == pytest.approx(least, abs=1e-6)
