"""Benchmark tasks through lm-evaluation-harness, an optional extra."""

import os
from pathlib import Path
from typing import Any

import torch

from ria_vllm.errors import RiaError
from ria_vllm.offline.model.hf import load_model, load_tokenizer


def run_tasks(
    model: str,
    tasks: list[str],
    engine: str,
    limit: int | None,
    device: torch.device,
    folder: Path | None = None,
    compute_dtype: str = "auto",
) -> dict[str, Any]:
    """Run lm-evaluation-harness.

    Args:
        model: folder or hub id. The engine `hf` decompresses a compressed folder, `vllm` serves it as it is.
        limit: examples per task; None: all.
        folder: with tasks of the user's own, besides those of the harness.
        compute_dtype: for the engine `hf`; see `load_model`.

    Returns:
        {"model", "engine", "tasks": {task: {metric: number}}}.

    Raises:
        RiaError: the harness is not installed, or knows no such task.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise RiaError(f"--tasks needs lm-evaluation-harness ({error}). Install it: pip install lm_eval") from None
    manager = TaskManager(include_path=None if folder is None else str(folder))
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise RiaError(f"lm-evaluation-harness knows no task {', '.join(unknown)}. `lm_eval ls tasks` lists them.")
    if engine == "vllm":
        os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # standard output is for the results
        harness_model: Any = "vllm"
        arguments = {"pretrained": model}
    else:
        harness_model = HFLM(pretrained=load_model(model, device, compute_dtype), tokenizer=load_tokenizer(model))
        arguments = {}
    output = lm_eval.simple_evaluate(
        model=harness_model, model_args=arguments, tasks=tasks, limit=limit, task_manager=manager
    )
    return {"model": model, "engine": engine, "tasks": {t: numbers(m) for t, m in output["results"].items()}}


def numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """The harness's metrics without its text fields; "acc,none" becomes "acc"."""
    return {
        key.removesuffix(",none"): float(value)
        for key, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
