"""Quality against cost: where marks and their names go. `curves`' page draws it as SVG, `picture` as PNG.

One layout for both: a drawing is a list of shapes in a box of `WIDTH` by `HEIGHT`, y downwards.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Literal

from fulltune.report.format.curves import nice_ticks

WIDTH, HEIGHT = 400, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 16, 26, 40
_LETTER, _LINE = 6.7, 14.0
"""Size of a name's letter: wide enough for every font it may be drawn in."""
_MARK = 6.0
_HALF, _FARTHEST = 4.5, 14
"""Half of what an arm needs for itself, and how far it may be moved to get it: more would misplace it."""
_STRIP = 30.0
"""Room at the axis' worse end for arms that are only pointed at."""
_LONGEST_NAME = 22
_MOST_OF_SPAN = 4.0
"""Arms so bad that they would make the axis this many times longer are pointed at instead of shown."""


@dataclass(frozen=True)
class Dot:
    """An arm: what it costs and what it gives."""

    name: str
    cost: float
    """Full fine-tuning's is 1."""
    value: float
    low: float
    high: float
    text: str
    """The value in words."""
    full: bool = False
    """It is full fine-tuning."""
    taken: bool = False
    """It is the one to take."""


@dataclass(frozen=True)
class Line:
    x1: float
    y1: float
    x2: float
    y2: float
    style: Literal["grid", "whisker", "leader"]
    taken: bool = False


@dataclass(frozen=True)
class Band:
    """From full fine-tuning minus the margin to full plus it."""

    y1: float
    y2: float


@dataclass(frozen=True)
class Label:
    x: float
    y: float
    """Of the letters' foot."""
    text: str
    anchor: Literal["start", "middle", "end"]
    style: Literal["tick", "name"] = "tick"


@dataclass(frozen=True)
class Mark:
    x: float
    y: float
    shape: Literal["square", "circle", "down", "up"]
    taken: bool
    """Filled."""


Shape = Line | Band | Label | Mark


@dataclass(frozen=True)
class Drawing:
    title: str
    words: str
    shapes: tuple[Shape, ...]


@dataclass(frozen=True)
class _Box:
    left: float
    top: float
    right: float
    bottom: float

    def touches(self, other: _Box) -> bool:
        across = self.left < other.right and other.left < self.right
        return across and self.top < other.bottom and other.top < self.bottom


