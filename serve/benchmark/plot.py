"""bench.png: speed against the number of users, and against perplexity and divergence if they were measured."""

from pathlib import Path
from typing import Any

from ria_vllm.serve.benchmark.results import Measured

SPEEDS = {
    "output_throughput": "output tokens/s",
    "p50_ttft_ms": "time to first token, ms (p50)",
    "p50_tpot_ms": "time per output token, ms (p50)",
}
QUALITIES = {"perplexity": "perplexity (lower is better)", "kl": "KL from the first side, nats per token"}


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
