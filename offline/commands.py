"""`ria-vllm compress`."""

import shlex
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from ria_vllm.errors import RiaError
from ria_vllm.format.pattern import PATTERNS, SCHEMES, TWO_OF_FOUR
from ria_vllm.offline.runtime import options as shared
from ria_vllm.terminal import GroupedCommand, expert, quality

# What `--effort` stands for.
EFFORTS: dict[str, dict[str, Any]] = {
    "fast": {"reconstruct": "admm", "samples": 32, "seq_len": 512},
    "default": {"reconstruct": "short", "samples": 32, "seq_len": 512},
    "best": {"reconstruct": "block", "samples": 128, "seq_len": 1024},  # and then `prune_and_distill` trains it whole
}


def parse_percent(_: click.Context, parameter: click.Parameter, text: str | None) -> float | None:
    """5% is 0.05."""
    try:
        return None if text is None else float(text.removesuffix("%")) / 100
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a percentage, such as 5%.", param=parameter) from None


@click.command(cls=GroupedCommand)
@click.argument("model")
@shared.out
@shared.scheme
@click.option(
    "--effort",
    type=click.Choice(list(EFFORTS)),
    default="default",
    show_default=True,
    help="fast: about 5 minutes of a core for 135M weights, by estimate 1.5 hours for a billion; default: also a short "
    "training of each layer; best: a longer training on 8 times the text, and then of the whole model (`distill`, on "
    "262,144 tokens). `plan` estimates times here.",
)
@click.option(
    "--data",
    "calibration",
    default="self",
    show_default=True,
    help="A .txt or .jsonl file (fields text or messages), c4, wikitext2 or pile from the hub, "
    "or self: text that the dense model writes itself, for which the whole model has to fit into memory.",
)
@quality(
    "--self-written",
    default=0.0,
    show_default=True,
    help="Fraction of the sequences that the dense model writes itself; the others are of --data.",
)
@quality(
    "--eval-data",
    "eval_text",
    type=click.Path(exists=True, dir_okay=False),
    help="A .txt file to measure on how much is lost, and whether the training of a sublayer is kept; else a part of "
    "the calibration text to which nothing is fitted.",
)
@quality(
    "--max-loss",
    metavar="PERCENT",
    callback=parse_percent,
    help="Prune only as much as raises the perplexity by about this, such as 5%; the rest stays dense, in int8 if the "
    "scheme has integers. Takes 2 to 3 times as long.",
)
@quality(
    "--min-speed",
    metavar="TIMES",
    type=float,
    help="Prune only as much as makes a step of decoding for one user this many times as fast as with all linears "
    "dense (in int8 if the scheme has integers), such as 1.3: estimated, for CPUs only. Takes 2 to 3 times as long.",
)
@shared.pattern
@quality("--ignore", multiple=True, metavar="REGEX", help="Do not prune linears with a matching name. Repeatable.")
@shared.device
@shared.overwrite
@shared.resume
@expert(
    "--recipe",
    "saved",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Repeat what the ria_report.json of an earlier folder says, but for the options that you give beside it.",
)
@expert(
    "--method",
    type=click.Choice(["ria", "wanda", "magnitude"]),
    default="ria",
    help="How weights are scored.",
)
@expert(
    "--permute", type=click.Choice(["lsa", "none"]), default="lsa", help="Channel permutation: linear sum assignment."
)
@expert("--samples", type=int, show_default="by --effort", help="Number of calibration sequences.")
@expert("--seq-len", type=int, show_default="by --effort", help="Tokens in each sequence; at most the model's context.")
@expert("--seed", type=click.IntRange(0, 2**63 - 1), default=0, help="For all random choices.")
@expert(
    "--reconstruct",
    type=click.Choice(["none", "admm", "short", "block"]),
    show_default="by --effort",
    help="How kept weights are updated: none; admm; short: admm, and then a short training of each layer, but not of "
    "its routed experts; or block: a longer one. Linears are rounded to integers after that.",
)
@expert(
    "--group-size",
    type=click.Choice(["128", "64", "32", "row"]),
    show_default="row for W8; 32 for W4A8; for W4A16 128 if that fits 8 tensor-parallel ranks, else 64",
    help="Columns of an integer weight that share a scale. Smaller groups are more exact, and take 16/SIZE bits a "
    "weight more on the disk.",
)
@expert(
    "--smooth",
    type=float,
    metavar="STRENGTH",
    show_default="0.5 for W8A8",
    help="Migrate outliers of inputs into the weights, as SmoothQuant does, by this strength; 0: do not.",
)
@expert(
    "--rotate",
    type=click.Choice(["none", "heads"]),
    show_default="heads with --reconstruct short and block, else none",
    help="heads: first rotate the channels of attention's heads, in v and o, so that pruning loses less. "
    "Adapters (LoRA) of the dense model need none.",
)
@expert(
    "--prune-rest",
    is_flag=True,
    help="Of a model of which some linears have the pattern already, prune the others, too; else these stay dense.",
)
@expert(
    "--compute-dtype",
    type=click.Choice(["auto", "bfloat16", "float32", "float16"]),
    default="auto",
    help="The dtype to compute in. auto: the model's own, unless the device "
    "computes slowly in it; then float32. Weights are always written in the model's own.",
)
@shared.max_shard_size
def compress(model: str, out: Path, saved: Path | None, device: str, max_shard_size: str, **options: Any) -> None:
    """Prune MODEL (a Hugging Face folder or a hub id) and write a compressed checkpoint.

    What MODEL has in MXFP4 or FP8 is dequantized as it is read. Linears that have the pattern already keep their zeros.
    Decoder layers are in memory one at a time.
    """
    shared.check_one_process("compress")
    from torch import cuda

    from ria_vllm.files.json_file import read_json
    from ria_vllm.files.sizes import parse_size
    from ria_vllm.offline.distill.best import of_best, prune_and_distill, repeated
    from ria_vllm.offline.recipe import Recipe
    from ria_vllm.offline.run.compress import Settings
    from ria_vllm.offline.run.compress import compress as run
    from ria_vllm.offline.runtime.device import choose_device
    from ria_vllm.progress import Monitor
    from ria_vllm.report import VERDICT

    monitor = Monitor()
    how = {name: options.pop(name) for name in ("overwrite", "resume")}
    size = options.pop("group_size")
    options["pattern"] = PATTERNS[options["pattern"]]
    options |= {"group_size": int(size) if size and size.isdigit() else size}
    source = click.get_current_context().get_parameter_source
    given = {name for name in options if source(name) is ParameterSource.COMMANDLINE}
    effort = options["effort"]
    for name, words in (("scheme", SCHEMES), ("effort", EFFORTS)):
        meant = words[options.pop(name)]
        options |= {key: value for key, value in meant.items() if options.get(key) is None}
        given |= meant.keys() if name in given else set()
    if saved is not None:
        beside = {name: options[name] for name in given & options.keys()}
        options = Recipe.saved(saved, beside) | beside
    recipe = Recipe.of_options(options)
    training = of_best(recipe) if effort == "best" else None
    if saved is not None and training is None and (found := read_json(saved)["recipe"]).get("distill"):
        if "effort" not in given:
            training = repeated(found, Recipe.of_options(Recipe.saved(saved)), recipe)
        if training is None:
            monitor.warn("--recipe: the training by `distill` that it names is not repeated.")
    settings = Settings(device=choose_device(device), max_shard_size=parse_size(max_shard_size), **how)
    try:
        if training is not None:
            report = prune_and_distill(model, out, recipe, training, settings, monitor)
        else:
            report = run(model, out, recipe, settings, monitor)
    except KeyboardInterrupt:
        raise RiaError(f"interrupted. What is finished is kept beside {out}; add --resume to continue.") from None
    monitor.say("seconds: " + ", ".join(f"{name} {value:.1f}" for name, value in monitor.seconds.items()))
    kept = [record["retained_after"] for record in report["linears"].values()]
    free = recipe.pattern == TWO_OF_FOUR and recipe.activations != "fp8" and "kept" not in report
    if free and not cuda.is_available():
        way = "--pattern 8:16 loses less at the same size; `ria-vllm doctor` says at what speed"
        monitor.say(f"{recipe.pattern} is for GPUs, too; for CPUs alone, {way}")
    score = f", mean retained score {sum(kept) / len(kept):.4f}" if kept else ""
    monitor.say(f"{out}: {len(kept)} linears pruned{score}")
    for line in report[VERDICT].values():
        monitor.say(line)
    untrained = not {"kept", "distill"} & report.keys() and "quality" in report[VERDICT]
    if kept and recipe.reconstruct == "block" and untrained:
        monitor.say(_next(model, out, recipe.calibration))


def _next(model: str, out: Path, text: str) -> str:
    """What should follow the longest training of single layers."""
    words = ["ria-vllm", "distill", str(out), "--teacher", model, "-o", f"{out}-distilled", "--tokens", "262144"]
    words += [] if text == "self" else ["--data", text, "--self-written", "0.5"]
    return (
        f"next, where both models fit into memory: {shlex.join(words)}\nThat took SmolLM2's perplexity from 57.7 to "
        "51.5, and on other text from 34.4 to 24.9"
    )