def scatter(
    title: str,
    dots: Sequence[Dot],
    *,
    cost_name: str,
    value_name: str,
    value_tick: Callable[[float], str],
    greater_is_better: bool,
    margin: float,
) -> Drawing:
    """Lay out one drawing.

    Args:
        title: What is drawn.
        dots: The arms; those that are not finite are left out. One may be full fine-tuning.
        cost_name: What is spent, such as `training time`.
        value_name: The metric in words.
        value_tick: Writes a value of the metric on the axis.
        greater_is_better: Of the metric.
        margin: Half the height of the band around full fine-tuning.
    """
    dots = [dot for dot in dots if all(map(math.isfinite, (dot.cost, dot.value, dot.low, dot.high)))]
    shown = _shown(dots, greater_is_better, margin)
    full = next((dot for dot in dots if dot.full), None)
    described = "; ".join(f"{dot.name} {dot.text} at {dot.cost:.2g} of full's" for dot in dots)
    if not shown:
        return Drawing(
            title, "no arm has a finite value.", (Label(WIDTH / 2, HEIGHT / 2, "no finite value", "middle"),)
        )

    ends = [bound for dot in shown for bound in (dot.low, dot.high)]
    ends += [full.value - margin, full.value + margin] if full else []
    ticks = _inside(nice_ticks(min(ends), max(ends), 5), value_tick)
    floor, ceiling = HEIGHT - _BOTTOM, _TOP
    strip = _STRIP if len(shown) < len(dots) else 0.0
    low_end, high_end = (floor - strip, ceiling) if greater_is_better else (floor, ceiling + strip)
    up = _scale(min([*ends, *ticks]), max([*ends, *ticks]), low_end, high_end)
    costs = nice_ticks(0.0, max(1.0, *(dot.cost for dot in dots)) if dots else 1.0, 4)
    across = _scale(0.0, costs[-1], _LEFT + 10, WIDTH - _RIGHT - 34)

    shapes: list[Shape] = []
    if full:
        shapes.append(Band(up(full.value + margin), up(full.value - margin)))
    for tick in ticks:
        shapes.append(Line(_LEFT, up(tick), WIDTH - _RIGHT, up(tick), "grid"))
        shapes.append(Label(_LEFT - 6, up(tick) + 4, value_tick(tick), "end"))
    for tick in costs:
        shapes.append(Label(across(tick), floor + 16, f"{tick:g}×", "middle"))
    shapes.append(Label(2, 12, value_name + ("" if greater_is_better else " (smaller is better)"), "start"))
    shapes.append(Label((_LEFT + WIDTH - _RIGHT) / 2, HEIGHT - 6, f"{cost_name}, relative to full", "middle"))

    edge = floor - _MARK if greater_is_better else ceiling + _MARK
    away: Literal["down", "up"] = "down" if greater_is_better else "up"
    places = _side_by_side(
        [
            _Place(dot, across(dot.cost), up(dot.value), up(dot.high), up(dot.low))
            if dot in shown
            else _Place(dot, across(dot.cost), edge, edge, edge)
            for dot in dots
        ]
    )
    for place in reversed(places):
        dot, x = place.dot, place.x
        if dot in shown:
            for end in (place.top, place.bottom):
                shapes.append(Line(x - 5, end, x + 5, end, "whisker", dot.taken))
            shapes.append(Line(x, place.top, x, place.bottom, "whisker", dot.taken))
        inside: Literal["square", "circle"] = "square" if dot.full else "circle"
        shapes.append(Mark(x, place.y, inside if dot in shown else away, dot.taken))
    # Names in the strip have the fewest places; then the arms that matter most get the best ones.
    taken = [place.box(place.x) for place in places]
    for place in sorted(places, key=lambda one: one.dot in shown):
        dot = place.dot
        name = dot.name if len(dot.name) <= _LONGEST_NAME else dot.name[: _LONGEST_NAME - 1] + "…"
        shapes += _named(name if dot in shown else f"{name} {dot.text}", place, taken)
    return Drawing(title, described + ".", tuple(shapes))


def _shown(dots: Sequence[Dot], greater_is_better: bool, margin: float) -> list[Dot]:
    """Without arms so much worse than the others that these could not be told apart."""
    sign = 1 if greater_is_better else -1
    ranked = sorted(dots, key=lambda dot: sign * dot.value)
    needed = next((place for place, dot in enumerate(ranked) if dot.full or dot.taken), len(ranked))
    for place in range(min(needed, len(ranked) - 2), 0, -1):
        if _span(ranked[place - 1 :], margin) > _MOST_OF_SPAN * _span(ranked[place:], margin):
            return ranked[place:]
    return ranked


def _span(dots: Sequence[Dot], margin: float) -> float:
    return max(2 * margin, max(dot.high for dot in dots) - min(dot.low for dot in dots))


@dataclass(frozen=True)
class _Place:
    """Where an arm is drawn: its mark and the ends of its interval."""

    dot: Dot
    x: float
    y: float
    top: float
    bottom: float

    def box(self, x: float, half: float = _MARK) -> _Box:
        return _Box(x - half, min(self.top, self.y - _MARK), x + half, max(self.bottom, self.y + _MARK))


def _side_by_side(places: Sequence[_Place]) -> list[_Place]:
    """Those that would hide each other moved apart, as little as can be; those that matter most stay."""
    put: list[_Place] = []
    for place in sorted(places, key=lambda one: (not one.dot.taken, not one.dot.full)):
        ways = [place.x, *(place.x + way * far for far in range(1, _FARTHEST) for way in (-1, 1))]
        others = [one.box(one.x, _HALF) for one in put]
        free = (x for x in ways if not any(place.box(x, _HALF).touches(other) for other in others))
        put.append(replace(place, x=next(free, place.x)))
    return put


def _inside(ticks: Sequence[float], value_tick: Callable[[float], str]) -> list[float]:
    """A share needs no tick below 0 or above 1."""
    if value_tick(0.5).endswith("%"):
        return [tick for tick in ticks if -1e-9 <= tick <= 1 + 1e-9]
    return list(ticks)


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: start + (value - low) / (high - low) * (end - start) if high > low else (start + end) / 2


