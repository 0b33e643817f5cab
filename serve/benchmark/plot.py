"""bench.png: throughput, time to first token and time per output token against the number of users."""

from collections.abc import Sequence
from pathlib import Path

from ria_vllm.serve.benchmark.results import Measured, Point

PANELS = {
    "output_tokens_per_s": "output tokens/s",
    "ttft_p50_ms": "time to first token, ms (p50)",
    "tpot_p50_ms": "time per output token, ms (p50)",
}
GREY, ORANGE = "#7a7a7a", "#c2410c"
# Of the sides after the reference, which is grey.
PALETTE = (ORANGE, "#1d4ed8", "#15803d", "#a21caf", "#06b6d4", "#facc15", "#be123c", "#4d7c0f", "#6d28d9")


def colours(names: Sequence[str]) -> dict[str, str]:
    """Side -> colour."""
    return {name: PALETTE[(n - 1) % len(PALETTE)] if n else GREY for n, name in enumerate(names)}


def plot(path: Path, measured: Measured, title: str) -> None:
    """Draw medians as lines and every run as a dot. Points without figures are left out; none left, no file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    points = measured.points()
    if not any(figures for point in points for figures in point.figures.values()):
        return
    if all(point.concurrency is None for point in points):
        figure = bars(pyplot, points[0])
    else:
        figure = lines(pyplot, points, measured)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def lines(pyplot, points: Sequence[Point], measured: Measured):
    """One panel for each of PANELS, over the numbers of users."""
    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(13, 4), layout="constrained")
    users = [point.concurrency for point in points]
    for axis, (key, label) in zip(axes, PANELS.items(), strict=True):
        for side, colour in colours(measured.names).items():
            drawn = [(p.concurrency, figures[key]) for p in points if (figures := p.figures[side])]
            if not drawn:
                continue
            axis.plot(*zip(*drawn, strict=True), "-", color=colour, label=side)
            whole = {concurrency for concurrency, _ in drawn}
            dots = [
                (run.concurrency, run.outcome.figures[key])
                for run in measured.runs
                if run.side == side and run.outcome.figures and run.concurrency in whole
            ]
            axis.plot(*zip(*dots, strict=True), "o", color=colour, markersize=4, alpha=0.6)
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
    """Offline throughput of all sides."""
    figure, axis = pyplot.subplots(figsize=(max(5, 1.5 * len(point.figures)), 4), layout="constrained")
    for side, colour in colours(tuple(point.figures)).items():
        figures = point.figures[side]
        if figures:
            drawn = axis.bar([side], [figures["output_tokens_per_s"]], color=colour)
            axis.bar_label(drawn, fmt="%.4g")
    axis.set_ylabel("output tokens/s, offline")
    return figure
