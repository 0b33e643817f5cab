"""`ria-vllm bench`: serve the dense model, its rivals and the sparse ones in turn, under the same load."""

import importlib.util
import shlex
import time
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from ria_vllm.errors import RiaError
from ria_vllm.installing import IN_A_LINE
from ria_vllm.serve.benchmark import table
from ria_vllm.serve.benchmark.comparison import Comparison
from ria_vllm.serve.benchmark.load import Workload
from ria_vllm.serve.benchmark.quality import TextQuality
from ria_vllm.serve.benchmark.results import PAIR, Measured
from ria_vllm.serve.benchmark.sides import sides_of


def parse_concurrency(text: str) -> list[int]:
    try:
        users = [int(part) for part in text.split(",")]
    except ValueError:
        users = []
    if not users or min(users) < 1 or len(set(users)) < len(users):
        raise RiaError(f"--concurrency {text}: give distinct positive numbers, such as 1,4,16.")
    return users


def print_table(measured: Measured) -> None:
    titles, rows = table.table(measured)
    shown = Table(box=None, header_style="bold")
    for number, title in enumerate(titles):
        shown.add_column(title, justify="left" if number == 1 else "right")
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        last = following is not None and following[0] != row[0]
        shown.add_row(*row, style="bold" if row[1] == "ratio" else None, end_section=last)
    console = Console()
    Console(width=max(console.width, 160)).print(shown, highlight=False)
    for note in measured.notes:
        click.echo(note)
    for line in measured.failure_lines():
        click.echo(f"failed: {line}")


def check_environment(data: Path | None) -> None:
    if importlib.util.find_spec("vllm") is None:
        raise RiaError(f"bench needs vLLM: {IN_A_LINE}.")
    if importlib.util.find_spec("matplotlib") is None:
        raise RiaError("bench needs matplotlib for its plot. Run: pip install matplotlib")
    if data is not None and not data.is_file():
        raise RiaError(f"--data {data}: no such file.")


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
@click.option("--data", type=click.Path(path_type=Path), help="ShareGPT-style JSON instead of random prompts.")
@click.option("--requests", type=click.IntRange(min=1), default=4, show_default=True, help="Requests per user.")
@click.option("--repetitions", type=click.IntRange(min=1), default=3, show_default=True, help="Runs of each side.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--text",
    type=click.Path(path_type=Path),
    help="A text file: also measure perplexity on it, and the divergence from the first baseline, as served.",
)
@click.option("--seq-len", type=click.IntRange(min=2), default=1024, show_default=True, help="Tokens per window.")
@click.option(
    "--max-tokens",
    type=click.IntRange(min=2),
    default=16384,
    show_default=True,
    help="Use at most this many tokens, from the start of the text.",
)
@click.option(
    "--top-logprobs",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    help="Tokens per position that the divergence tells apart.",
)
@click.option("--url", help="URL of a running server of OUT, instead of starting one.")
@click.option("--baseline-url", help="URL of a running server of the dense model.")
@click.option("--offline", is_flag=True, help="Measure `vllm bench throughput` instead of a server.")
@click.option("--keep-servers", is_flag=True, help="Keep all servers alive and alternate at every load, if they fit.")
@click.option("--serve-args", default="", help="More arguments for `vllm serve`, in one string, for all sides.")
@click.option(
    "--serve-args-of", type=(str, str), multiple=True, metavar="NAME ARGUMENTS", help="The same for one side."
)
@click.option("--startup-timeout", type=click.FloatRange(min=1), default=1800, show_default=True, help="Seconds.")
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
    seed: int,
    text: Path | None,
    seq_len: int,
    max_tokens: int,
    top_logprobs: int,
    url: str | None,
    baseline_url: str | None,
    offline: bool,
    keep_servers: bool,
    serve_args: str,
    serve_args_of: tuple[tuple[str, str], ...],
    startup_timeout: float,
) -> None:
    """Compare the compressed folders OUT with their dense model and others, all served by vLLM, under the same load.

    OUT and --baseline take a folder, a hub id or NAME=MODEL: whatever `vllm serve` serves. Each repetition serves all
    sides, one after the other, and the side that goes first changes. With --text, the table and a second plot also
    have what each way costs in quality. With --offline, --requests is the total number of requests.
    """
    check_environment(data)
    if offline and (url or baseline_url):
        raise RiaError("--offline starts no server: omit --url and --baseline-url.")
    if offline and (text or keep_servers):
        raise RiaError("--offline starts no server: omit --text and --keep-servers.")
    folder = output or Path(f"bench-{time.strftime('%Y%m%d-%H%M%S')}")
    if (folder / "bench.json").exists():
        raise RiaError(f"{folder} holds results already. Choose another folder with -o.")
    sides = sides_of(baselines, outs, serve_args_of)
    if (url or baseline_url) and len(sides) > 2:
        raise RiaError("--url and --baseline-url are for one OUT and one --baseline.")
    reference, ours = sides[0].name, sides[len(baselines)]
    arguments = shlex.split(serve_args)
    if not any("prefix-caching" in a for a in arguments):
        # Warm-up requests repeat the first prompt, and a load from --data repeats those of loads before it.
        arguments.append("--no-enable-prefix-caching")
    options: dict[str, object] = {"keep_servers": True} if keep_servers else {}
    if text is not None:
        options |= {"text": str(text), "seq_len": seq_len, "max_tokens": max_tokens, "top_logprobs": top_logprobs}
        if not any(a.startswith("--max-logprobs") for a in arguments):
            arguments += ["--max-logprobs", str(top_logprobs)]
    comparison = Comparison(
        sides=sides,
        workload=Workload(input_len, output_len, requests, data),
        concurrency=[] if offline else parse_concurrency(concurrency),
        repetitions=repetitions,
        seed=seed,
        folder=folder,
        tokenizer=ours.model,
        text=None if text is None else TextQuality(text, seq_len, max_tokens, top_logprobs, reference),
        keep_servers=keep_servers,
        serve_arguments=arguments,
        options=options,
        urls={side: u for side, u in ((ours.name, url), (reference, baseline_url)) if u},
        startup_timeout=startup_timeout,
    )
    try:
        comparison.measure()
    finally:
        if comparison.measured.runs:
            conclude(comparison)
    if comparison.measured.failure_lines():
        raise SystemExit(1)


def conclude(comparison: Comparison) -> None:
    """Print the table and draw the plots."""
    from ria_vllm.serve.benchmark import plot, quality_plot

    measured, folder = comparison.measured, comparison.folder
    click.echo()
    print_table(measured)
    title = Path(measured.sides[1 if measured.names == PAIR else 0].model).name
    plot.plot(folder / "bench.png", measured, title)
    quality_plot.plot(folder / "quality.png", measured, title)
    plots = ", ".join(name for name in ("bench.png", "quality.png") if (folder / name).exists())
    click.echo(f"\n{folder}: bench.json, bench.md, {plots}, logs/")
