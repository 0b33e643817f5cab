"""`--effort best`: prune, and then train the whole pruned model towards the dense one."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ria_vllm.checkpoint.reader import is_compressed
from ria_vllm.checkpoint.writer import check_free, delete
from ria_vllm.offline.distill import run as distillation
from ria_vllm.offline.distill.recipe import Distillation
from ria_vllm.offline.model.run.architecture import output_head
from ria_vllm.offline.model.run.streaming import StreamedModel
from ria_vllm.offline.model.source import opened
from ria_vllm.offline.recipe import Recipe
from ria_vllm.offline.run import forecast
from ria_vllm.offline.run.compress import Settings, compress
from ria_vllm.offline.run.kept import find_kept
from ria_vllm.offline.runtime.memory import available, blocks_kept
from ria_vllm.offline.runtime.ranks import Ranks
from ria_vllm.progress import Monitor


def prune_and_distill(model: str, out: Path, recipe: Recipe, settings: Settings, monitor: Monitor) -> dict[str, Any]:
    """Compress `model` into `OUT.pruned`, and distil that into `out`; or only compress, and say why.

    Returns:
        The report, as written to `out`.

    Raises:
        RiaError: see `compress` and `distill`. `OUT.pruned` is whole or absent, and `resume` continues from it.
    """
    pruned = out.with_name(f"{out.name}.pruned")
    finished = settings.resume and is_compressed(out)
    if not finished:
        check_free(out, settings.overwrite)
        if (why := _obstacle(model, recipe, settings.device, monitor)) is not None:
            monitor.warn(f"--effort best: the pruned model will not be distilled, because {why}")
    if finished or why is not None:
        return compress(model, out, recipe, settings, monitor)
    compress(model, pruned, recipe, replace(settings, overwrite=True), monitor)
    own = 0.0 if recipe.calibration == "self" else 0.5
    dtype = "auto" if recipe.compute_dtype == "float16" else recipe.compute_dtype
    how = Distillation(
        tokens=forecast.DISTILLED, text=recipe.calibration, self_written=own, compute_dtype=dtype, seed=recipe.seed
    )
    training = distillation.Settings(
        settings.device,
        max_shard_size=settings.max_shard_size,
        overwrite=settings.overwrite,
        resume=settings.resume,
    )
    with blocks_kept():
        report = distillation.distill(pruned, model, out, how, training, monitor)
    delete(pruned)
    return report


def _obstacle(model: str, recipe: Recipe, device: torch.device, monitor: Monitor) -> str | None:
    """Why the pruned model cannot be distilled here, or None.

    Raises:
        RiaError: the model cannot be compressed.
    """
    with torch.no_grad(), monitor.live():
        source = opened(model, Ranks(), monitor)
        streamed = StreamedModel(source.folder, source.config, device)
        if output_head(streamed.model) is None:
            return "it predicts no tokens."
        needed, free = forecast.distilling_bytes(streamed), available(device)
        if free is not None and needed > free:
            return (
                f"that takes about {needed / 1e9:.0f} GB, and {free / 1e9:.0f} GB of memory are free ({device}). "
                "`ria-vllm distill` does it where there is more."
            )
        if any(find_kept(streamed, recipe, monitor).names.values()):
            return f"it has linears that are {recipe.pattern} already."
    return None
