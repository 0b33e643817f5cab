"""Runs become medians and ratios. A point with a failed run has no figures."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ria_vllm.serve.benchmark.load import Outcome
from ria_vllm.sizes import human_size

DENSE, SPARSE = "dense", "sparse"
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
    """One of the two models. bytes: size of its weight files, None if they are not on this machine."""

    name: str
    model: str
    bytes: int | None


@dataclass(frozen=True)
class Ratio:
    """sparse / dense within a repetition: median, smallest and largest."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Point:
    """All runs of one concurrency. figures[side] is None if that side failed; ratios is empty if either did."""

    concurrency: int | None
    figures: dict[str, dict[str, float] | None]
    failures: dict[str, list[str]]
    memory: dict[str, int | None]
    ratios: dict[str, Ratio]


def summarise(runs: Sequence[Run]) -> list[Point]:
    """Medians over the repetitions, and ratios within each of them."""
    points = []
    for concurrency in dict.fromkeys(run.concurrency for run in runs):
        own = [run for run in runs if run.concurrency == concurrency]
        figures: dict[str, dict[str, float] | None] = {}
        failures: dict[str, list[str]] = {}
        memory: dict[str, int | None] = {}
        for side in (DENSE, SPARSE):
            outcomes = [run.outcome for run in own if run.side == side]
            failures[side] = [o.failure for o in outcomes if o.failure is not None]
            good = [o.figures for o in outcomes if o.figures is not None]
            whole = bool(good) and not failures[side]
            figures[side] = {k: statistics.median(f[k] for f in good) for k in good[0]} if whole else None
            peaks = [o.memory for o in outcomes if o.memory is not None]
            memory[side] = max(peaks) if peaks and whole else None
        both = figures[DENSE] is not None and figures[SPARSE] is not None
        points.append(Point(concurrency, figures, failures, memory, paired_ratios(own) if both else {}))
    return points


def paired_ratios(runs: Sequence[Run]) -> dict[str, Ratio]:
    """sparse / dense of each figure, from repetitions in which both sides succeeded."""
    by_repetition: dict[int, dict[str, dict[str, float]]] = {}
    for run in runs:
        if run.outcome.figures is not None:
            by_repetition.setdefault(run.repetition, {})[run.side] = run.outcome.figures
    pairs = [sides for sides in by_repetition.values() if len(sides) == 2]
    ratios = {}
    for key in FIGURES:
        values = [s[SPARSE][key] / s[DENSE][key] for s in pairs if s[DENSE].get(key) and key in s[SPARSE]]
        if values:
            ratios[key] = Ratio(statistics.median(values), min(values), max(values))
    return ratios


def table(points: Sequence[Point], sides: Sequence[Side]) -> tuple[list[str], list[list[str]]]:
    """Column titles and rows of text: dense, sparse and their ratio for each concurrency."""
    present = {key for point in points for figures in point.figures.values() if figures for key in figures}
    keys = [key for key in FIGURES if key in present]
    titles = ["users", "side", *(FIGURES[key] for key in keys), "memory", "weights"]
    sizes = {side.name: side.bytes for side in sides}
    rows = []
    for point in points:
        users = "all" if point.concurrency is None else str(point.concurrency)
        for side in (DENSE, SPARSE):
            figures = point.figures[side]
            if figures is None:
                reason = "failed" if point.failures[side] else "not run"
                cells = [reason] * max(len(keys), 1)
                rows.append([users, side, *cells[: len(keys)], reason if not keys else "-", size_text(sizes[side])])
            else:
                cells = [f"{figures[key]:.4g}" for key in keys]
                rows.append([users, side, *cells, size_text(point.memory[side]), size_text(sizes[side])])
        cells = [ratio_text(point.ratios.get(key)) for key in keys]
        memory = quotient(point.memory[SPARSE], point.memory[DENSE])
        rows.append([users, "ratio", *cells, memory, quotient(sizes[SPARSE], sizes[DENSE])])
    return titles, rows


def size_text(size: int | None) -> str:
    return "-" if size is None else human_size(size)


def quotient(sparse: int | None, dense: int | None) -> str:
    return f"{sparse / dense:.3f}" if sparse and dense else "-"


def ratio_text(ratio: Ratio | None) -> str:
    if ratio is None:
        return "-"
    spread = f" ({ratio.low:.3f} to {ratio.high:.3f})" if ratio.low != ratio.high else ""
    return f"{ratio.median:.3f}{spread}"


def failure_lines(points: Sequence[Point]) -> list[str]:
    return [
        f"{side}, {'offline' if point.concurrency is None else f'{point.concurrency} users'}: {reason}"
        for point in points
        for side, reasons in point.failures.items()
        for reason in reasons
    ]


def as_json(
    runs: Sequence[Run], sides: Sequence[Side], machine: dict[str, Any], options: dict[str, Any], complete: bool
) -> dict[str, Any]:
    return {
        "complete": complete,
        "machine": machine,
        "options": options,
        "sides": {side.name: asdict(side) for side in sides},
        "points": [asdict(point) for point in summarise(runs)],
        "runs": [asdict(run) for run in runs],
    }


def as_markdown(
    runs: Sequence[Run], sides: Sequence[Side], machine: dict[str, Any], options: dict[str, Any], complete: bool
) -> str:
    points = summarise(runs)
    titles, rows = table(points, sides)
    lines = ["# Dense against sparse", ""]
    if not complete:
        lines += ["Interrupted: some runs are missing.", ""]
    lines += [f"- {side.name}: `{side.model}`" for side in sides]
    lines += [f"- {key}: {value}" for key, value in {**machine, **options}.items() if value not in (None, "", [])]
    lines += ["", "| " + " | ".join(titles) + " |", "| " + " | ".join("---" for _ in titles) + " |"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    lines += [
        "",
        "Medians over repetitions. Ratios are sparse/dense within a repetition: median (smallest to largest). Memory "
        "is the peak of the server's process tree, in which pages that its processes share count once.",
    ]
    failures = failure_lines(points)
    if failures:
        lines += ["", "Failed runs:", "", *(f"- {line}" for line in failures)]
    return "\n".join(lines) + "\n"


def write(
    folder: Path, runs: Sequence[Run], sides: Sequence[Side], machine: dict, options: dict, complete: bool
) -> None:
    """Write bench.json and bench.md; called after every run, so that an interruption loses nothing."""
    content = as_json(runs, sides, machine, options, complete)
    (folder / "bench.json").write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
    (folder / "bench.md").write_text(as_markdown(runs, sides, machine, options, complete))
