"""How good `compress` is on models that nobody tuned it on: `python -m benchmarks.defaults MODEL...`.

Compresses each model with each scheme, effort and seed, which also draws other samples. Then both models run in
transformers, as `ria-vllm eval` runs them, on each text. Prints a table of medians and ranges over the seeds, and keeps
every finished run in a JSON file, so that a second run of the same command continues.
"""

import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import click
import torch

from ria_vllm.errors import RiaError
from ria_vllm.format.pattern import SCHEMES
from ria_vllm.offline.commands import EFFORTS
from ria_vllm.offline.distill.divergence import divergence
from ria_vllm.offline.evaluation.evaluate import read_tokens
from ria_vllm.offline.model.run.hf import load_model
from ria_vllm.offline.recipe import Recipe
from ria_vllm.offline.run.compress import Settings, compress
from ria_vllm.progress import Monitor

WINDOW = 1024


@torch.inference_mode()
def compared(dense: Any, pruned: Any, texts: Iterable[tuple[torch.Tensor, int]]) -> dict[str, float]:
    """Of the tokens of texts: perplexities of both models, KL(dense || pruned) in nats, and how often both hold the
    same token for the likeliest.

    Args:
        texts: (tokens int64 [n], how many of the first are only read: at least one).
    """
    total, count = torch.zeros(4, dtype=torch.float64), 0
    for text, read in texts:
        logits = [model(text[None], use_cache=False).logits[0, read - 1 : -1] for model in (dense, pruned)]
        losses = [torch.nn.functional.cross_entropy(one.float(), text[read:], reduction="sum") for one in logits]
        same = (logits[0].argmax(-1) == logits[1].argmax(-1)).sum()
        total += torch.tensor([*losses, divergence(*logits).sum(), same], dtype=torch.float64)
        count += len(text) - read
    of_dense, of_pruned, kl, agreement = (total / count).tolist()
    return {"dense": math.exp(of_dense), "perplexity": math.exp(of_pruned), "kl": kl, "agreement": agreement}


def measure(model: str, recipe: Recipe, texts: dict[str, torch.Tensor]) -> dict[str, Any]:
    """`compared` for each text, name -> windows [n, tokens]; and the seconds on the processor that pruning took."""
    cpu = torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        report = compress(model, Path(folder) / "out", recipe, Settings(cpu), Monitor(shown=False))
        seconds = time.process_time() - start
        pruned = load_model(str(Path(folder) / "out"), cpu, "auto")
        dense = load_model(model, cpu, "auto")
        found = {name: compared(dense, pruned, ((one, 1) for one in windows)) for name, windows in texts.items()}
    trained = [record["trained"] for record in report["linears"].values() if "trained" in record]
    return {"texts": found, "seconds": seconds, "trained": [sum(trained), len(trained)]}


def spread(values: Iterable[float], digits: int) -> str:
    """ "median (least to most)"; of one value, just that."""
    ordered = sorted(values)
    middle = f"{statistics.median(ordered):.{digits}f}"
    return f"{middle} ({ordered[0]:.{digits}f} to {ordered[-1]:.{digits}f})" if ordered[1:] else middle


def row(model: str, scheme: str, effort: str, runs: Sequence[dict[str, Any]]) -> str:
    cells = [Path(model).name, scheme, effort]
    for name in runs[0]["texts"]:
        for key, digits in (("perplexity", 1), ("kl", 3)):
            cells.append(spread((run["texts"][name][key] for run in runs), digits))
    return f"| {' | '.join([*cells, spread((run['seconds'] for run in runs), 0)])} |"


@click.command(help=__doc__)
@click.argument("models", nargs=-1, required=True)
@click.option("--data", "calibration", required=True, help="As for `ria-vllm compress`.")
@click.option("--text", "paths", required=True, multiple=True, type=click.Path(path_type=Path), help="To measure on.")
@click.option("--scheme", "schemes", multiple=True, default=("BF16", "W8A8", "W4A8"), show_default=True)
@click.option("--effort", "efforts", multiple=True, default=("fast", "default"), show_default=True)
@click.option("--seeds", default=3, show_default=True)
@click.option("--samples", default=16, show_default=True)
@click.option("--windows", default=8, show_default=True, help=f"Of {WINDOW} tokens, from the start of each text.")
@click.option("--results", type=click.Path(path_type=Path), default="defaults.json", show_default=True)
def main(
    models: Sequence[str], paths: Sequence[Path], schemes: Sequence[str], efforts: Sequence[str], seeds: int,
    windows: int, results: Path, **common: Any,
) -> None:  # fmt: skip
    known = json.loads(results.read_text()) if results.exists() else {}
    titles = [f"{path.stem}: {what}" for path in paths for what in ("perplexity", "KL")]
    click.echo(f"| model | scheme | effort | {' | '.join(titles)} | CPU seconds |\n{'| --- ' * (4 + len(titles))}|")
    for model in models:
        texts = {path.stem: read_tokens(model, path, windows * WINDOW) for path in paths}
        if short := [name for name, tokens in texts.items() if len(tokens) < windows * WINDOW]:
            raise RiaError(f"{short[0]}: fewer than --windows {windows} windows of {WINDOW} tokens.")
        texts = {name: tokens.view(-1, WINDOW) for name, tokens in texts.items()}
        for scheme in schemes:
            for effort in efforts:
                options = EFFORTS[effort] | SCHEMES[scheme] | common | {"seq_len": 512}
                runs = []
                for seed in range(seeds):
                    recipe = Recipe.of_options(options | {"seed": seed})
                    key = json.dumps([recipe.dump(model), [str(path) for path in paths], windows], sort_keys=True)
                    if key not in known:
                        known[key] = measure(model, recipe, texts)
                        results.write_text(json.dumps(known, indent=2) + "\n")
                    runs.append(known[key])
                click.echo(row(model, scheme, effort, runs))


if __name__ == "__main__":
    main()
