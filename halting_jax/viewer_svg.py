"""Drawings of the viewer as SVG text: grids, maps of steps, curves. Colours come from the page."""

import math
from collections.abc import Sequence
from html import escape

from halting_jax.viewer_marks import Mark
from halting_jax.viewer_metrics import Chart, smooth

LEVELS = 7  # shades of a map of steps
_NUMBERED_SIDE = 12  # larger maps have no room for numbers in their cells
_WIDTH, _HEIGHT = 340, 190
_STYLES = {"train": "s0", "val": "s1", "val, averaged weights": "s2"}
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 12, 26


def grid(marks: Sequence[Mark], side: int, title: str, right: Sequence[bool] | None = None) -> str:
    """A square grid of cells.

    Args:
      marks: side * side, row by row.
      side: cells per row.
      title: what it shows, for readers and tooltips.
      right: per cell, False crosses it; None draws no crosses.
    """
    body = f'<g class="cells">{cells(marks, side)}</g>{_lines(side)}'
    if right is not None:
        body += f'<path class="diff" d="{crosses(right, side)}"/>'
    return _square(side, title, body)


def heat(values: Sequence[float], side: int, title: str) -> str:
    """A square map of numbers, darker for more; see `legend`."""
    levels = level_of(values)
    by_level: dict[int, list[int]] = {}
    for place, level in enumerate(levels):
        by_level.setdefault(level, []).append(place)
    body = "".join(
        f'<path class="h{level}" d="{squares(places, side)}"/>'
        for level, places in sorted(by_level.items())
    )
    if side <= _NUMBERED_SIDE:
        body += "".join(
            f'<text class="on-h{levels[i]}" x="{i % side + 0.5}" y="{i // side + 0.68}">'
            f"{number(value)}</text>"
            for i, value in enumerate(values)
        )
    return _square(side, title, body + _lines(side))


def cells(marks: Sequence[Mark], side: int) -> str:
    """The inside of a grid: one path per kind of cell, and the symbols."""
    by_kind: dict[str, list[int]] = {}
    for place, mark in enumerate(marks):
        by_kind.setdefault(mark.kind, []).append(place)
    paths = [
        f'<path class="{kind}" d="{squares(places, side)}"/>' for kind, places in by_kind.items()
    ]
    texts = [
        f'<text class="on-{mark.kind}" x="{i % side + 0.5}" y="{i // side + 0.72}">'
        f"{escape(mark.text)}</text>"
        for i, mark in enumerate(marks)
        if mark.text and mark.kind != "path"
    ]
    return "".join(paths + texts)


def squares(places: Sequence[int], side: int) -> str:
    """Path data of whole cells; neighbours in a row are joined."""
    parts, i = [], 0
    while i < len(places):
        first = places[i]
        width = 1
        while (
            i + 1 < len(places) and places[i + 1] == places[i] + 1 and (places[i] + 1) % side != 0
        ):
            i, width = i + 1, width + 1
        parts.append(f"M{first % side} {first // side}h{width}v1h-{width}z")
        i += 1
    return "".join(parts)


def crosses(right: Sequence[bool], side: int) -> str:
    """Path data of a cross in every cell that is not right."""
    return "".join(
        f"M{i % side + 0.1:g} {i // side + 0.1:g}l.8 .8m0-.8l-.8 .8"
        for i, good in enumerate(right)
        if not good
    )


