"""How much of the dense model's task scores a pruned model keeps.

Recovery is score over score, in percent: a model with an accuracy of 0.45 whose dense model has 0.50 has recovered 90%.
Published 2:4 models state it in this way. The level of chance is not subtracted first, so a multiple-choice task with
four choices shows 50% for a model that guesses if the dense model has 0.50.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ria_vllm.offline.evaluation.tasks import TaskScores

TITLES = ("task", "metric", "examples", "score", "base model", "recovery")
EXPLAINED = (
    "± their standard errors. Recovery is the score in percent of the base model's, without subtracting the level of "
    "chance. A mean is over one metric of each task, acc_norm where there is one, and is then compared."
)


@dataclass(frozen=True)
class Score:
    """One metric of one task, or a mean over tasks. Errors are standard errors; None: not known.

    Attributes:
        examples: how many were asked; None for a group of tasks, and for a mean.
        shots: examples in each prompt.
        dense: the base model's score.
        recovery: the score in percent of the base model's; None where lower is better, or without a base model.
    """

    task: str
    metric: str
    score: float
    dense: float | None = None
    recovery: float | None = None
    error: float | None = None
    dense_error: float | None = None
    examples: int | None = None
    shots: int | None = None


def recovery(score: float, dense: float) -> float | None:
    """`score` in percent of `dense`; None where that means nothing."""
    return 100 * score / dense if math.isfinite(score) and math.isfinite(dense) and dense > 0 else None


def compare(model: Mapping[str, TaskScores], dense: Mapping[str, TaskScores] | None) -> list[Score]:
    """Every metric of every task, without the standard errors as rows of their own.

    Args:
        dense: the dense model's scores on the same tasks; None: unknown.

    Returns:
        Rows in the harness's order. Only metrics where higher is better have a recovery.
    """
    rows = []
    for task, found in model.items():
        for metric, score in found.metrics.items():
            name, comma, kind = metric.partition(",")
            if name.endswith("_stderr"):
                continue
            error = f"{name}_stderr{comma}{kind}"
            other = {} if dense is None else dense[task].metrics
            base = other.get(metric)
            kept = recovery(score, base) if base is not None and metric in found.rising else None
            rows.append(
                Score(
                    task, metric, score, base, kept, found.metrics.get(error), other.get(error),
                    found.examples, found.shots,
                )
            )  # fmt: skip
    return rows


def average(model: Mapping[str, TaskScores], dense: Mapping[str, TaskScores]) -> Score | None:
    """Mean scores over tasks, and the recovery of the mean: the ratio of both means, not the mean of the ratios.

    A task counts once, with `acc_norm` if it has it, otherwise with its first metric where higher is better. A task
    that is part of a group counts within the group. Scores above 1, such as BLEU's, are on another scale and do not
    count. None if no task is left.
    """
    chosen = {}
    for task, found in model.items():
        rising = [name for name in found.rising if max(found.metrics[name], dense[task].metrics[name]) <= 1]
        if rising and not found.in_group:
            chosen[task] = "acc_norm" if "acc_norm" in rising else rising[0]
    if not chosen:
        return None
    score, base = (
        sum(side[task].metrics[metric] for task, metric in chosen.items()) / len(chosen) for side in (model, dense)
    )
    tasks = f"mean of {len(chosen)} task{'s' if len(chosen) > 1 else ''}"
    return Score(tasks, ", ".join(dict.fromkeys(chosen.values())), score, base, recovery(score, base))


def cells(rows: Sequence[Score]) -> list[tuple[str, ...]]:
    """The rows of a table under TITLES."""
    found: list[tuple[str, ...]] = []
    for row in rows:
        shots = "" if row.shots is None else f", {row.shots}-shot"
        asked = "" if row.examples is None else f"{row.examples}{shots}"
        scores = _shown(row.score, row.error), _shown(row.dense, row.dense_error)
        percent = "" if row.recovery is None else f"{row.recovery:.1f}%"
        found.append((row.task, row.metric, asked, *scores, percent))
    return found


def _shown(score: float | None, error: float | None) -> str:
    if score is None:
        return ""
    return f"{score:.4f}" + ("" if error is None else f" ± {error:.4f}")


def comparison(rows: Sequence[Score], mean: Score | None, dense: Mapping[str, TaskScores], name: str) -> dict[str, Any]:
    """For --json: the baseline's scores, recovery in percent by task and metric, and of the mean."""
    kept: dict[str, dict[str, float]] = {task: {} for task in dense}
    for row in rows:
        if row.recovery is not None:
            kept[row.task][row.metric] = row.recovery
    means = mean and {"metrics": mean.metric, "score": mean.score, "baseline": mean.dense, "recovery": mean.recovery}
    baseline = {"model": name, "tasks": {task: found.metrics for task, found in dense.items()}}
    return {"baseline": baseline, "recovery": kept, "average": means}
