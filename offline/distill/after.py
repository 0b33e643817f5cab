"""`ria-vllm compress --distill`: a compression, and a distillation of what it has written."""

import json
import os
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from ria_vllm.errors import RiaError
from ria_vllm.inputs import ChangedInput, Inputs
from ria_vllm.json_file import read_json
from ria_vllm.offline.distill.checks import check_texts, context_of, fitting, warn_of_trained_texts
from ria_vllm.offline.distill.outline import outline
from ria_vllm.offline.distill.processes import check_launch
from ria_vllm.offline.distill.recipe import Distillation
from ria_vllm.offline.distill.run import Settings, distill, texts_of
from ria_vllm.offline.distill.text import TrainingText, held_out_texts, training_text
from ria_vllm.offline.model.hf import load_tokenizer, text_tokenizer
from ria_vllm.offline.model.source import opened
from ria_vllm.offline.recipe import Recipe
from ria_vllm.offline.runtime.ranks import Ranks
from ria_vllm.offline.work import check_same_run, fingerprint
from ria_vllm.progress import Monitor
from ria_vllm.writer import (
    LOCK_FILE,
    check_free,
    check_place,
    delete,
    delete_locked,
    disk_errors,
    is_free,
    locked,
    write_whole,
)

# In the folder OUT.pruned: which compression it is for, and what that writes.
RUN_FILE, MODEL_FOLDER, WORK_FOLDER = "ria_vllm_run.json", "model", "model.partial"


def compress_and_distill(
    compress: Callable[[Path, Inputs], Any],
    model: str,
    out: Path,
    recipe: Recipe,
    distillation: Distillation,
    settings: Settings,
    monitor: Monitor,
) -> dict[str, Any]:
    """Prune into the folder OUT.pruned, distil what is there into `out`, and delete it.

    Args:
        compress: writes the pruned folder, unless the inputs have changed; it continues an interrupted run if there is
            one.
        model: the dense model, a folder or hub id.
        recipe: what `compress` follows.

    Returns:
        The report, as written to `out`.

    Raises:
        RiaError: see `compress` and `distill`; or the two cannot follow each other, or another process uses OUT.pruned.
    """
    if not recipe.served:
        raise RiaError(f"--distill is for the pattern 2:4; {recipe.pattern} is written as plain dense weights.")
    if Path(model).is_file():
        raise RiaError(f"--distill: the teacher must be a Hugging Face folder or hub id, not {model}.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RiaError("--distill runs in one process. Compress first, then start `ria-vllm distill` with torchrun.")
    check_launch()
    check_texts(out, distillation)
    warn_of_trained_texts(distillation, monitor)
    check_free(out, settings.overwrite)
    check_place(out, Path(model))
    place = out.with_name(out.name + ".pruned")
    check_place(place, Path(model))
    _check_ours(place)
    pruned = place / MODEL_FOLDER
    # What was pruned before has passed the checks of the text, and training may have drawn from it already.
    draw = distillation.text != "self" and not (settings.resume and pruned.exists())
    inputs = Inputs(*texts_of(distillation))  # of both parts: that of the second must be that of the first
    run, drawn = _checked_run(model, out, recipe, distillation, draw, monitor, inputs)
    with _begun(place, run, settings.resume) as lock:
        try:
            if not pruned.exists():
                compress(pruned, inputs)
        except RiaError:
            if not (place / WORK_FOLDER).exists():
                _delete(place, lock, monitor)
            raise
        try:
            report = distill(pruned, model, out, distillation, settings, monitor, drawn, inputs)
        except ChangedInput:
            raise
        except RiaError as error:
            raise RiaError(f"{error} {_ways_on(pruned, model, out, distillation)}") from error.__cause__
        _delete(place, lock, monitor)
    return report


def _ways_on(pruned: Path, model: str, out: Path, distillation: Distillation) -> str:
    """How to go on after an error in training, whose own advice is for `ria-vllm distill`."""
    folders = [str(pruned), "--teacher", model, "-o", str(out), *(["--overwrite"] if out.exists() else [])]
    same = ["--tokens", str(distillation.tokens), "--seq-len", str(distillation.seq_len)]
    same += ["--seed", str(distillation.seed), "--compute-dtype", distillation.compute_dtype]
    same += [] if distillation.text == "self" else ["--calibration", distillation.text]
    same += ["--self-written", str(distillation.self_written)] if distillation.self_written else []
    same += [part for path in distillation.eval_text for part in ("--eval-text", path)]
    command = shlex.join(["ria-vllm", "distill", *folders, *same])
    return (
        f"The pruned model is kept in {pruned}: --resume with the same options does not prune again, but `compress` "
        f"without --resume does. To train with other options, such as --lr, use `{command}`."
    )


def _checked_run(
    model: str,
    out: Path,
    recipe: Recipe,
    distillation: Distillation,
    draw: bool,
    monitor: Monitor,
    inputs: Inputs,
) -> tuple[dict[str, Any], TrainingText | None]:
    """What the pruned model depends on, and what to train on (None without `draw`).

    What only training would stumble over is refused before anything is pruned.
    """
    with inputs.watched(), opened(model, out.parent, Ranks(), monitor, inputs) as source:
        outline(str(source.folder))
        drawn, longest = None, context_of([str(source.folder)])
        held_out_texts(distillation, load_tokenizer(str(source.folder)), longest)
        if draw:
            fitted = fitting(distillation, (str(source.folder),), monitor)
            calibrated = recipe.within(longest).dump(model)
            drawn = training_text(fitted, text_tokenizer(source.folder), calibrated, monitor, "--distill")
        return fingerprint(recipe, source), drawn


def _check_ours(place: Path) -> None:
    if place.is_symlink() or not is_free(place, RUN_FILE):
        raise RiaError(
            f"{place}: needed for the pruned model, but it holds something else. Move it away, or choose another --out."
        )


@contextmanager
def _begun(place: Path, run: dict[str, Any], resume: bool) -> Iterator[IO[bytes]]:
    """Make the folder, or check that what is there is from the same command; and keep other processes out of it, also
    while `distill` reads what was pruned.

    Yields:
        What keeps them out, until it is closed.

    Raises:
        RiaError: another process has the folder, or another command has begun it.
    """
    with disk_errors(place):
        lock = locked(place)
    with lock:
        if begun := read_json(place / RUN_FILE) if (place / RUN_FILE).exists() and resume else {}:
            check_same_run(place, begun, run)
        else:
            with disk_errors(place):
                _delete_models(place)
                write_whole(place / RUN_FILE, json.dumps(run))
        yield lock


def _delete(place: Path, lock: IO[bytes], monitor: Monitor) -> None:
    """Delete the folder, last of all what says that it is ours; with a warning if something stays in it."""
    try:
        _delete_models(place)
        (place / RUN_FILE).unlink(missing_ok=True)
        if left := sorted(path.name for path in place.iterdir() if path.name != LOCK_FILE):
            monitor.warn(f"{place}: stays, because it also holds what ria-vllm did not write: {', '.join(left)}.")
        delete_locked(place, lock)
    except OSError as error:
        monitor.warn(f"{place}: cannot be deleted ({error.strerror or error}). It is no longer needed.")


def _delete_models(place: Path) -> None:
    for name in (MODEL_FOLDER, WORK_FOLDER):
        delete(place / name)
