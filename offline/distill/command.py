"""`ria-vllm distill`."""

from pathlib import Path
from typing import Any

import click

from ria_vllm.errors import RiaError
from ria_vllm.offline.runtime import options
from ria_vllm.terminal import GroupedCommand, expert, quality


@click.command(cls=GroupedCommand)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--teacher",
    required=True,
    help="The dense model that FOLDER was pruned from: a folder or a hub id.",
)
@options.out
@click.option("--tokens", required=True, type=click.IntRange(min=2), help="Tokens of distinct text to train on.")
@click.option(
    "--data",
    "text",
    default="self",
    show_default=True,
    help="The text: a .txt or .jsonl file (fields text or messages), c4, wikitext2 or pile from "
    "the hub, or self: text that the teacher writes itself.",
)
@quality(
    "--self-written",
    default=0.0,
    show_default=True,
    help="Fraction of the tokens that the teacher writes itself; the others are of --data.",
)
@expert("--seq-len", default=512, help="Tokens in a sequence.")
@expert("--batch", default=2, help="Sequences in a step.")
@expert("--lr", default=3e-4, help="Learning rate; it falls to 0 along half a cosine.")
@quality(
    "--eval-data",
    "eval_text",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False),
    help="A text file to measure on while training. The step that is best on the first one is kept; without one, the "
    "last step. Repeatable.",
)
@expert("--eval-tokens", default=8192, help="Tokens of each --eval-data.")
@expert("--evals", default=10, help="How many times to measure --eval-data.")
@expert("--seed", type=click.IntRange(0, 2**63 - 1), default=0, help="For the order of the text.")
@options.device
@expert(
    "--compute-dtype",
    type=click.Choice(["auto", "bfloat16", "float32"]),
    default="auto",
    help="The dtype that the models compute in. auto: the folder's own (for float16 "
    "bfloat16), unless the device computes slowly in it; then float32. Weights are updated in float32 in any case.",
)
@expert(
    "--save-memory/--no-save-memory",
    default=True,
    help="Compute each layer again in the backward pass instead of keeping what it computed.",
)
@expert("--save-every", default=600.0, help="Seconds between two states for --resume.")
@options.max_shard_size
@options.overwrite
@options.resume
def distill(folder: Path, teacher: str, out: Path, device: str, max_shard_size: str, **recipe: Any) -> None:
    """Train the weights that FOLDER keeps towards the predictions of the dense model, and write a better folder.

    FOLDER is what `ria-vllm compress` wrote. Its masks, permutations and weight format stay.
    """
    options.check_one_process("distill")
    from ria_vllm.files.sizes import parse_size
    from ria_vllm.hub.facts import one_line
    from ria_vllm.offline.distill.recipe import Distillation
    from ria_vllm.offline.distill.run import Settings
    from ria_vllm.offline.distill.run import distill as run
    from ria_vllm.offline.runtime.device import choose_device
    from ria_vllm.progress import Monitor
    from ria_vllm.report import VERDICT

    how = {name: recipe.pop(name) for name in ("save_memory", "save_every", "overwrite", "resume")}
    settings = Settings(choose_device(device), max_shard_size=parse_size(max_shard_size), **how)
    monitor = Monitor()
    try:
        report = run(folder, teacher, out, Distillation(**recipe), settings, monitor)
    except KeyboardInterrupt:
        raise RiaError(f"interrupted. What is finished is kept in {out}.partial; add --resume to continue.") from None
    done = report["recipe"]["distill"][-1]
    monitor.say(f"{out}: trained for {done['steps']} steps; step {done.get('kept_step', done['steps'])} is kept")
    for line in report[VERDICT].values():  # some of it is the folder's own
        monitor.say(one_line(line))
