"""`ria-vllm plan`: what `compress` would make of a model here, and what it would take."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import click
import torch

from ria_vllm.errors import printable
from ria_vllm.files.sizes import human_size
from ria_vllm.format.pattern import PATTERNS, SCHEMES, TWO_OF_FOUR
from ria_vllm.offline.calibration.embed import embed
from ria_vllm.offline.commands import EFFORTS
from ria_vllm.offline.distill.best import obstacle
from ria_vllm.offline.model.headers import without_weights
from ria_vllm.offline.model.run.architecture import text_config
from ria_vllm.offline.model.run.streaming import StreamedModel
from ria_vllm.offline.model.source import opened
from ria_vllm.offline.model.topology import Topologies
from ria_vllm.offline.recipe import Recipe
from ria_vllm.offline.run import forecast
from ria_vllm.offline.run.kept import find_kept, keeping
from ria_vllm.offline.run.plan import Kept, Plan, make_plan, widths
from ria_vllm.offline.runtime import options
from ria_vllm.offline.runtime.device import choose_device
from ria_vllm.progress import Monitor
from ria_vllm.speed import EIGHT_BRINGS, eight_here, expected, measured_here, served_by
from ria_vllm.terminal import print_table


@click.command()
@click.argument("model")
@options.scheme
@options.pattern
@options.device
def plan(model: str, scheme: str, pattern: str, device: str) -> None:
    """Say what `compress` would make of MODEL here, how long it would take, and how fast the result should be served.

    MODEL is a Hugging Face folder or a hub id, of which only config.json and the headers of the weight files are
    fetched. Times, memory and speed are estimates.
    """
    monitor, place, is_here = Monitor(), choose_device(device), Path(model).is_dir()
    with torch.no_grad(), monitor.live(), without_weights(model) as folder:
        source = opened(str(folder), monitor)
        streamed = StreamedModel(source.folder, source.config, place)
        longest = getattr(text_config(source.config), "max_position_embeddings", None)
        words = SCHEMES[scheme] | EFFORTS["default"] | {"pattern": PATTERNS[pattern]}
        recipe = Recipe.of_options(words).within(longest)
        kept = find_kept(streamed, recipe, monitor) if is_here else Kept()
        recipe = keeping(recipe.fitting(widths(streamed, recipe)), kept, monitor)
        still = replace(recipe, smooth=0.0, rotate="none")  # what scales and heads allow is nothing that is said
        topologies = embed(streamed, still, torch.zeros(1, recipe.seq_len).long(), monitor).topologies
        found = make_plan(streamed, topologies, recipe, kept)
        sizes, dense, size = forecast.sizes_of(streamed, found, recipe)
        kernel, _ = served_by(scheme, recipe.pattern, streamed.stored_dtype, place)
        lacking, rows = obstacle(streamed), []
        for effort, chosen in EFFORTS.items():
            asked = replace(recipe, **chosen).within(longest)
            asked = asked.keeping() if recipe.only_keeps else asked
            writing = forecast.writing_seconds(streamed, asked)
            seconds, peak = writing + forecast.pruning_seconds(streamed, asked), forecast.peak_bytes(streamed, asked)
            if effort == "best" and not recipe.only_keeps and lacking is None:
                seconds += forecast.distilling_seconds(streamed, asked)
                peak = max(peak, forecast.distilling_bytes(streamed))
            times = (forecast.about(seconds), forecast.about(writing)) if asked.reads_text else ("that of copying", "")
            rows.append((effort, *times, human_size(round(peak))))
    for warning in found.warnings:
        monitor.warn(warning)
    click.echo(f"model:   {printable(model)}, {human_size(dense)}")
    _say_linears(topologies, found)
    if not is_here:
        click.echo(
            "         Headers do not tell whether linears are sparse already: such ones keep their zeros, in less time"
        )
    fetched = "" if is_here else f", and {human_size(dense)} to fetch the model"
    click.echo(f"result:  {scheme}, {human_size(size)}; twice that on the disk while it is written{fetched}")
    click.echo(f"kernel:  {kernel}")
    speed = expected(sizes, scheme, measured_here(scheme, recipe.pattern, streamed.stored_dtype, place))
    eight = eight_here(scheme, recipe.pattern, streamed.stored_dtype, place)
    if recipe.pattern != TWO_OF_FOUR:
        speed = eight
    click.echo(f"tokens/s {speed or f'unknown: {pattern} in {scheme} was not measured on such a device'}")
    if eight and recipe.pattern == TWO_OF_FOUR and not recipe.only_keeps:
        click.echo(f"8:16:    {EIGHT_BRINGS}; {eight}")
    whole = human_size(round(forecast.LIBRARIES + forecast.weights_of(streamed) * streamed.dtype.itemsize))
    click.echo(f"text:    written by the model itself, the default, it takes {whole} of memory; a file saves that")
    if lacking is not None:
        click.echo(f"best:    would not be distilled here, because {lacking}")
    print_table(("--effort", "time", "of it, calibration text", "memory"), rows)


def _say_linears(topologies: Topologies, found: Plan) -> None:
    """Which linears are pruned and what becomes of their permutations; which stay dense, by reason."""
    count = sum(map(len, found.pruned.values()))
    folded = sum(
        {fold.consumer, *(producer.name for producer in fold.producers)} <= names
        for index, names in found.pruned.items()
        for fold in topologies.of(index).folds
    )
    experts = sum(map(len, found.experts.values()))
    also = f", and the experts of {experts} layers" if experts else ""
    click.echo(f"pruned:  {count} linears{also}; the permutations of {folded} fold into linears before them")
    for why, names in Counter(found.dense.values()).items():
        first = next(name for name, reason in found.dense.items() if reason == why)
        click.echo(f"dense:   {printable(first)}{f' and {names - 1} more' if names > 1 else ''}: {printable(why)}")
