"""`--effort best`: prune, and then train the whole pruned model towards the dense one."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ria_vllm.checkpoint.inputs import ChangedInput
from ria_vllm.checkpoint.writer import check_free, check_place, delete, disk_errors, put_in_place
from ria_vllm.errors import RiaError
from ria_vllm.offline.distill import run as distillation
from ria_vllm.offline.distill.recipe import Distillation
from ria_vllm.offline.distill.text import context_of, held_out_texts, training_text
from ria_vllm.offline.model.run.architecture import output_head
from ria_vllm.offline.model.run.dtypes import choose_dtype
from ria_vllm.offline.model.run.hf import text_tokenizer
from ria_vllm.offline.model.run.streaming import StreamedModel, stored_dtype
from ria_vllm.offline.model.source import opened
from ria_vllm.offline.recipe import Recipe
from ria_vllm.offline.run import forecast
from ria_vllm.offline.run.compress import Settings, compress
from ria_vllm.offline.run.kept import find_kept
from ria_vllm.offline.run.work import HALF_FILE, begun_run
from ria_vllm.offline.runtime.memory import available, blocks_kept
from ria_vllm.progress import Monitor


def of_best(recipe: Recipe) -> Distillation:
    """How `--effort best` trains what this recipe prunes."""
    own = 0.0 if recipe.calibration == "self" else forecast.OWN
    dtype = "auto" if recipe.compute_dtype == "float16" else recipe.compute_dtype
    held_out = () if recipe.eval_text is None else (recipe.eval_text,)
    return Distillation(
        tokens=forecast.DISTILLED, text=recipe.calibration, self_written=own, eval_text=held_out, compute_dtype=dtype,
        seed=recipe.seed,
    )  # fmt: skip


def repeated(saved: dict[str, Any], before: Recipe, now: Recipe) -> Distillation | None:
    """How to train as a folder of `--effort best` was; None if that was trained in another way.

    Args:
        saved: the recipe of its report, which may say anything.
        before, now: what that says of pruning, and the same with what is given beside it.
    """
    runs, own = saved.get("distill"), of_best(before).model_dump(mode="json")
    run = runs[0] if isinstance(runs, list) and len(runs) == 1 and isinstance(runs[0], dict) else {}
    chosen = {key: run.get(key) for key in ("seq_len", "compute_dtype")}  # for that model
    if run | own | chosen | {"teacher": saved.get("source"), "text": Path(before.calibration).name} != run:
        return None
    if now.compute_dtype != before.compute_dtype:
        del chosen["compute_dtype"]
    return of_best(now).with_options(**chosen)


def prune_and_distill(
    model: str, out: Path, recipe: Recipe, how: Distillation, settings: Settings, monitor: Monitor
) -> dict[str, Any]:
    """Compress `model` into `OUT.pruned`, and distil that into `out` as `how` says; or only compress, and say why.

    A resumed run does what was begun, however much memory is free now.

    Returns:
        The report, as written to `out`.

    Raises:
        RiaError: see `compress` and `distill`. `OUT.pruned` is whole or absent, and `resume` continues from it.
    """
    check_place(out, Path(model))
    check_free(out, settings.overwrite)
    pruned = out.with_name(f"{out.name}.pruned")
    if pruned.exists() and not (pruned / HALF_FILE).is_file():
        raise RiaError(f"{pruned}: needed for the pruned model, but it holds something else. Move it away.")
    distils = settings.resume and bool(pruned.exists() or begun_run(pruned))
    if not distils and not (settings.resume and begun_run(out)):  # nothing says what was begun
        why = _obstacle(model, recipe, how, settings.device, monitor)
        distils = why is None
        if not distils:
            monitor.warn(f"--effort best: the pruned model will not be distilled, because {why}")
    if not distils:
        return compress(model, out, recipe, settings, monitor)
    report = compress(model, pruned, recipe, replace(settings, overwrite=True, is_half=True), monitor)
    if not report["linears"]:
        monitor.warn("--effort best: the pruned model will not be distilled, because nothing in it is pruned.")
        check_free(out, settings.overwrite)
        replaced = out.with_name(f"{out.name}.replaced")
        with disk_errors(out):
            (pruned / HALF_FILE).unlink()
            put_in_place(pruned, out, replaced)
            delete(replaced)
        return report
    training = distillation.Settings(
        settings.device,
        max_shard_size=settings.max_shard_size,
        overwrite=settings.overwrite,
        resume=settings.resume,
    )
    try:
        with blocks_kept():
            report = distillation.distill(pruned, model, out, how, training, monitor)
    except ChangedInput:
        raise
    except RiaError as error:
        way = f"The pruned model is whole: {pruned}. `ria-vllm distill` trains it with other options."
        raise RiaError(f"{error} {way}") from error.__cause__
    delete(pruned)
    return report


def obstacle(model: StreamedModel) -> str | None:
    """Why a pruned model of this kind and size cannot be distilled where it runs, or None."""
    if output_head(model.model) is None:
        return "it predicts no tokens."
    needed, free = forecast.distilling_bytes(model), available(model.device)
    if free is None or needed <= free:
        return None
    return (
        f"that takes about {needed / 1e9:.0f} GB, and {free / 1e9:.0f} GB of memory are free ({model.device}). "
        "`ria-vllm distill` does it where there is more."
    )


def _obstacle(model: str, recipe: Recipe, how: Distillation, device: torch.device, monitor: Monitor) -> str | None:
    """The same of a model that is still to be opened, and that may have the pattern already.

    Raises:
        RiaError: the model cannot be compressed, or there is too little text.
    """
    with torch.no_grad(), monitor.live():
        source = opened(model, monitor)
        dtype = choose_dtype(stored_dtype(source.folder, source.config), device, how.compute_dtype, training=True)
        streamed = StreamedModel(source.folder, source.config, device, dtype)
        if (why := obstacle(streamed)) is not None:
            return why
        if any(find_kept(streamed, recipe, monitor).names.values()):
            return f"it has linears that are {recipe.pattern} already."
        # That text does not suffice must not be found out after hours.
        if how.eval_text:
            held_out_texts(how, text_tokenizer(source.folder), context_of([str(source.folder)]))
        if how.text != "self":
            try:
                training_text(how, text_tokenizer(source.folder), monitor)
            except RiaError as error:
                raise RiaError(
                    f"--effort best distils on {how.tokens} tokens: {error} `--reconstruct block --samples 128 "
                    "--seq-len 1024` does all but that."
                ) from error.__cause__
    return None
