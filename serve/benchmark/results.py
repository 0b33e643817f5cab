"""Runs become medians and ratios, in bench.json and bench.md. A point with a failed run has no figures."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ria_vllm.checkpoint.writer import write_whole
from ria_vllm.files.sizes import human_size
from ria_vllm.serve.benchmark.load import REPORTED
from ria_vllm.serve.benchmark.machine import machine
from ria_vllm.serve.benchmark.quality import TOP, Quality
from ria_vllm.serve.benchmark.sides import Side

SPEED = "output_throughput"


@dataclass(frozen=True)
class Run:
    """One measurement of one side: either figures, as `load.online` returns them, or why there are none."""

    side: str
    repetition: int
    users: int
    figures: dict[str, float] | None
    failure: str | None = None


@dataclass(frozen=True)
class Point:
    """All runs of one side with one number of users.

    Attributes:
        figures: medians over the repetitions; None if a run failed, or none has been done.
        ratio: of the output tokens/s to the reference's within a repetition: median, smallest and largest. None for the
            reference, and if one of the two has no figures.
    """

    side: str
    users: int
    figures: dict[str, float] | None
    failures: list[str]
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
        return [
            self._point(side.name, users)
            for users in dict.fromkeys(run.users for run in self.runs)
            for side in self.sides
        ]

    def _point(self, side: str, users: int) -> Point:
        figures, failures = self._figures(side, users)
        reference = self.sides[0].name
        ratio = None
        if side != reference:
            theirs, _ = self._figures(reference, users)
            ratios = [figures[n][SPEED] / theirs[n][SPEED] for n in figures if n in theirs]
            ratio = (statistics.median(ratios), min(ratios), max(ratios)) if ratios else None
        every = list(figures.values())
        medians = {name: statistics.median(one[name] for one in every) for name in every[0]} if every else None
        return Point(side, users, medians, failures, ratio)

    def _figures(self, side: str, users: int) -> tuple[dict[int, dict[str, float]], list[str]]:
        """(repetition -> figures, failures). One failure takes all figures away."""
        own = [run for run in self.runs if (run.side, run.users) == (side, users)]
        failures = [run.failure for run in own if run.failure]
        return {run.repetition: run.figures for run in own if run.figures and not failures}, failures

    def failure_lines(self) -> list[str]:
        return [f"{p.side}, {p.users} users: {reason}" for p in self.points() for reason in p.failures]


def table(measured: Measured) -> tuple[list[str], list[list[str]]]:
    """Titles and rows of text: a row for each number of users and side."""
    titles = ["users", "side", f"/ {measured.sides[0].name}", *REPORTED.values(), "memory", "weights"]
    titles += ["perplexity", "KL"] if measured.quality else []
    rows, sizes = [], {side.name: size_text(side.bytes) for side in measured.sides}
    for point in measured.points():
        cells = ["failed" if point.failures else "not run"] * (len(REPORTED) + 2)
        if point.figures is not None:
            cells = [ratio_text(point.ratio), *(f"{point.figures[name]:.4g}" for name in REPORTED)]
            cells.append(size_text(point.figures["memory_bytes"]))
        cells.append(sizes[point.side])
        if measured.quality:
            found = measured.quality.get(point.side)
            cells += [f"{found.perplexity:.4g}", f"{found.kl:.4g}"] if found else ["not run"] * 2
        rows.append([str(point.users), point.side, *cells])
    return titles, rows


def size_text(size: float | None) -> str:
    return "-" if size is None else human_size(int(size))


def ratio_text(ratio: tuple[float, float, float] | None) -> str:
    if ratio is None:
        return "-"
    median, low, high = ratio
    return f"{median:.3f} ({low:.3f} to {high:.3f})" if low != high else f"{median:.3f}"


def summary(measured: Measured) -> str:
    """The table in Markdown, aligned, so that a terminal can show it, too; what its figures mean; and failures."""
    titles, rows = table(measured)
    drawn = Table(*titles, box=box.MARKDOWN)
    for row in rows:
        drawn.add_row(*row)
    text = StringIO()
    Console(file=text, width=1000, markup=False).print(drawn)
    reference = measured.sides[0].name
    notes = (
        f"Medians over repetitions. / {reference} is the ratio of the output tokens/s within a repetition: median "
        "(smallest to largest). Memory is the peak of the server's process tree, in which pages that its processes "
        "share count once. Weights are the sizes of the weight files."
    )
    if measured.quality:
        unlisted = max(found.unlisted for found in measured.quality.values())
        notes += (
            f" Perplexity is of {measured.quality[reference].tokens} tokens, from the prompt logprobs of the server. KL "
            f"is a lower bound of the divergence from {reference}, in nats per token: tokens that are not among the "
            f"{TOP} likeliest of both count as one, with at most {unlisted:.2%} of {reference}'s probability."
        )
    lines = [line.strip() for line in text.getvalue().splitlines() if line.strip()]
    return "\n".join([*lines, "", notes, "", *(f"- failed: {line}" for line in measured.failure_lines())]).strip()


def write(folder: Path, measured: Measured, options: Mapping[str, Any], complete: bool) -> None:
    """Write bench.json and bench.md; called after every run, so that an interruption loses nothing."""
    content = {
        "complete": complete,
        "machine": machine(),
        "options": options,
        "sides": [asdict(side) for side in measured.sides],
        "quality": {side: asdict(quality) for side, quality in measured.quality.items()},
        "points": [asdict(point) for point in measured.points()],
        "runs": [asdict(run) for run in measured.runs],
    }
    write_whole(folder / "bench.json", json.dumps(content, indent=2, allow_nan=False, default=str) + "\n")
    lines = ["# One load, several servers", "", *([] if complete else ["Interrupted: some runs are missing.", ""])]
    lines += [f"- {side.name}: `{' '.join([side.model, *side.arguments])}`" for side in measured.sides]
    lines += [f"- {name}: {value}" for name, value in {**machine(), **options}.items() if value not in (None, "", [])]
    write_whole(folder / "bench.md", "\n".join([*lines, "", summary(measured)]) + "\n")
