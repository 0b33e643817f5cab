"""`ria-vllm compress --distill`: a compression, and a distillation of what it has written."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ria_vllm.checkpoint import Reader
from ria_vllm.errors import RiaError
from ria_vllm.offline.distill.recipe import Distillation
from ria_vllm.offline.distill.run import Settings, distill
from ria_vllm.offline.recipe import Recipe
from ria_vllm.progress import Monitor


def compress_and_distill(
    compress: Callable[[Path], Any],
    model: str,
    out: Path,
    recipe: Recipe,
    distillation: Distillation,
    settings: Settings,
    monitor: Monitor,
) -> dict[str, Any]:
    """Write the pruned folder beside `out`, distil it into `out`, and delete it.

    Args:
        compress: writes the pruned folder.
        model: the dense model, a folder or hub id.
        recipe: what `compress` follows.

    Returns:
        The report, as written to `out`.

    Raises:
        RiaError: see `compress` and `distill`; or the two cannot follow each other.
    """
    if not recipe.served:
        raise RiaError(f"--distill is for the pattern 2:4; {recipe.pattern} is written as plain dense weights.")
    if Path(model).is_file():
        raise RiaError(f"--distill: the teacher must be a Hugging Face folder or hub id, not {model}.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RiaError("--distill runs in one process. Compress first, then start `ria-vllm distill` with torchrun.")
    if (out.exists() or out.is_symlink()) and not settings.overwrite:
        raise RiaError(f"{out}: exists already. Choose another folder, or give --overwrite.")
    pruned = out.with_name(out.name + ".pruned")
    if pruned.exists() and settings.resume:
        _check_recipe(pruned, recipe, model)
    else:
        compress(pruned)
    report = distill(pruned, model, out, distillation, settings, monitor)
    shutil.rmtree(pruned)
    return report


def _check_recipe(pruned: Path, recipe: Recipe, model: str) -> None:
    """Check that an earlier command has pruned as this one asks for."""
    found, asked = Reader(pruned).schema.recipe, recipe.dump(model)
    for key in ("compute_dtype", "seq_len"):  # these depend on the machine, and on the model's context
        asked.pop(key, None)
    differing = next((key for key in asked if found.get(key) != asked[key]), None)
    if differing is not None:
        raise RiaError(
            f"--resume: {pruned} is from a run with another {differing.replace('_', '-')}. Give the same one, or leave "
            "out --resume."
        )
