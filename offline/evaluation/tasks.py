"""Benchmark tasks through lm-evaluation-harness, an optional extra."""

import contextlib
import gc
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ria_vllm.errors import RiaError
from ria_vllm.offline.model.run.hf import load_model, load_tokenizer
from ria_vllm.progress import Monitor

BOOTSTRAP = 1000  # resamples for a standard error that has no formula; the harness's 100,000 take minutes


@dataclass(frozen=True)
class TaskScores:
    """What the harness says of one task, or of a group of tasks.

    Attributes:
        metrics: all its numbers, standard errors (`acc_stderr`) among them. "acc,none" is `acc` here; a metric of
            another filter keeps its name, such as `exact_match,strict-match`.
        rising: those of the metrics where the task says that higher is better, in the task's order.
        examples: how many were asked; None for a group.
        shots: examples in each prompt; None if a group's tasks differ.
        in_group: whether a group among the results already averages it.
    """

    metrics: dict[str, float]
    rising: tuple[str, ...] = ()
    examples: int | None = None
    shots: int | None = None
    in_group: bool = False


@dataclass(frozen=True)
class Harness:
    """What lm-evaluation-harness is to do.

    Attributes:
        tasks: by their names.
        limit: examples per task; None: all.
        folder: with tasks of the user's own, besides those of the harness.
        compute_dtype: see `load_model`.
    """

    tasks: list[str]
    limit: int | None = None
    device: torch.device = torch.device("cpu")
    folder: Path | None = None
    compute_dtype: str = "auto"


def run_tasks(
    model: str, harness: Harness, monitor: Monitor | None = None, words: str = "the model"
) -> dict[str, TaskScores]:
    """Run lm-evaluation-harness. On a terminal it draws bars of its own.

    Args:
        model: folder or hub id.
        monitor: not live yet.
        words: what progress calls the model.

    Returns:
        Scores by task, and by group if tasks of a group were asked for.

    Raises:
        RiaError: the harness is not installed, or knows no such task; or the model gives an answer NaN for likelihood.
    """
    monitor = monitor or Monitor(shown=False)
    with monitor.live(), monitor.phase("loading lm-evaluation-harness"):
        try:
            import lm_eval
            from lm_eval.models.huggingface import HFLM
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise RiaError(f"--tasks needs lm-evaluation-harness ({error}). Install it: pip install lm_eval") from None
        manager = TaskManager(include_path=None if harness.folder is None else str(harness.folder))
        unknown = [task for task in harness.tasks if not manager.match_tasks([task])]
        if unknown:
            raise RiaError(f"lm-evaluation-harness knows no task {', '.join(unknown)}. `lm_eval ls tasks` lists them.")
    with monitor.live(), monitor.phase(f"loading {words}"):
        loaded = load_model(model, harness.device, harness.compute_dtype)
    harness_model: Any = HFLM(pretrained=loaded, tokenizer=load_tokenizer(model))
    del loaded
    # Not live, because the harness has bars of its own. It also prints as it computes standard errors.
    with monitor.phase(f"tasks for {words}"), contextlib.redirect_stdout(sys.stderr):
        output = lm_eval.simple_evaluate(
            model=harness_model,
            tasks=harness.tasks,
            limit=harness.limit,
            task_manager=manager,
            bootstrap_iters=BOOTSTRAP,
        )
    assert output is not None  # only ranks other than the first get None
    refuse_nan(model, output.get("samples", {}))
    del harness_model
    gc.collect()  # the weights, before another model is loaded
    return scores(output)


def scores(output: Mapping[str, Any]) -> dict[str, TaskScores]:
    """The harness's output, without what it says of itself."""
    results = {task: numbers(entry) for task, entry in output["results"].items()}
    parts = output.get("group_subtasks", {})
    in_group = {task for group, tasks in parts.items() if results.get(group) for task in tasks}
    found = {}
    for task, metrics in results.items():
        higher = output.get("higher_is_better", {}).get(task, {})
        found[task] = TaskScores(
            metrics,
            tuple(metric for metric in metrics if higher.get(metric.split(",")[0]) is True),
            output.get("n-samples", {}).get(task, {}).get("effective"),
            output.get("n-shot", {}).get(task),
            task in in_group,
        )
    return found


def numbers(entry: Mapping[str, Any]) -> dict[str, float]:
    """The metrics in the harness's entry for a task; "acc,none" becomes "acc".

    Metrics have a filter's name after a comma. What has none, such as the task's alias or `sample_len`, is no metric.
    """
    return {
        key.removesuffix(",none"): float(value)
        for key, value in entry.items()
        if "," in key and isinstance(value, int | float) and not isinstance(value, bool)
    }


def refuse_nan(model: str, samples: Mapping[str, Any]) -> None:
    """An argmax over NaN is a number, so the accuracy of a broken model looks like any other.

    Raises:
        RiaError: a log-likelihood is NaN.
    """
    for task, examples in samples.items():
        for example in examples:
            if any(math.isnan(value) for value in _floats(example.get("filtered_resps"))):
                raise RiaError(
                    f"{model}: {task}, example {example.get('doc_id')}: the model's log-likelihood is NaN. Check the "
                    "folder with `ria-vllm verify`, or give --compute-dtype float32."
                )


def _floats(value: Any) -> Iterator[float]:
    if isinstance(value, float):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _floats(item)
