"""Runs become medians and ratios. A point with a failed run has no figures."""

import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ria_vllm.serve.benchmark.load import Outcome
from ria_vllm.serve.benchmark.quality import Quality

DENSE, SPARSE = "dense", "sparse"
PAIR = (DENSE, SPARSE)
FIGURES = {
    "output_tokens_per_s": "output tok/s",
    "total_tokens_per_s": "all tok/s",
    "requests_per_s": "requests/s",
    "ttft_p50_ms": "TTFT p50 ms",
    "ttft_p99_ms": "TTFT p99 ms",
    "tpot_p50_ms": "TPOT p50 ms",
    "tpot_p99_ms": "TPOT p99 ms",
}


@dataclass(frozen=True)
class Run:
    """One measurement of one side. concurrency is None offline, where all requests start at once."""

    side: str
    repetition: int
    concurrency: int | None
    outcome: Outcome


@dataclass(frozen=True)
class Side:
    """One way to serve the model. The first side is the reference: ratios and divergences are against it.

    Attributes:
        bytes: size of its weight files, None if they are not on this machine.
        arguments: for its `vllm serve` alone.
    """

    name: str
    model: str
    bytes: int | None
    arguments: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ratio:
    """A side / the reference within a repetition: median, smallest and largest."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Point:
    """All runs of one concurrency.

    Attributes:
        figures: side -> figures, None if that side failed.
        ratios: side -> figure -> ratio, for all sides but the reference; empty if one of the two failed.
    """

    concurrency: int | None
    figures: dict[str, dict[str, float] | None]
    failures: dict[str, list[str]]
    memory: dict[str, int | None]
    ratios: dict[str, dict[str, Ratio]]


@dataclass
class Measured:
    """Everything that a benchmark has found so far.

    Attributes:
        quality: side -> perplexity and divergence.
        quality_failures: side -> why it has none.
        notes: what the reader of the figures must know.
    """

    sides: Sequence[Side]
    runs: list[Run] = field(default_factory=list)
    quality: dict[str, Quality] = field(default_factory=dict)
    quality_failures: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(side.name for side in self.sides)

    def points(self) -> list[Point]:
        return summarise(self.runs, self.names)

    def failure_lines(self) -> list[str]:
        lines = [
            f"{side}, {'offline' if point.concurrency is None else f'{point.concurrency} users'}: {reason}"
            for point in self.points()
            for side, reasons in point.failures.items()
            for reason in reasons
        ]
        return lines + [f"{side}, perplexity: {reason}" for side, reason in self.quality_failures.items()]


def summarise(runs: Sequence[Run], names: Sequence[str] = PAIR) -> list[Point]:
    """Medians over the repetitions, and ratios within each of them.

    Args:
        names: of the sides; the first is the reference.
    """
    points = []
    for concurrency in dict.fromkeys(run.concurrency for run in runs):
        own = [run for run in runs if run.concurrency == concurrency]
        figures: dict[str, dict[str, float] | None] = {}
        failures: dict[str, list[str]] = {}
        memory: dict[str, int | None] = {}
        for side in names:
            outcomes = [run.outcome for run in own if run.side == side]
            failures[side] = [o.failure for o in outcomes if o.failure is not None]
            good = [o.figures for o in outcomes if o.figures is not None]
            whole = bool(good) and not failures[side]
            figures[side] = {k: statistics.median(f[k] for f in good) for k in good[0]} if whole else None
            peaks = [o.memory for o in outcomes if o.memory is not None]
            memory[side] = max(peaks) if peaks and whole else None
        ratios = {
            side: paired_ratios(own, names[0], side) if figures[names[0]] and figures[side] else {}
            for side in names[1:]
        }
        points.append(Point(concurrency, figures, failures, memory, ratios))
    return points


def paired_ratios(runs: Sequence[Run], reference: str, side: str) -> dict[str, Ratio]:
    """side / reference of each figure, from repetitions in which both succeeded."""
    by_repetition: dict[int, dict[str, dict[str, float]]] = {}
    for run in runs:
        if run.outcome.figures is not None and run.side in (reference, side):
            by_repetition.setdefault(run.repetition, {})[run.side] = run.outcome.figures
    pairs = [sides for sides in by_repetition.values() if len(sides) == 2]
    ratios = {}
    for key in FIGURES:
        values = [s[side][key] / s[reference][key] for s in pairs if s[reference].get(key) and key in s[side]]
        if values:
            ratios[key] = Ratio(statistics.median(values), min(values), max(values))
    return ratios


def as_json(measured: Measured, machine: dict[str, Any], options: dict[str, Any], complete: bool) -> dict[str, Any]:
    return {
        "complete": complete,
        "machine": machine,
        "options": options,
        "reference": measured.names[0],
        "sides": {side.name: asdict(side) for side in measured.sides},
        "quality": {side: asdict(quality) for side, quality in measured.quality.items()},
        "quality_failures": measured.quality_failures,
        "notes": measured.notes,
        "points": [point_json(point, measured.names) for point in measured.points()],
        "runs": [asdict(run) for run in measured.runs],
    }


def point_json(point: Point, names: Sequence[str]) -> dict[str, Any]:
    """`ratios_by_side`; and for a pair also `ratios`, which was all there was when only pairs could be compared."""
    content = asdict(point)
    content["ratios_by_side"] = content.pop("ratios")
    if tuple(names) == PAIR:
        content["ratios"] = content["ratios_by_side"][SPARSE]
    return content


def write_json(
    folder: Path, measured: Measured, machine: dict[str, Any], options: dict[str, Any], complete: bool
) -> None:
    """Write bench.json, whole or not at all."""
    content = as_json(measured, machine, options, complete)
    unfinished = folder / "bench.json.unfinished"
    unfinished.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
    os.replace(unfinished, folder / "bench.json")


def read_runs(folder: Path) -> tuple[list[Run], str]:
    """The runs that `write_json` wrote, and its date, as in `machine`."""
    content = json.loads((folder / "bench.json").read_text())
    runs = [Run(**run | {"outcome": Outcome(**run["outcome"])}) for run in content["runs"]]
    return runs, content["machine"]["date"]
