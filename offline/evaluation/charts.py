"""Small line and bar charts as SVG text, drawn without a library so that a page needs nothing but itself."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import floor, log10

WIDTH, HEIGHT = 300, 170
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 26, 30


@dataclass(frozen=True)
class Series:
    """One line: (x, y) points in order of x, drawn in the CSS class `style`."""

    label: str
    style: str
    points: Sequence[tuple[float, float]]


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers in [low, high]."""
    if high <= low:
        return [low]
    raw = (high - low) / count
    unit = 10 ** floor(log10(raw))
    step = next(m * unit for m in (1, 2, 2.5, 5, 10) if raw <= m * unit * 1.0001)
    first = -(-low // step)
    found = []
    while (first + len(found)) * step <= high + step * 1e-6:
        found.append((first + len(found)) * step)
    return found


def line_chart(title: str, series: Sequence[Series], x_label: str, from_zero: bool = False) -> str:
    """An <svg> with one line per series, and a tooltip on every point."""
    xs = [x for s in series for x, _ in s.points]
    ys = [y for s in series for _, y in s.points]
    low, high = (0.0 if from_zero else min(ys)), max(ys)
    margin = (high - low) * 0.08 or abs(high) * 0.05 or 1.0
    low, high = (low if from_zero else low - margin), high + margin
    x_low, x_high = min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1

    def across(x: float) -> float:
        return LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def down(y: float) -> float:
        return HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<text class="title" x="{LEFT}" y="15">{escape(title)}</text>']
    for y in ticks(low, high):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{down(y):.1f}" y2="{down(y):.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 5}" y="{down(y) + 3:.1f}" text-anchor="end">{y:.4g}</text>')
    for x in (tick for tick in ticks(x_low, x_high, 5) if tick == int(tick)):
        parts.append(
            f'<text class="tick" x="{across(x):.1f}" y="{HEIGHT - BOTTOM + 13}" text-anchor="middle">{x:.0f}</text>'
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="tick" x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text>')
    for s in series:
        path = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in s.points)
        parts.append(f'<polyline class="{s.style}" points="{path}"/>')
        for x, y in s.points:
            tip = escape(f"{s.label}, {x_label} {x:g}: {y:.4g}")
            parts.append(
                f'<circle class="{s.style}" cx="{across(x):.1f}" cy="{down(y):.1f}" r="2"><title>{tip}</title></circle>'
            )
    return svg(WIDTH, HEIGHT, title, parts)


def bar_chart(title: str, bars: Sequence[tuple[str, float, str, str]]) -> str:
    """Horizontal bars from zero: (label, value, text beside it, CSS class)."""
    width, row, label_width = 640, 30, 210
    longest = max((value for _, value, _, _ in bars), default=0) or 1.0
    parts = []
    for number, (label, value, text, style) in enumerate(bars):
        y = 8 + number * row
        length = max(value / longest * (width - label_width - 150), 1)
        parts.append(f'<text class="label" x="{label_width - 8}" y="{y + 15}" text-anchor="end">{escape(label)}</text>')
        parts.append(f'<rect class="{style}" x="{label_width}" y="{y}" width="{length:.1f}" height="20" rx="2"/>')
        parts.append(f'<text class="label" x="{label_width + length + 8:.1f}" y="{y + 15}">{escape(text)}</text>')
    return svg(width, 12 + row * len(bars), title, parts)


def svg(width: int, height: int, title: str, parts: Sequence[str]) -> str:
    return (
        f'<svg role="img" aria-label="{escape(title)}" '
        f'viewBox="0 0 {width} {height}" width="{width}" height="{height}">' + "".join(parts) + "</svg>"
    )
