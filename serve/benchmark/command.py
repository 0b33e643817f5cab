"""`ria-vllm bench`: serve the dense model, its rivals and the sparse ones in turn, under the same load."""

import importlib.util
import re
import shlex
import time
from functools import partial
from pathlib import Path
from typing import Any

import click

from ria_vllm.errors import RiaError
from ria_vllm.hub.facts import CARD_FILE, add_speed
from ria_vllm.installing import IN_A_LINE
from ria_vllm.progress import Monitor
from ria_vllm.serve.benchmark.comparison import Comparison
from ria_vllm.serve.benchmark.engines import Vllm, engine_of, is_url
from ria_vllm.serve.benchmark.load import Workload
from ria_vllm.serve.benchmark.quality import TOP, TextQuality
from ria_vllm.serve.benchmark.quantize import quantized
from ria_vllm.serve.benchmark.results import plot, summary
from ria_vllm.serve.benchmark.server import found_running
from ria_vllm.serve.benchmark.sides import sides_of
from ria_vllm.terminal import GroupedCommand, expert, grouped, quality

# Such as --api-key, --hf_token and --header.
SECRET = re.compile(r"(--?|\")[\w.-]*\b(key?|token|secret|password|headers?)", re.IGNORECASE)
HARMLESS = ("--allowed-headers", "--enable-request-id-headers")

FILE = click.Path(path_type=Path, exists=True, dir_okay=False)
load_option = partial(grouped, group="The load", show_default=True)


def parse_concurrency(text: str) -> list[int]:
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise RiaError(f"--concurrency {text}: give positive numbers, such as 1,4,16.")
    return list(dict.fromkeys(map(int, text.split(","))))


def refuse_secrets(arguments: str) -> None:
    """Raise RiaError for a key or token among the arguments of `vllm serve`, which get into results and logs."""
    for argument in shlex.split(arguments):
        named = [argument.partition("=")[0], *re.findall(r'"[^"]*(?="\s*:)', argument)]  # of the option, and in JSON
        found = (name.replace("_", "-") for name in named)
        option = next((name for name in found if SECRET.fullmatch(name) and name not in HARMLESS), None)
        if option is not None:
            raise RiaError(
                f"{option} would be in the results of bench. Put the secret into the environment instead: "
                "VLLM_API_KEY=... is the key of the servers, HF_TOKEN=... that of the hub."
            )


def check_environment() -> None:
    for module, way in (("vllm", IN_A_LINE), ("matplotlib", "pip install matplotlib")):
        if importlib.util.find_spec(module) is None:
            raise RiaError(f"bench needs {module}: {way}.")


@click.command(cls=GroupedCommand)
@click.argument("outs", metavar="OUT...", nargs=-1, required=True)
@click.option("--baseline", "baselines", required=True, multiple=True, help="The dense model; again for its rivals.")
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    help="Folder for results; inside an OUT, the table also goes into its card and report. [default: bench-DATE]",
)
@click.option("--concurrency", default="1,4,16", show_default=True, help="Numbers of users at once.")
@load_option("--input-len", type=click.IntRange(min=1), default=256, help="Tokens per prompt.")
@load_option("--output-len", type=click.IntRange(min=2), default=128, help="Tokens per answer.")
@load_option("--data", type=FILE, help="ShareGPT-style JSON instead of random prompts.")
@load_option("--requests", type=click.IntRange(min=1), default=4, help="Requests per user.")
@load_option("--repetitions", type=click.IntRange(min=1), default=3, help="Runs of each side.")
@quality(
    "--eval-data",
    "eval_text",
    type=FILE,
    help="Also measure perplexity on this, and divergence from the first baseline.",
)
@quality("--seq-len", type=click.IntRange(min=2), default=1024, show_default=True, help="Tokens per window.")
@quality("--eval-tokens", type=click.IntRange(min=2), default=16384, show_default=True, help="Of the text's start.")
@expert("--serve-args", default="", help="More arguments for each `vllm serve`, in one string.")
@expert("--serve-args-of", type=(str, str), multiple=True, metavar="NAME ARGS", help="More for one of them.")
def bench(
    outs: tuple[str, ...],
    baselines: tuple[str, ...],
    out: Path | None,
    eval_text: Path | None,
    serve_args: str,
    serve_args_of: tuple[tuple[str, str], ...],
    **load: Any,
) -> None:
    """Compare the compressed folders OUT with their dense model and others under the same load.

    OUT and --baseline take a folder, a hub id or NAME=MODEL: whatever `vllm serve` serves, and .gguf files, which
    llama.cpp serves. MODEL:Q4_0, or with another of its types, is first made into one by its programs. http://HOST:PORT
    is an OpenAI-compatible server that runs already, and goes on; #MODEL behind it names one of several models. All are
    compared with the first baseline. Each repetition serves them one after the other, and the one that goes first
    changes. With --eval-data, the table and the plot also have what each way costs in quality. The key in VLLM_API_KEY,
    if set, is that of all servers.
    """
    check_environment()
    refuse_secrets(" ".join([serve_args, *(own for _, own in serve_args_of)]))
    folder = out or Path(f"bench-{time.strftime('%Y%m%d-%H%M%S')}")
    if (folder / "bench.json").exists():
        raise RiaError(f"{folder} holds results already. Choose another folder with -o.")
    sides = sides_of([*baselines, *outs], serve_args_of)
    tokenizers = [one.model for one in [*sides[len(baselines) :], *sides] if isinstance(engine_of(one.model), Vllm)]
    if not tokenizers:
        raise RiaError("No side is a folder or a hub id. The prompts need the tokenizer of one: add it as a side.")
    text = None if eval_text is None else TextQuality(eval_text, load["seq_len"], load["eval_tokens"])
    concurrency, monitor = parse_concurrency(load["concurrency"]), Monitor()
    for side in sides:
        if is_url(side.model):
            found_running(side.model)  # now, and not only after the hours that others take
    with monitor.live():
        sides = [quantized(side, folder / "gguf", monitor) for side in sides]
    arguments = shlex.split(serve_args)
    if not any("prefix-caching" in a for a in arguments):
        # Warm-up requests repeat the first prompt, and a load from --data repeats those of loads before it.
        arguments.append("--no-enable-prefix-caching")
    if eval_text is not None and not any(a.startswith("--max-logprobs") for a in arguments):
        arguments += ["--max-logprobs", str(TOP)]
    comparison = Comparison(
        sides=sides,
        workload=Workload(load["input_len"], load["output_len"], load["requests"], load["data"]),
        concurrency=concurrency,
        repetitions=load["repetitions"],
        folder=folder,
        tokenizer=tokenizers[0],
        serve_arguments=arguments,
        text=text,
        options=click.get_current_context().params | {"serve_args": " ".join(arguments)},
    )
    measured = comparison.measured
    try:
        comparison.measure()
    finally:
        if measured.runs:
            plot(folder / "bench.png", measured)
            click.echo(f"\n{summary(measured)}\n\n{folder}: bench.json, bench.md, bench.png, logs/")
    of = folder.resolve().parent
    ours = of in [Path(side.model).resolve() for side in sides[len(baselines) :]]
    if ours and (of / CARD_FILE).is_file() and not any(is_url(side.model) for side in sides):  # cards are published
        add_speed(of, folder / "bench.md")
