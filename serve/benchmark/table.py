"""The table, on the terminal and in bench.md."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ria_vllm.serve.benchmark.quality import Quality
from ria_vllm.serve.benchmark.results import FIGURES, PAIR, Measured, Point, Ratio, write_json
from ria_vllm.sizes import human_size

SPEED = "output_tokens_per_s"


def table(measured: Measured) -> tuple[list[str], list[list[str]]]:
    """Column titles and rows of text.

    A row for each side and concurrency. Of a pair, a third row has the ratios of all figures; of more sides, a column
    has the ratio of the output tokens/s to the reference's.
    """
    points, names = measured.points(), measured.names
    present = {key for point in points for figures in point.figures.values() if figures for key in figures}
    keys = [key for key in FIGURES if key in present]
    titles = [FIGURES[key] for key in keys]
    pair = names == PAIR
    if not pair and keys:
        titles.insert(1, f"/ {names[0]}")
    quality = ["perplexity", "KL"] if measured.quality or measured.quality_failures else []
    titles = ["users", "side", *titles, *quality, "memory", "weights"]
    rows = []
    for point in points:
        rows += [side_row(measured, point, side.name, keys) for side in measured.sides]
        if pair:
            rows.append(ratio_row(measured, point, keys))
    return titles, rows


def side_row(measured: Measured, point: Point, side: str, keys: Sequence[str]) -> list[str]:
    users = "all" if point.concurrency is None else str(point.concurrency)
    size = size_text(next(s.bytes for s in measured.sides if s.name == side))
    figures = point.figures[side]
    if figures is None:
        reason = "failed" if point.failures[side] else "not run"
        cells = [reason] * (len(keys) + (measured.names != PAIR and bool(keys)))
        memory = "-" if cells else reason
    else:
        cells = [f"{figures[key]:.4g}" for key in keys]
        memory = size_text(point.memory[side])
        if measured.names != PAIR:
            reference = side == measured.names[0]
            cells.insert(1, "1" if reference else ratio_text(point.ratios[side].get(SPEED)))
    if measured.quality or measured.quality_failures:
        cells += quality_cells(measured, side)
    return [users, side, *cells, memory, size]


def quality_cells(measured: Measured, side: str) -> list[str]:
    found = measured.quality.get(side)
    if found is None:
        return ["failed" if side in measured.quality_failures else "not run"] * 2
    return [f"{found.perplexity:.4g}", "-" if found.kl is None else f"{found.kl:.4g}"]


def ratio_row(measured: Measured, point: Point, keys: Sequence[str]) -> list[str]:
    """sparse / dense of each column of a pair."""
    dense, sparse = PAIR
    sizes = {side.name: side.bytes for side in measured.sides}
    cells = [ratio_text(point.ratios[sparse].get(key)) for key in keys]
    if measured.quality or measured.quality_failures:
        both = [measured.quality.get(side) for side in (sparse, dense)]
        cells += [quotient(*(q and q.perplexity for q in both)), "-"]
    users = "all" if point.concurrency is None else str(point.concurrency)
    memory = quotient(point.memory[sparse], point.memory[dense])
    return [users, "ratio", *cells, memory, quotient(sizes[sparse], sizes[dense])]


def size_text(size: int | None) -> str:
    return "-" if size is None else human_size(size)


def quotient(sparse: float | None, dense: float | None) -> str:
    return f"{sparse / dense:.3f}" if sparse and dense else "-"


def ratio_text(ratio: Ratio | None) -> str:
    if ratio is None:
        return "-"
    spread = f" ({ratio.low:.3f} to {ratio.high:.3f})" if ratio.low != ratio.high else ""
    return f"{ratio.median:.3f}{spread}"


def quality_note(quality: Mapping[str, Quality], reference: str) -> str:
    """How perplexity and KL were measured."""
    one = next(iter(quality.values()))
    unlisted = max((q.unlisted for q in quality.values() if q.unlisted is not None), default=None)
    note = (
        f"Perplexity is of {one.tokens} tokens in {one.windows} windows of {one.seq_len}, from the prompt logprobs of "
        f"the server. KL is the divergence from {reference}, in nats per token: the mean of the least one that the "
        f"{one.top_logprobs} likeliest tokens of both and their logprobs allow."
    )
    if unlisted:
        note += f" At most {unlisted:.2%} of {reference}'s probability is on tokens that not both list."
    return note


def notes(measured: Measured) -> list[str]:
    """What the figures mean."""
    against = "sparse/dense" if measured.names == PAIR else f"side/{measured.names[0]}"
    lines = [
        f"Medians over repetitions. Ratios are {against} within a repetition: median (smallest to largest). Memory "
        "is the peak of the server's process tree, in which pages that its processes share count once. Weights are "
        "the sizes of the weight files."
    ]
    if measured.quality:
        lines.append(quality_note(measured.quality, measured.names[0]))
    return lines + measured.notes


def as_markdown(measured: Measured, machine: dict[str, Any], options: dict[str, Any], complete: bool) -> str:
    titles, rows = table(measured)
    lines = ["# Dense against sparse" if measured.names == PAIR else "# One model, served in several ways", ""]
    if not complete:
        lines += ["Interrupted: some runs are missing.", ""]
    for side in measured.sides:
        own = f" with `{' '.join(side.arguments)}`" if side.arguments else ""
        lines.append(f"- {side.name}: `{side.model}`{own}")
    lines += [f"- {key}: {value}" for key, value in {**machine, **options}.items() if value not in (None, "", [])]
    lines += ["", "| " + " | ".join(titles) + " |", "| " + " | ".join("---" for _ in titles) + " |"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    for note in notes(measured):
        lines += ["", note]
    failures = measured.failure_lines()
    if failures:
        lines += ["", "Failed runs:", "", *(f"- {line}" for line in failures)]
    return "\n".join(lines) + "\n"


def write(folder: Path, measured: Measured, machine: dict, options: dict, complete: bool) -> None:
    """Write bench.json and bench.md; called after every run, so that an interruption loses nothing."""
    write_json(folder, measured, machine, options, complete)
    (folder / "bench.md").write_text(as_markdown(measured, machine, options, complete))
