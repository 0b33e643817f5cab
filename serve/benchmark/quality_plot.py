"""quality.png: throughput and time per token against perplexity and against the divergence from the reference."""

import math
from collections.abc import Sequence
from pathlib import Path

from ria_vllm.serve.benchmark.plot import colours
from ria_vllm.serve.benchmark.results import Measured

ROWS = {"output_tokens_per_s": "output tokens/s", "tpot_p50_ms": "time per output token, ms (p50)"}
COLUMNS = {"perplexity": "perplexity (lower is better)", "kl": "KL from {reference}, nats per token"}
MARKERS = "osD^vP*X"


def plot(path: Path, measured: Measured, title: str) -> None:
    """Draw a line for each side with a point for each number of users. Nothing to draw, no file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = draw(pyplot, measured)
    if figure is None:
        return
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def draw(pyplot, measured: Measured):
    """Two rows and two columns of panels; None without a side that has both speed and quality.

    A side's quality does not depend on the number of users, so its line is vertical. A thin line for each number of
    users joins the sides that no other side beats in both.
    """
    points = [point for point in measured.points() if point.concurrency is not None]
    if not any(point.figures[side] for point in points for side in measured.quality):
        return None
    figure, axes = pyplot.subplots(len(ROWS), len(COLUMNS), figsize=(12, 8), layout="constrained", sharey="row")
    marker_of = {point.concurrency: MARKERS[n % len(MARKERS)] for n, point in enumerate(points)}
    for row, (figure_name, height) in zip(axes, ROWS.items(), strict=True):
        for axis, (quality_name, width) in zip(row, COLUMNS.items(), strict=True):
            x = {side: getattr(quality, quality_name) for side, quality in measured.quality.items()}
            x = {side: value for side, value in x.items() if value is not None}
            for side, colour in colours(measured.names).items():
                drawn = [(p.concurrency, f[figure_name]) for p in points if side in x and (f := p.figures[side])]
                if not drawn:
                    continue
                axis.plot([x[side]] * len(drawn), [y for _, y in drawn], "-", color=colour, label=side, linewidth=1)
                for users, y in drawn:
                    axis.plot([x[side]], [y], marker_of[users], color=colour, markersize=7)
            for point in points:
                speeds = {side: f[figure_name] for side in x if (f := point.figures[side])}
                best = frontier([(x[side], y) for side, y in speeds.items()], figure_name == "output_tokens_per_s")
                if len(best) > 1:
                    axis.plot(*zip(*best, strict=True), ":", color="black", linewidth=0.8, alpha=0.6)
            axis.set_xlabel(width.format(reference=measured.names[0]))
            axis.set_yscale("log")
            plain_labels(axis.yaxis)
            axis.grid(alpha=0.25)
            scale_quality(axis, quality_name, list(x.values()))
        row[0].set_ylabel(height)
    users = [
        pyplot.Line2D([], [], color="black", marker=marker, linestyle="", label=f"{users} user{'s' * (users > 1)}")
        for users, marker in marker_of.items()
    ]
    figure.legend(
        handles=[*axes[0][0].get_legend_handles_labels()[0], *users], loc="outside right upper", frameon=False
    )
    return figure


def frontier(points: Sequence[tuple[float, float]], higher: bool) -> list[tuple[float, float]]:
    """The points that no other beats in both, by ascending first coordinate. Lower is better in the first.

    Args:
        higher: whether higher is better in the second.
    """
    best: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0], -point[1] if higher else point[1])):
        if not best or ((y > best[-1][1]) == higher and y != best[-1][1]):
            best.append((x, y))
    return best


def plain_labels(axis) -> None:
    """Label a logarithmic axis with 200 instead of 2 x 10^2."""
    from matplotlib.ticker import LogFormatter

    axis.set_major_formatter(LogFormatter())
    axis.set_minor_formatter(LogFormatter(labelOnlyBase=False))


def scale_quality(axis, name: str, values: Sequence[float]) -> None:
    """Logarithmic, so that int8 and 2:4 fit into one panel; linear near 0 for divergences, as the reference's is 0."""
    positive = [value for value in values if value > 0]
    if name == "perplexity":
        axis.set_xscale("log")
        plain_labels(axis.xaxis)
    elif positive:
        axis.set_xscale("symlog", linthresh=min(positive), linscale=0.5)
        decades = range(math.ceil(math.log10(min(positive))), math.ceil(math.log10(max(positive))) + 1)
        axis.set_xticks([0, *(10.0**decade for decade in decades)], ["0", *(f"{10.0**decade:g}" for decade in decades)])
