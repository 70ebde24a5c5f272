"""Charts as inline SVG. Colours are classes of the page's style sheet, so they follow dark mode; text is escaped."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 520, 300
LEFT, RIGHT, TOP, BOTTOM = 46, 16, 12, 40
PERCENT = (0.0, 20.0, 40.0, 60.0, 80.0, 100.0)

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """A curve: its label, the number of its style (`s0` to `s3`: colour, dash and marker), its points."""

    label: str
    style: int
    points: Points


@dataclass(frozen=True)
class Axis:
    """Values from `low` to `high` along an axis, equal steps or equal factors, with marks that are labelled."""

    low: float
    high: float
    marks: Sequence[float]
    title: str
    is_log: bool = False

    def place(self, value: float) -> float:
        """0 at `low`, 1 at `high`."""
        low, high, at = (math.log(v) if self.is_log else v for v in (self.low, self.high, value))
        return (at - low) / (high - low) if high > low else 0.5


def line_chart(title: str, across: Axis, up: Axis, lines: Sequence[Line], under: str = "", *, dots: bool = True) -> str:
    """A figure of curves with a legend. `under` is SVG that is drawn behind them."""
    x, y = _places(across, up)
    parts = [_grid(across, up), under]
    for line in lines:
        points = [(x(a), y(b)) for a, b in line.points if across.low <= a <= across.high]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        parts.append(f'<polyline class="line s{line.style}" points="{path}"/>')
        parts += [_marker(a, b, line.style) for a, b in points] if dots else []
    legend = "".join(
        f'<li><svg class="key" viewBox="0 0 28 12" aria-hidden="true"><polyline class="line s{line.style}" '
        f'points="1,6 27,6"/>{_marker(14, 6, line.style) if dots else ""}</svg>{escape(line.label)}</li>'
        for line in lines
    )
    return _figure(title, "".join(parts), f'<ul class="legend">{legend}</ul>')


def bars(across: Axis, up: Axis, heights: Sequence[tuple[float, float, float]], style: str) -> str:
    """SVG of bars: left and right edge, height."""
    x, y = _places(across, up)
    return "".join(
        f'<rect class="{style}" x="{x(left) + 1:.1f}" y="{y(height):.1f}" width="{max(0, x(right) - x(left) - 2):.1f}" '
        f'height="{max(0.0, y(up.low) - y(height)):.1f}"/>'
        for left, right, height in heights
    )


def diagonal(across: Axis, up: Axis) -> str:
    """SVG of the line on which both axes are equal."""
    x, y = _places(across, up)
    return f'<path class="diagonal" d="M{x(across.low):.1f},{y(up.low):.1f}L{x(across.high):.1f},{y(up.high):.1f}"/>'


def bar_chart(title: str, across: Axis, up: Axis, heights: Sequence[tuple[float, float, float]]) -> str:
    """A histogram."""
    return _figure(title, _grid(across, up) + bars(across, up, heights, "bar"), "")


def _places(across: Axis, up: Axis) -> tuple[Callable[[float], float], Callable[[float], float]]:
    return (
        lambda value: LEFT + across.place(value) * (WIDTH - LEFT - RIGHT),
        lambda value: HEIGHT - BOTTOM - up.place(value) * (HEIGHT - TOP - BOTTOM),
    )


def _grid(across: Axis, up: Axis) -> str:
    x, y = _places(across, up)
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = [
        f'<path class="grid" d="M{LEFT},{y(mark):.1f}H{right}"/>'
        f'<text class="mark" x="{LEFT - 8}" y="{y(mark) + 4:.1f}" text-anchor="end">{_number(mark)}</text>'
        for mark in up.marks
    ]
    parts += [
        f'<path class="tick" d="M{x(mark):.1f},{bottom}v4"/>'
        f'<text class="mark" x="{x(mark):.1f}" y="{bottom + 18}" text-anchor="middle">{_number(mark)}</text>'
        for mark in across.marks
    ]
    parts.append(f'<path class="axis" d="M{LEFT},{bottom}H{right}"/>')
    parts.append(f'<text class="title" x="{right}" y="{HEIGHT - 4}" text-anchor="end">{escape(across.title)}</text>')
    return "".join(parts)


def _marker(x: float, y: float, style: int) -> str:
    """A shape for each style: circle, square, triangle, diamond; colours alone would not do."""
    shapes = (
        f'<circle class="dot s{style}" cx="{x:.1f}" cy="{y:.1f}" r="3.6"/>',
        f'<rect class="dot s{style}" x="{x - 3.3:.1f}" y="{y - 3.3:.1f}" width="6.6" height="6.6"/>',
        f'<path class="dot s{style}" d="M{x:.1f},{y - 4.4:.1f}l4.3,7.6h-8.6z"/>',
        f'<path class="dot s{style}" d="M{x:.1f},{y - 4.8:.1f}l4.4,4.8l-4.4,4.8l-4.4,-4.8z"/>',
    )
    return shapes[style % len(shapes)]


def _figure(title: str, inside: str, below: str) -> str:
    name = escape(title, quote=True)
    return (
        f'<figure><figcaption>{name}</figcaption><svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{name}">{inside}</svg>{below}</figure>'
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1 or value == 0 else f"{value:g}"
