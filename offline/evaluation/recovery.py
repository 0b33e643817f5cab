"""How much of the dense model's task scores a pruned model keeps.

Recovery is score over score, in percent: a model with an accuracy of 0.45 whose dense model has 0.50 has recovered 90%.
Published 2:4 models state it in this way. The level of chance is not subtracted first, so a multiple-choice task with
four choices shows 50% for a model that guesses if the dense model has 0.50.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ria_vllm.offline.evaluation.tasks import TaskScores
from ria_vllm.task_card import Average, Score


def recovery(score: float, dense: float) -> float | None:
    """`score` in percent of `dense`; None where that means nothing."""
    return 100 * score / dense if math.isfinite(score) and math.isfinite(dense) and dense > 0 else None


def table(model: Mapping[str, TaskScores], dense: Mapping[str, TaskScores] | None) -> list[Score]:
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
                    task, metric, found.examples, found.shots, score, found.metrics.get(error),
                    base, other.get(error), kept,
                )
            )  # fmt: skip
    return rows


def average(model: Mapping[str, TaskScores], dense: Mapping[str, TaskScores]) -> Average | None:
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
    return Average(chosen, score, base, recovery(score, base))


def lines(rows: Sequence[Score], mean: Average | None) -> str:
    """For a terminal: a line for each metric, and one for the mean. Columns without an entry are left out."""
    cells = [("task", "metric", "examples", "model", "baseline", "recovery")]
    cells += [row.cells() for row in rows]
    if mean is not None:
        cells.append(mean.cells())
    columns = [column for column in zip(*cells, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    filled = zip(*columns, strict=True)
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in filled)


def comparison(model: Mapping[str, TaskScores], dense: Mapping[str, TaskScores], name: str) -> dict[str, Any]:
    """For --json: the baseline's scores, recovery in percent by task and metric, and of the mean."""
    kept: dict[str, dict[str, float]] = {task: {} for task in model}
    for row in table(model, dense):
        if row.recovery is not None:
            kept[row.task][row.metric] = row.recovery
    mean = average(model, dense)
    return {
        "baseline": {"model": name, "tasks": {task: found.metrics for task, found in dense.items()}},
        "recovery": kept,
        "average": None
        if mean is None
        else {
            "metrics": mean.metrics, "score": mean.score, "baseline": mean.dense, "recovery": mean.recovery,
        },
    }  # fmt: skip
