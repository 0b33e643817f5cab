"""bench.png: throughput, time to first token and time per output token against the number of users."""

from collections.abc import Sequence
from pathlib import Path

from ria_vllm.serve.benchmark.results import DENSE, SPARSE, Point, Run, summarise

PANELS = {
    "output_tokens_per_s": "output tokens/s",
    "ttft_p50_ms": "time to first token, ms (p50)",
    "tpot_p50_ms": "time per output token, ms (p50)",
}
COLOURS = {DENSE: "#7a7a7a", SPARSE: "#c2410c"}


def plot(path: Path, runs: Sequence[Run], title: str) -> None:
    """Draw medians as lines and every run as a dot. Points without figures are left out; none left, no file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    points = summarise(runs)
    if not any(point.figures[side] for point in points for side in (DENSE, SPARSE)):
        return
    if all(point.concurrency is None for point in points):
        figure = bars(pyplot, points[0])
    else:
        figure = lines(pyplot, points, runs)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def lines(pyplot, points: Sequence[Point], runs: Sequence[Run]):
    """One panel for each of PANELS, over the numbers of users."""
    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(13, 4), layout="constrained")
    users = [point.concurrency for point in points]
    for axis, (key, label) in zip(axes, PANELS.items(), strict=True):
        for side in (DENSE, SPARSE):
            drawn = [(p.concurrency, p.figures[side][key]) for p in points if p.figures[side]]
            if not drawn:
                continue
            axis.plot(*zip(*drawn, strict=True), "-", color=COLOURS[side], label=side)
            whole = {concurrency for concurrency, _ in drawn}
            dots = [
                (run.concurrency, run.outcome.figures[key])
                for run in runs
                if run.side == side and run.outcome.figures and run.concurrency in whole
            ]
            axis.plot(*zip(*dots, strict=True), "o", color=COLOURS[side], markersize=4, alpha=0.6)
        axis.set_xscale("log", base=2)
        axis.set_xticks(users, [str(u) for u in users])
        axis.minorticks_off()
        axis.set_ylim(bottom=0)
        axis.set_xlabel("users at once")
        axis.set_title(label, fontsize=10)
        axis.grid(alpha=0.25)
        axis.legend(frameon=False)
    return figure


def bars(pyplot, point: Point):
    """Offline throughput of both sides."""
    figure, axis = pyplot.subplots(figsize=(5, 4), layout="constrained")
    for side in (DENSE, SPARSE):
        figures = point.figures[side]
        if figures:
            drawn = axis.bar([side], [figures["output_tokens_per_s"]], color=COLOURS[side])
            axis.bar_label(drawn, fmt="%.4g")
    axis.set_ylabel("output tokens/s, offline")
    return figure
