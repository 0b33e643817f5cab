"""What each way of pruning costs in perplexity and in time: `python -m benchmarks.quality MODEL`.

A WAY is a set of options of `ria-vllm compress` without their dashes, such as "method=wanda permute=none
reconstruct=admm"; other options have their defaults. Prints a table, and keeps every finished row in a JSON file, so
that a second run of the same command continues.
"""

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import torch

from ria_vllm.errors import RiaError
from ria_vllm.offline.evaluation.evaluate import perplexity, read_tokens
from ria_vllm.offline.model.run.hf import load_model
from ria_vllm.offline.recipe import Recipe
from ria_vllm.offline.run.compress import Settings, compress
from ria_vllm.offline.runtime.device import choose_device
from ria_vllm.progress import Monitor

WAYS = tuple(
    f"method={method} permute={permute} reconstruct={reconstruct}"
    for reconstruct in ("none", "admm")
    for permute in ("none", "lsa")
    for method in ("magnitude", "wanda", "ria")
)


def options_of(way: str) -> dict[str, Any]:
    """ "samples=32 method=ria" as keywords of `Recipe`."""
    options: dict[str, Any] = {}
    for entry in way.split():
        name, separator, value = entry.partition("=")
        if not separator or name not in Recipe.__dataclass_fields__:
            raise RiaError(f"{entry!r} in {way!r}: write NAME=VALUE, where NAME is an option of `ria-vllm compress`.")
        options[name] = json.loads(value) if value[:1].isdigit() else value
    return options


def measure(model: str, recipe: Recipe, tokens: torch.Tensor, window: int, device: torch.device) -> dict[str, Any]:
    """The pruned model's perplexity and bytes, and the seconds that pruning took: wall clock, processor, by phase."""
    monitor = Monitor(shown=False)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        start, start_on_cpu = time.perf_counter(), time.process_time()
        report = compress(model, out, recipe, Settings(device), monitor)
        seconds, on_cpu = time.perf_counter() - start, time.process_time() - start_on_cpu
        found = perplexity(load_model(str(out), device, "auto"), tokens, window)
        size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    kept = [record["retained_after"] for record in report["linears"].values()]
    return {
        "perplexity": found.perplexity,
        "seconds": seconds,
        "processor_seconds": on_cpu,
        "phases": monitor.seconds,
        "retained": sum(kept) / len(kept),
        "bytes": size,
    }


def row(way: str, found: dict[str, Any]) -> str:
    passes = found["phases"].get("calibration passes", 0.0) / found["seconds"]
    measured, size = f"{found['perplexity']:.1f}", f"{found['bytes'] / 1e6:.0f} MB"
    return " | ".join(("", f"`{way}`", measured, f"{found['seconds']:.0f} s", f"{passes:.0%}", size, "")).strip()


@click.command(help=__doc__)
@click.argument("model")
@click.argument("ways", nargs=-1)
@click.option("--data", "calibration", required=True, help="As for `ria-vllm compress`.")
@click.option("--text", required=True, type=click.Path(path_type=Path), help="Text file to measure perplexity on.")
@click.option("--samples", default=32, show_default=True)
@click.option("--seq-len", default=512, show_default=True)
@click.option("--windows", default=24, show_default=True, help="Number of windows of 1024 tokens of the text.")
@click.option("--device", default="auto", show_default=True)
@click.option("--results", type=click.Path(path_type=Path), default="quality.json", show_default=True)
def main(
    model: str, ways: tuple[str, ...], text: Path, windows: int, device: str, results: Path, **common: Any
) -> None:
    place = choose_device(device)
    tokens = read_tokens(model, text, windows * 1024)
    known = json.loads(results.read_text()) if results.exists() else {}
    recipes = {way: Recipe.of_options(common | options_of(way)) for way in ways or WAYS}
    click.echo("| options | perplexity | time | calibration passes | weights |\n| --- | --- | --- | --- | --- |")
    for way, recipe in recipes.items():
        measured = {"text": str(text), "windows": windows}
        key = json.dumps(recipe.dump(model) | measured, sort_keys=True)
        if key not in known:
            known[key] = measure(model, recipe, tokens, 1024, place)
            results.write_text(json.dumps(known, indent=2) + "\n")
        click.echo(row(way, known[key]))


if __name__ == "__main__":
    main()