def _named(name: str, place: _Place, taken: list[_Box]) -> list[Shape]:
    """The name beside its mark, where nothing else is; far from it with a line to it."""
    width = _LETTER * sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in name)
    for left, middle, anchor, far in _candidates(place, width):
        box = _Box(left, middle - _LINE / 2, left + width, middle + _LINE / 2)
        inside = (
            box.left >= 2 and box.right <= WIDTH - 2 and box.top >= _TOP - 12 and box.bottom <= HEIGHT - _BOTTOM + 2
        )
        if inside and not any(box.touches(other) for other in taken):
            taken.append(box)
            at = {"start": box.left, "middle": (box.left + box.right) / 2, "end": box.right}[anchor]
            found: list[Shape] = [Label(at, middle + 4.5, name, anchor, "name")]
            return [Line(place.x, place.y, at, middle, "leader"), *found] if far else found
    return [Label(place.x, place.y - 10, name, "middle", "name")]


def _candidates(place: _Place, width: float) -> Iterator[tuple[float, float, Literal["start", "middle", "end"], bool]]:
    """Left edge, middle height, anchor, and whether it needs a line: near ones first."""
    box, x, y = place.box(place.x), place.x, place.y
    right, left = x + _MARK + 4, x - _MARK - 4 - width
    for height in (y, y - 8, y + 8):
        yield right, height, "start", False
        yield left, height, "end", False
    for height in (box.top - _LINE / 2 - 1, box.bottom + _LINE / 2 + 1):
        yield x - width / 2, height, "middle", False
    for aside in (0, 25, 50, 75, 100, 150, 200):
        for far in range(30):
            for way in (-1, 1):
                yield left - aside, y + way * far * 8, "end", True
                yield right + aside, y + way * far * 8, "start", True


# ---- as SVG ----------------------------------------------------------------------------------------------------


def svg(drawing: Drawing) -> str:
    """The drawing as an `<svg>` element whose colours come from the page's stylesheet."""
    title = escape(drawing.title)
    inside = "".join(_svg_of(shape) for shape in drawing.shapes)
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}"><title>{title}</title>'
        f"<desc>{escape(drawing.words)}</desc>{inside}</svg>"
    )


def _svg_of(shape: Shape) -> str:
    match shape:
        case Line(style="whisker"):
            ends = f"M{shape.x1:.1f} {shape.y1:.1f}L{shape.x2:.1f} {shape.y2:.1f}"
            return f'<g class="{_kind(shape.taken)}"><path class="whisker" d="{ends}"/></g>'
        case Line():
            x1, y1, x2, y2 = shape.x1, shape.y1, shape.x2, shape.y2
            return f'<line class="{shape.style}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'
        case Band():
            height = max(0.0, shape.y2 - shape.y1)
            left, right = inner()
            box = f'x="{left}" y="{shape.y1:.1f}" width="{right - left}" height="{height:.1f}"'
            return f'<rect class="band" {box}/>'
        case Label():
            at = f'x="{shape.x:.1f}" y="{shape.y:.1f}" text-anchor="{shape.anchor}"'
            return f'<text class="{shape.style}" {at}>{escape(shape.text)}</text>'
        case Mark():
            points = " ".join(f"{x:.1f},{y:.1f}" for x, y in outline(shape))
            return f'<g class="{_kind(shape.taken)}"><polygon class="mark" points="{points}"/></g>'


def _kind(taken: bool) -> str:
    """The stylesheet's names for what is filled and what is hollow."""
    return "trained" if taken else "baseline"


def inner() -> tuple[float, float]:
    """Left and right end of the lines across."""
    return _LEFT, WIDTH - _RIGHT


def outline(mark: Mark) -> list[tuple[float, float]]:
    """The corners of a mark; a circle has many."""
    x, y = mark.x, mark.y
    match mark.shape:
        case "square":
            corners = [(-4.2, -4.2), (4.2, -4.2), (4.2, 4.2), (-4.2, 4.2)]
        case "down":
            corners = [(-5.0, -5.0), (5.0, -5.0), (0.0, 4.0)]
        case "up":
            corners = [(-5.0, 5.0), (5.0, 5.0), (0.0, -4.0)]
        case "circle":
            angles = [math.tau * part / 24 for part in range(24)]
            corners = [(4.4 * math.cos(angle), 4.4 * math.sin(angle)) for angle in angles]
    return [(x + across, y + down) for across, down in corners]
