"""`ria-vllm bench`: serve the dense model, its rivals and the sparse ones in turn, under the same load."""

import importlib.util
import re
import shlex
import time
from pathlib import Path

import click

from ria_vllm.errors import RiaError
from ria_vllm.installing import IN_A_LINE
from ria_vllm.serve.benchmark.comparison import Comparison
from ria_vllm.serve.benchmark.load import Workload
from ria_vllm.serve.benchmark.plot import plot
from ria_vllm.serve.benchmark.quality import TOP, TextQuality
from ria_vllm.serve.benchmark.results import summary
from ria_vllm.serve.benchmark.sides import sides_of

# Such as --api-key, --hf_token and --header.
SECRET = re.compile(r"--?[\w.-]*\b(key|token|secret|password|headers?)", re.IGNORECASE)

FILE = click.Path(path_type=Path, exists=True, dir_okay=False)


def parse_concurrency(text: str) -> list[int]:
    try:
        users = [int(part) for part in text.split(",")]
    except ValueError:
        users = []
    if not users or min(users) < 1 or len(set(users)) < len(users):
        raise RiaError(f"--concurrency {text}: give distinct positive numbers, such as 1,4,16.")
    return users


def refuse_secrets(texts: list[str]) -> None:
    """Arguments get into the results and logs, which are to be shown.

    Raises:
        RiaError: one is a key or a token.
    """
    for argument in (part for text in texts for part in shlex.split(text)):
        option = argument.partition("=")[0]
        if SECRET.fullmatch(option.replace("_", "-")):
            raise RiaError(
                f"{option} in arguments of `vllm serve`: bench writes these into its results. Put the secret into the "
                "environment instead, VLLM_API_KEY=... for the servers' key and HF_TOKEN=... for the hub's."
            )


def check_environment() -> None:
    if importlib.util.find_spec("vllm") is None:
        raise RiaError(f"bench needs vLLM: {IN_A_LINE}.")
    if importlib.util.find_spec("matplotlib") is None:
        raise RiaError("bench needs matplotlib for its plot. Run: pip install matplotlib")


@click.command()
@click.argument("outs", metavar="OUT...", nargs=-1, required=True)
@click.option(
    "--baseline",
    "baselines",
    required=True,
    multiple=True,
    help="The dense model: a folder or a hub id. Again for further rivals, such as quantized dense models; the first "
    "is what all others are compared with.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder for results. [default: bench-DATE]")
@click.option("--concurrency", default="1,4,16", show_default=True, help="Numbers of users at once.")
@click.option("--input-len", type=click.IntRange(min=1), default=256, show_default=True, help="Tokens per prompt.")
@click.option("--output-len", type=click.IntRange(min=2), default=128, show_default=True, help="Tokens per answer.")
@click.option("--data", type=FILE, help="ShareGPT-style JSON instead of random prompts.")
@click.option("--requests", type=click.IntRange(min=1), default=4, show_default=True, help="Requests per user.")
@click.option("--repetitions", type=click.IntRange(min=1), default=3, show_default=True, help="Runs of each side.")
@click.option("--text", type=FILE, help="Also measure perplexity on this, and divergence from the first baseline.")
@click.option("--seq-len", type=click.IntRange(min=2), default=1024, show_default=True, help="Tokens per window.")
@click.option("--max-tokens", type=click.IntRange(min=2), default=16384, show_default=True, help="Of the text's start.")
@click.option("--serve-args", default="", help="More arguments for `vllm serve`, in one string, for all sides.")
@click.option(
    "--serve-args-of", type=(str, str), multiple=True, metavar="NAME ARGUMENTS", help="The same for one side."
)
def bench(
    outs: tuple[str, ...],
    baselines: tuple[str, ...],
    output: Path | None,
    concurrency: str,
    input_len: int,
    output_len: int,
    data: Path | None,
    requests: int,
    repetitions: int,
    text: Path | None,
    seq_len: int,
    max_tokens: int,
    serve_args: str,
    serve_args_of: tuple[tuple[str, str], ...],
) -> None:
    """Compare the compressed folders OUT with their dense model and others, all served by vLLM, under the same load.

    OUT and --baseline take a folder, a hub id or NAME=MODEL: whatever `vllm serve` serves. Each repetition serves all
    sides, one after the other, and the side that goes first changes. With --text, the table and the plot also have what
    each way costs in quality. Servers get the key in VLLM_API_KEY, if it is set.
    """
    check_environment()
    refuse_secrets([serve_args, *(own for _, own in serve_args_of)])
    folder = output or Path(f"bench-{time.strftime('%Y%m%d-%H%M%S')}")
    if (folder / "bench.json").exists():
        raise RiaError(f"{folder} holds results already. Choose another folder with -o.")
    sides = sides_of([*baselines, *outs], serve_args_of)
    arguments = shlex.split(serve_args)
    if not any("prefix-caching" in a for a in arguments):
        # Warm-up requests repeat the first prompt, and a load from --data repeats those of loads before it.
        arguments.append("--no-enable-prefix-caching")
    if text is not None and not any(a.startswith("--max-logprobs") for a in arguments):
        arguments += ["--max-logprobs", str(TOP)]
    comparison = Comparison(
        sides=sides,
        workload=Workload(input_len, output_len, requests, data),
        concurrency=parse_concurrency(concurrency),
        repetitions=repetitions,
        folder=folder,
        tokenizer=sides[len(baselines)].model,
        serve_arguments=arguments,
        text=None if text is None else TextQuality(text, seq_len, max_tokens),
        options=click.get_current_context().params | {"serve_args": " ".join(arguments)},
    )
    measured = comparison.measured
    try:
        comparison.measure()
    finally:
        if measured.runs:
            plot(folder / "bench.png", measured)
            click.echo(f"\n{summary(measured)}\n\n{folder}: bench.json, bench.md, bench.png, logs/")
    if measured.failure_lines():
        raise SystemExit(1)