def level_of(values: Sequence[float]) -> list[int]:
    """The shade 0..6 of every number, from the smallest to the largest."""
    if not values:
        return []
    low, high = min(values), max(values)
    if high == low:
        return [LEVELS // 2] * len(values)
    return [min(int((v - low) / (high - low) * (LEVELS - 1) + 0.5), LEVELS - 1) for v in values]


def legend(values: Sequence[float], unit: str) -> str:
    """What the shades of `heat` mean: one entry per shade that occurs, with its numbers."""
    ranges: dict[int, list[float]] = {}
    for value, level in zip(values, level_of(values), strict=True):
        ranges.setdefault(level, []).append(value)
    entries = []
    for level, found in sorted(ranges.items()):
        low, high = min(found), max(found)
        text = number(low) if low == high else f"{number(low)} to {number(high)}"
        entries.append(f'<li><span class="swatch h{level}"></span>{text}</li>')
    return f'<ul class="legend"><li class="unit">{escape(unit)}</li>{"".join(entries)}</ul>'


def number(value: float) -> str:
    """A short decimal."""
    return f"{value:.0f}" if float(value).is_integer() else f"{value:.2g}"


def halting(curve: Sequence[float], mean_steps: float, title: str) -> str:
    """The halting curve: a point per inner step, a line at the mean number of steps taken.

    The element `now` marks the step that the slider shows; the page's script moves it.
    """
    count = len(curve)
    view = _View((1.0, float(max(count, 2))), (0.0, 1.0))
    points = [(view.x(i + 1), view.y(min(max(v, 0.0), 1.0))) for i, v in enumerate(curve)]
    dots = "".join(
        f'<circle class="s0" cx="{x:.1f}" cy="{y:.1f}" r="3"><title>step {i + 1}: '
        f"{curve[i]:.3f}</title></circle>"
        for i, (x, y) in enumerate(points)
    )
    taken = view.x(min(max(mean_steps, 1.0), float(max(count, 2))))
    ticks = [tick for tick in _round_ticks(1, max(count, 2)) if tick.is_integer()]
    body = (
        view.frame(ticks, [0.0, 0.5, 1.0])
        + f'<line class="taken" x1="{taken:.1f}" x2="{taken:.1f}" y1="{_TOP}" '
        f'y2="{_HEIGHT - _BOTTOM}"/>'
        + f'<line class="now" hidden x1="{_LEFT}" x2="{_LEFT}" y1="{_TOP}" '
        f'y2="{_HEIGHT - _BOTTOM}"/>' + f'<polyline class="s0" points="{_points(points)}"/>{dots}'
    )
    scale = f'data-x0="{view.x(0):.3f}" data-dx="{view.x(1) - view.x(0):.3f}"'
    return _plot(title, body, f"halting {scale}")


def line_chart(chart: Chart, window: int) -> str:
    """Curves of one quantity: what was measured, faint, and its rolling mean.

    The attributes x0, dx, y0, dy map data to the drawing, so that the page's script can draw
    another rolling mean.
    """
    all_x = [x for curve in chart.series for x in curve.x]
    all_y = [y for curve in chart.series for y in curve.y if math.isfinite(y)]
    if not all_x or not all_y:
        return ""
    view = _View(_span(min(all_x), max(all_x), 0.0), _span(min(all_y), max(all_y), 0.05))
    parts = [view.frame(_round_ticks(*view.xs), _round_ticks(*view.ys, 4))]
    for number_, curve in enumerate(chart.series):
        raw = [(view.x(x), view.y(y)) for x, y in zip(curve.x, curve.y, strict=True)]
        means = [
            (view.x(x), view.y(y)) for x, y in zip(curve.x, smooth(curve.y, window), strict=True)
        ]
        style = style_of(curve.name)
        parts.append(f'<polyline class="raw {style}" points="{_points(raw)}"/>')
        if len(means) == 1:
            x, y = means[0]
            parts.append(f'<circle class="{style}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>')
        parts.append(
            f'<polyline class="mean {style}" data-series="{number_}" points="{_points(means)}"/>'
        )
    dx, dy = view.x(1) - view.x(0), view.y(1) - view.y(0)
    scale = (
        f'data-x0="{view.x(0):.6g}" data-dx="{dx:.8g}" data-y0="{view.y(0):.6g}" data-dy="{dy:.8g}"'
    )
    last = ", ".join(f"{c.name} {c.y[-1]:.4g}" for c in chart.series)
    return _plot(f"{chart.title}, at the end: {last}", "".join(parts), f"curve {scale}")


def style_of(series: str) -> str:
    """The line style of a curve, the same for one split in every chart."""
    return _STYLES.get(series, "s3")


class _View:
    """Maps data to the drawing."""

    def __init__(self, xs: tuple[float, float], ys: tuple[float, float]) -> None:
        self.xs, self.ys = xs, ys

    def x(self, value: float) -> float:
        low, high = self.xs
        return _LEFT + (value - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        low, high = self.ys
        return _HEIGHT - _BOTTOM - (value - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    def frame(self, x_ticks: Sequence[float], y_ticks: Sequence[float]) -> str:
        """Grid lines and numbers."""
        parts = []
        for tick in y_ticks:
            y = self.y(tick)
            parts.append(
                f'<line class="rule" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" '
                f'y2="{y:.1f}"/><text class="tick y" x="{_LEFT - 6}" y="{y + 4:.1f}">'
                f"{_tick(tick)}</text>"
            )
        for tick in x_ticks:
            parts.append(
                f'<text class="tick x" x="{self.x(tick):.1f}" y="{_HEIGHT - 8}">{_tick(tick)}'
                "</text>"
            )
        return "".join(parts)


def _square(side: int, title: str, body: str) -> str:
    name = escape(title, quote=True)
    return (
        f'<svg class="grid" viewBox="-0.04 -0.04 {side + 0.08:g} {side + 0.08:g}" role="img" '
        f'tabindex="0" aria-label="{name}" data-side="{side}">{body}'
        f'<rect class="cursor" hidden width="1" height="1"/></svg>'
    )


def _lines(side: int) -> str:
    data = "".join(f"M0 {i}h{side}M{i} 0v{side}" for i in range(side + 1))
    return f'<path class="lines" d="{data}"/>'


def _plot(title: str, body: str, kind: str) -> str:
    name, _, rest = kind.partition(" ")
    return (
        f'<svg class="plot {name}" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(title, quote=True)}" {rest}>{body}</svg>'
    )


def _points(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points if math.isfinite(y))


def _span(low: float, high: float, margin: float) -> tuple[float, float]:
    if high == low:
        wide = abs(low) * 0.1 or 1.0
        return low - wide, high + wide
    return low - margin * (high - low), high + margin * (high - low)


def _round_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers between two others."""
    rough = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= rough * 0.75)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _tick(value: float) -> str:
    if value == 0:
        return "0"
    if abs(value) >= 1e4:
        return f"{value / 1000:g}k"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
