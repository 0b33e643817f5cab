"""Options of the command line that several commands have."""

import os
from pathlib import Path

import click

from ria_vllm.errors import RiaError
from ria_vllm.format.pattern import PATTERNS, SCHEMES, TWO_OF_FOUR
from ria_vllm.terminal import expert, grouped, quality

RUN = "This run"

out = click.option(
    "-o",
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder to write; must not exist, unless --overwrite is given.",
)
device = grouped("--device", group=RUN, type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
max_shard_size = expert("--max-shard-size", default="5GB", help="Of weight files.")
overwrite = grouped(
    "--overwrite", group=RUN, is_flag=True, help="Replace OUT, if it exists, once the new one is complete."
)
resume = grouped("--resume", group=RUN, is_flag=True, help="Continue an interrupted run of the same command.")
scheme = click.option(
    "--scheme",
    type=click.Choice(list(SCHEMES), case_sensitive=False),
    default="BF16",
    show_default=True,
    metavar="|".join(SCHEMES),
    help="Bits of kept weights and of activations. BF16: the model's own dtype; W8, W4: integers of about 5 and 3 bits "
    "a weight instead of 9; A8: linears round their inputs to int8, each token by its own scale. FP8: e4m3 for both, "
    "which GPUs of compute capability 9.0 multiply (preview: not measured); others, and CPUs, serve it as BF16.",
)
pattern = quality(
    "--pattern",
    type=click.Choice(list(PATTERNS)),
    default=str(TWO_OF_FOUR),
    show_default=True,
    help="How many weights each row keeps of how many neighbours. 4:8 and 8:16 lose less at the same size, on "
    "CPUs; GPUs multiply 2:4 only.",
)


def check_one_process(command: str) -> None:
    """Refuse to run as one of several processes: each would do all the work for the same folder.

    Raises:
        RiaError: torchrun has started several.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise RiaError(f"{command} runs in one process: start it without torchrun.")
