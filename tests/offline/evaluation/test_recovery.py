"""Recovery by hand: score over score, for metrics where higher is better, and of the mean over tasks."""

import math

import pytest

from ria_vllm.offline.evaluation.recovery import average, cells, compare, recovery
from ria_vllm.offline.evaluation.tasks import TaskScores

PRUNED = {
    "words": TaskScores(
        {"perplexity": 30.0, "perplexity_stderr": 2.0, "acc": 0.3, "acc_stderr": 0.02}, ("acc",), 50, 0
    ),
    "endings": TaskScores({"acc": 0.4, "acc_norm": 0.45}, ("acc", "acc_norm"), 80, 0),
    "sums": TaskScores({"exact_match,strict": 0.1, "exact_match_stderr,strict": 0.01}, ("exact_match,strict",), 20, 5),
}
DENSE = {
    "words": TaskScores(
        {"perplexity": 10.0, "perplexity_stderr": 1.0, "acc": 0.4, "acc_stderr": 0.03}, ("acc",), 50, 0
    ),
    "endings": TaskScores({"acc": 0.4, "acc_norm": 0.5}, ("acc", "acc_norm"), 80, 0),
    "sums": TaskScores({"exact_match,strict": 0.2, "exact_match_stderr,strict": 0.01}, ("exact_match,strict",), 20, 5),
}


def test_score_over_score_in_percent():
    found = {(row.task, row.metric): row.recovery for row in compare(PRUNED, DENSE)}
    assert found.pop(("words", "perplexity")) is None  # lower is better
    expected = {("words", "acc"): 75, ("endings", "acc"): 100, ("endings", "acc_norm"): 90}
    assert found == pytest.approx(expected | {("sums", "exact_match,strict"): 50})


@pytest.mark.parametrize("dense", [0.0, -1.0, math.nan, math.inf])
def test_what_means_nothing_is_left_out(dense):
    assert recovery(0.5, dense) is None


def test_the_mean_is_a_ratio_of_means_over_one_metric_of_each_task():
    mean = average(PRUNED, DENSE)
    assert (mean.task, mean.metric) == ("mean of 3 tasks", "acc, acc_norm, exact_match,strict")
    assert mean.score == pytest.approx((0.3 + 0.45 + 0.1) / 3) and mean.dense == pytest.approx((0.4 + 0.5 + 0.2) / 3)
    assert mean.recovery == pytest.approx(100 * 0.85 / 1.1)  # the mean of the ratios is 71.7
    other_scale = {"summaries": TaskScores({"bleu": 31.0}, ("bleu",))}
    assert average(PRUNED | other_scale, DENSE | other_scale) == mean
    falling = {"words": TaskScores({"perplexity": 3.0})}
    assert average(falling, falling) is None


def test_a_group_counts_once():
    side = {
        "all": TaskScores({"acc": 0.5}, ("acc",)),
        "a": TaskScores({"acc": 0.1}, ("acc",), 5, 0, in_group=True),
        "b": TaskScores({"acc": 0.7}, ("acc",), 5, 0),
    }
    assert average(side, side).task == "mean of 2 tasks" and average(side, side).score == pytest.approx(0.6)


def test_the_rows_of_a_table():
    assert cells([*compare(PRUNED, DENSE), average(PRUNED, DENSE)]) == [
        ("words", "perplexity", "50, 0-shot", "30.0000 ± 2.0000", "10.0000 ± 1.0000", ""),
        ("words", "acc", "50, 0-shot", "0.3000 ± 0.0200", "0.4000 ± 0.0300", "75.0%"),
        ("endings", "acc", "80, 0-shot", "0.4000", "0.4000", "100.0%"),
        ("endings", "acc_norm", "80, 0-shot", "0.4500", "0.5000", "90.0%"),
        ("sums", "exact_match,strict", "20, 5-shot", "0.1000 ± 0.0100", "0.2000 ± 0.0100", "50.0%"),
        ("mean of 3 tasks", "acc, acc_norm, exact_match,strict", "", "0.2833", "0.3667", "77.3%"),
    ]
