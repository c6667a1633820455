"""Drawings as SVG text: a learning curve, and intervals side by side. Colours come from the page's stylesheet."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from fulltune.report.format import words
from fulltune.report.run.history import Point, not_finite
from fulltune.text import is_share

WIDTH = 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 14, 36
_CURVE_HEIGHT = 220
_MOST_POINTS = 300
_MOST_DOTS = 20
_DECADES_FOR_LOG = 2.0
_NAME_LETTERS, _NAME_HEIGHT = 56, 15
"""Of a line of a name in the interval plot."""


@dataclass(frozen=True)
class Bar:
    """One row of the interval plot."""

    name: str
    kind: str
    """Shape and colour: `baseline`, `untouched` or `trained`."""
    value: float
    low: float
    high: float
    text: str


def learning_curve(
    title: str, points: Sequence[Point], metric: str, kept_step: int | None = None, restarts: Sequence[int] = ()
) -> str:
    """Draw one series over the optimizer steps.

    Args:
        title: What is drawn; also the accessible name.
        points: Step and value, in order. Values that are not finite break the line and are counted in the description.
        metric: Name of the series; decides how values are written.
        kept_step: Step whose weights were kept, marked with a ring and a vertical line.
        restarts: Steps at which a later attempt took over, marked with short ticks on the axis.

    Returns:
        An `<svg>` element.
    """
    finite = [(step, value) for step, value in points if math.isfinite(value)]
    described = curve_in_words(points, metric, kept_step)
    if not finite:
        return _svg(title, described, _CURVE_HEIGHT, _text(WIDTH / 2, 110, "no finite value was logged", "middle"))
    across = _scale(points[0][0], points[-1][0], _LEFT, WIDTH - _RIGHT)
    low, high = min(value for _, value in finite), max(value for _, value in finite)
    # A schedule that ends near zero would look like a cliff on a log scale.
    logarithmic = metric != "learning_rate" and low > 0 and math.log10(high / low) > _DECADES_FOR_LOG
    bend = math.log10 if logarithmic else float
    ticks = _decades(low, high) if logarithmic else _ticks(metric, low, high)
    bottom = _CURVE_HEIGHT - _BOTTOM
    height = _scale(bend(min(low, ticks[0])), bend(max(high, ticks[-1])), bottom, _TOP)

    parts = []
    for tick in ticks:
        y = height(bend(tick))
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(_LEFT - 6, y + 4, words.tick(metric, tick), "end"))
    for tick in nice_ticks(points[0][0], points[-1][0], 4, whole=True):
        if points[0][0] <= tick <= points[-1][0]:
            parts.append(_text(across(tick), bottom + 16, f"{tick:,.0f}", "middle"))
    axis = "optimizer step" + (" (value on a log scale)" if logarithmic else "")
    parts.append(_text((_LEFT + WIDTH - _RIGHT) / 2, _CURVE_HEIGHT - 4, axis, "middle"))
    for step in restarts:
        if points[0][0] <= step <= points[-1][0]:
            x = across(step)
            parts.append(f'<line class="restart" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom - 8}" y2="{bottom + 4}"/>')
    for run in _finite_runs(points):
        drawn = [(across(step), height(bend(value))) for step, value in _thinned(run)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in drawn)
        parts.append(f'<polyline class="curve" points="{path}"/>')
        if len(drawn) <= _MOST_DOTS:
            parts.extend(f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in drawn)
    for step, value in finite:
        if step == kept_step:
            x, y = across(step), height(bend(value))
            parts.append(f'<line class="kept" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{bottom}"/>')
            parts.append(f'<circle class="ring" cx="{x:.1f}" cy="{y:.1f}" r="6"/>')
    return _svg(title, described, _CURVE_HEIGHT, "".join(parts))


def interval_plot(title: str, bars: Sequence[Bar], metric: str) -> str:
    """Draw value and interval of every row on one common axis, the name above each.

    Args:
        title: What is drawn; also the accessible name.
        bars: Rows from top to bottom; a row that is not finite is named without a mark.
        metric: The metric's name; decides how the axis is written.
    """
    side, room = 20, 64  # the value stands right of its mark, where no mark can be
    names = [textwrap.wrap(bar.name, _NAME_LETTERS) or [""] for bar in bars]
    tops = [8.0]
    for lines in names:
        tops.append(tops[-1] + _NAME_HEIGHT * len(lines) + 31)
    bottom = tops[-1]
    finite = [value for bar in bars for value in (bar.value, bar.low, bar.high) if math.isfinite(value)]
    ticks = _ticks(metric, min(finite, default=0.0), max(finite, default=1.0))
    across = _scale(min([*finite, ticks[0]]), max([*finite, ticks[-1]]), side, WIDTH - room)
    parts = []
    for tick in ticks:
        x = across(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="{bottom:.0f}"/>')
        parts.append(_text(x, bottom + 16, words.tick(metric, tick), "middle"))
    for bar, lines, y in zip(bars, names, tops, strict=False):
        for line in lines:
            y += _NAME_HEIGHT
            parts.append(_text(2, y - 3, line, "start", "name"))
        parts.append(_text(WIDTH - 2, y + 14, bar.text, "end", "name"))
        if not all(math.isfinite(value) for value in (bar.value, bar.low, bar.high)):
            continue
        left, middle, right, y = across(bar.low), across(bar.value), across(bar.high), y + 10
        parts.append(
            f'<g class="{escape(bar.kind)}"><path class="whisker" d="M{left:.1f} {y - 7}v14m0 -7H{right:.1f}m0 -7v14"/>'
        )
        parts.append(_mark(bar.kind, middle, y) + "</g>")
    described = "; ".join(f"{bar.name}: {bar.text}" for bar in bars) + "."
    return _svg(title, described, round(bottom) + 24, "".join(parts))


def nice_ticks(low: float, high: float, about: int, whole: bool = False) -> list[float]:
    """Round numbers that cover `low` to `high`: multiples of 1, 2 or 5 times a power of ten.

    Args:
        low: Smallest value.
        high: Largest value, at least `low`.
        about: How many steps are wanted.
        whole: Only whole numbers.
    """
    if high == low:
        room = abs(high) * 0.1 or 1.0
        low, high = low - room, high + room
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * (1 - 1e-9))
    if whole:
        step = max(1.0, step)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def _ticks(metric: str, low: float, high: float) -> list[float]:
    """Nice ticks; a share never needs one below 0 or above 1."""
    ticks = nice_ticks(low, high, 4)
    return [tick for tick in ticks if -1e-9 <= tick <= 1 + 1e-9] if is_share(metric) else ticks


def _decades(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = max(1, math.ceil((last - first) / 5))
    return [10.0**power for power in range(first, last + every, every)]


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """Map `low`..`high` to `start`..`end`; a single value goes to the middle."""
    if high == low:
        return lambda value: (start + end) / 2
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _finite_runs(points: Sequence[Point]) -> list[list[Point]]:
    runs: list[list[Point]] = [[]]
    for step, value in points:
        if math.isfinite(value):
            runs[-1].append((step, value))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _thinned(points: Sequence[Point]) -> list[Point]:
    """At most about `_MOST_POINTS` points: of each stretch the lowest and the highest, so that spikes stay visible."""
    if len(points) <= _MOST_POINTS:
        return list(points)
    stretch = math.ceil(2 * len(points) / _MOST_POINTS)
    kept = []
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        kept += sorted({min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])})
    return sorted({points[0], *kept, points[-1]})


def curve_in_words(points: Sequence[Point], metric: str, kept_step: int | None = None) -> str:
    """Say what a learning curve shows: first and last value, the kept step, values that were not finite."""
    finite = [(step, words.metric(metric, value)) for step, value in points if math.isfinite(value)]
    if not finite:
        return "no finite value was logged."
    (first, start), (last, end) = finite[0], finite[-1]
    text = (
        f"{start} at step {first:,}" if first == last else f"from {start} at step {first:,} to {end} at step {last:,}"
    )
    text += "".join(f"; kept: step {step:,} with {value}" for step, value in finite if step == kept_step)
    lost = not_finite(points)
    return text + (f"; {words.counted(len(lost), 'value')} not finite, first at step {lost[0]:,}." if lost else ".")


def _mark(kind: str, x: float, y: float) -> str:
    """Shape says the kind as well as colour does: circle, square, and a filled diamond for trained models."""
    match kind:
        case "trained":
            return f'<path class="mark" d="M{x:.1f} {y - 5}l5 5l-5 5l-5 -5z"/>'
        case "untouched":
            return f'<rect class="mark" x="{x - 4:.1f}" y="{y - 4}" width="8" height="8"/>'
        case _:
            return f'<circle class="mark" cx="{x:.1f}" cy="{y}" r="4"/>'


def _text(x: float, y: float, text: str, anchor: str, style: str = "tick") -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(title: str, described: str, height: int, inside: str) -> str:
    label = f"<title>{escape(title)}</title><desc>{escape(described)}</desc>"
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">{label}{inside}</svg>'
