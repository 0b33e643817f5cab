"""`ria-vllm compress`."""

import json
import os
from pathlib import Path
from typing import Any

import click

from ria_vllm.errors import RiaError
from ria_vllm.offline.runtime import options as shared


@click.command()
@click.argument("model")
@shared.out
@click.option("--method", default="ria", show_default=True, help="Score: ria, ri, wanda, magnitude; or sparsegpt.")
@click.option("--exponent", default=0.5, show_default=True, help="Exponent of the input norms in RIA.")
@click.option("--permute", default="lsa", show_default=True, help="Channel permutation: lsa, heuristic or none.")
@click.option(
    "--permute-scope",
    default="shared",
    show_default=True,
    help="shared: one order for q, k, v and one for gate, up. linear: each its own; better, but slower to serve.",
)
@click.option(
    "--calibration",
    default="self",
    show_default=True,
    help="A .txt, .jsonl or .parquet file (field text; in .jsonl also messages), c4, wikitext2 or pile from the hub, "
    "or self: text that the dense model writes itself, for which the whole model has to fit into memory.",
)
@click.option(
    "--self-written",
    default=0.0,
    show_default=True,
    help="Fraction of the sequences that the dense model writes itself; the others are of --calibration.",
)
@click.option("--samples", default=128, show_default=True, help="Number of calibration sequences.")
@click.option("--seq-len", default=2048, show_default=True, help="Tokens in each; at most the model's context.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="For all random choices.")
@click.option(
    "--reconstruct",
    default="short",
    show_default=True,
    help="How kept weights are updated: none; admm; short: admm, and then a short training of each layer, but not of "
    "experts; or block: a longer training of all (best, but slow). Linears are rounded to integers after that.",
)
@click.option(
    "--weights",
    default="float",
    show_default=True,
    help="float: in the model's own dtype. int8, int4: integers, about 5 and 3 bits a weight instead of 9.",
)
@click.option(
    "--group-size",
    type=click.Choice(["128", "64", "32", "row"]),
    show_default="row for int8; for int4 128 if that fits 8 tensor-parallel ranks, else 64",
    help="Columns of an integer weight that share a scale. Smaller groups are more exact: 16/SIZE bits a weight more.",
)
@click.option(
    "--activations",
    type=click.Choice(["none", "int8"]),
    default="none",
    show_default=True,
    help="int8: linears with integer weights also round their inputs, with a scale for each token.",
)
@click.option(
    "--smooth",
    type=float,
    metavar="STRENGTH",
    show_default="0.5 for int8 weights with rounded inputs",
    help="Migrate outliers of inputs into the weights, as SmoothQuant does, by this strength; 0: do not.",
)
@click.option(
    "--rotate",
    type=click.Choice(["none", "heads"]),
    show_default="heads with --reconstruct short and block, else none",
    help="heads: first turn the channels of attention's heads, in v and o, so that pruning loses less. vLLM then turns "
    "adapters (LoRA) of the dense model, too; none, if you want to use them elsewhere.",
)
@click.option("--ignore", multiple=True, metavar="REGEX", help="Keep linears with a matching name dense. Repeatable.")
@shared.device
@click.option(
    "--compute-dtype",
    default="auto",
    show_default=True,
    help="The dtype to compute in: auto, bfloat16, float32 or float16. auto: the model's own, unless the device "
    "computes slowly in it; then float32. Weights are always written in the model's own.",
)
@click.option(
    "--activation-cache",
    type=click.Choice(["cpu", "disk"]),
    default="cpu",
    show_default=True,
    help="Where calibration activations are kept.",
)
@shared.max_shard_size
@shared.overwrite
@shared.resume
@click.option("--timings", type=click.Path(path_type=Path), help="Also write the seconds of each phase to a JSON file.")
def compress(model: str, out: Path, timings: Path | None, device: str, max_shard_size: str, **options: Any) -> None:
    """Prune MODEL (a Hugging Face folder, a hub id or a .gguf file) and write a compressed checkpoint.

    What MODEL has in MXFP4 or FP8 is dequantized as it is read.
    Decoder layers are in memory one at a time. torchrun --nproc-per-node N -m ria_vllm compress ... divides the
    calibration samples and the permutation searches among N processes.
    """
    from ria_vllm.checkpoint.writer import check_file_place, disk_errors
    from ria_vllm.files.sizes import parse_size
    from ria_vllm.offline.recipe import Recipe
    from ria_vllm.offline.run.compress import Settings
    from ria_vllm.offline.run.compress import compress as run
    from ria_vllm.offline.runtime.device import choose_device
    from ria_vllm.progress import Monitor

    how = {name: options.pop(name) for name in ("activation_cache", "overwrite", "resume")}
    size = options.pop("group_size")
    recipe = Recipe.of_options(options | {"group_size": int(size) if size and size.isdigit() else size})
    if timings and timings.parent.resolve() != out.resolve():  # OUT itself does not exist yet
        check_file_place(timings)
    settings = Settings(device=choose_device(device), max_shard_size=parse_size(max_shard_size), **how)
    monitor = Monitor(shown=int(os.environ.get("RANK", "0")) == 0)
    try:
        report = run(model, out, recipe, settings, monitor)
    except KeyboardInterrupt:
        raise RiaError(f"interrupted. What is finished is kept beside {out}; add --resume to continue.") from None
    seconds = {name: round(value, 3) for name, value in monitor.seconds.items()}
    monitor.say("seconds: " + ", ".join(f"{name} {value:.1f}" for name, value in seconds.items()))
    kept = [record["retained_after"] for record in report["linears"].values()]
    monitor.say(f"{out}: {len(kept)} linears pruned, mean retained score {sum(kept) / len(kept):.4f}")
    if timings and monitor.shown:
        with disk_errors(timings):
            timings.write_text(json.dumps(seconds, indent=2) + "\n")
