"""The plots: drawn by matplotlib, as SVG for the page and as PNG for a comparison; see `canvas.py`."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fulltune.files import replacing
from fulltune.report.format import words
from fulltune.report.format.canvas import (
    AMBER,
    BAND,
    BLUE,
    INK,
    NORMAL,
    PAGE,
    QUIET,
    SMALL,
    WIDTH,
    new_figure,
    say_nothing_finite,
    style_axes,
    svg,
)
from fulltune.text import counted, format_metric, is_share

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Point = tuple[int, float]
"""Optimizer step and value; the value may be NaN or infinite."""

CURVE_HEIGHT, COST_HEIGHT = 220, 280
"""In points, which are the units of the SVG."""
_MOST_DOTS = 20
_DECADES_FOR_LOG = 2.0
_MOST_RATES = 4
"""More are written with one digit."""
_NAME_LETTERS, _NAME_HEIGHT, _ROW_HEIGHT = 52, 16, 28
"""Of the interval plot: letters in a line of a name, its height, and that of what is drawn below."""
_LONGEST_NAME = 22
_MOST_OF_SPAN = 4.0
"""Methods so bad that they would make the axis this many times longer are pointed at instead of shown."""
_PICTURE_DPI = 160


@dataclass(frozen=True)
class Mark:
    """A value with its interval, as one mark of a plot."""

    name: str
    value: float
    low: float
    high: float
    text: str
    """The value in words."""
    marker: str = "o"
    """Its shape, in matplotlib's letters; in the cost plot full fine-tuning is the square, `s`."""
    filled: bool = False
    """Filled and blue: a trained model, or in the cost plot the recommended method."""
    cost: float = 0.0
    """Full fine-tuning's is 1."""

    @property
    def is_finite(self) -> bool:
        return all(map(math.isfinite, (self.cost, self.value, self.low, self.high)))


@dataclass(frozen=True)
class CostPlot:
    """Quality against cost; a band shows full fine-tuning with the margin around it."""

    title: str
    cost_name: str
    metric: str
    greater_is_better: bool
    margin: float
    marks: tuple[Mark, ...]

    @property
    def words(self) -> str:
        """What the plot shows; × is relative to full fine-tuning."""
        return "; ".join(f"{mark.name}: {mark.text} at {mark.cost:.2f}×" for mark in self.marks if mark.is_finite) + "."


# ---- learning curves -------------------------------------------------------------------------------------------


def learning_curve(
    title: str,
    points: Sequence[Point],
    metric: str,
    kept_step: int | None = None,
    restarts: Sequence[int] = (),
    skipped: Sequence[int] = (),
) -> str:
    """Draw one series over the optimizer steps, as SVG.

    Args:
        title: What is drawn; also the accessible name.
        points: Step and value, in order. Values that are not finite break the line and are counted in the description.
        metric: Name of the series; decides how values are written.
        kept_step: Step whose weights were kept, marked with a ring and a vertical line.
        restarts: Steps at which a later attempt took over, marked with short ticks on the axis.
        skipped: Steps whose update was left out, marked with short ticks at the top.
    """
    values = [value if math.isfinite(value) else math.nan for _, value in points]
    finite = [value for value in values if not math.isnan(value)]
    with new_figure(WIDTH, CURVE_HEIGHT) as figure:
        axes = figure.subplots()
        if finite:
            _draw_curve(axes, [step for step, _ in points], values, metric, kept_step)
            _draw_ticks(axes, [step for step, _ in points], restarts, skipped)
        else:
            say_nothing_finite(axes, "no finite value was logged")
        return svg(figure, title, curve_in_words(points, metric, kept_step))


def _draw_curve(axes: Axes, steps: list[int], values: list[float], metric: str, kept_step: int | None) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    marker = "o" if len(values) <= _MOST_DOTS else "None"
    axes.plot(steps, values, color=BLUE, linewidth=1.75, marker=marker, markersize=5)
    low, high = (found(value for value in values if not math.isnan(value)) for found in (min, max))
    # A schedule that ends near zero would look like a cliff on a log scale.
    logarithmic = metric != "learning_rate" and low > 0 and math.log10(high / low) > _DECADES_FOR_LOG
    if logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(numticks=6))
        axes.yaxis.set_minor_locator(NullLocator())
    style_axes(axes, metric, "y")
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("optimizer step" + (" (value on a log scale)" if logarithmic else ""), color=QUIET, size=SMALL)
    for step, value in zip(steps, values, strict=True):
        if step == kept_step and not math.isnan(value):
            axes.axvline(step, color=AMBER, linewidth=1.25, dashes=(4, 3))
            axes.plot(step, value, "o", markersize=12, color=AMBER, markerfacecolor="none", mew=2)


def _draw_ticks(axes: Axes, steps: list[int], restarts: Sequence[int], skipped: Sequence[int]) -> None:
    for marked, low, high, color in ((restarts, -0.03, 0.05, INK), (skipped, 0.94, 1.0, AMBER)):
        for step in marked:
            if steps[0] <= step <= steps[-1]:
                axes.axvline(step, low, high, color=color, linewidth=2)


def curve_in_words(points: Sequence[Point], metric: str, kept_step: int | None = None) -> str:
    """Say what a learning curve shows: first and last value, the kept step, values that were not finite."""
    finite = [(step, format_metric(metric, value)) for step, value in points if math.isfinite(value)]
    if not finite:
        return "no finite value was logged."
    (first, start), (last, end) = finite[0], finite[-1]
    text = (
        f"{start} at step {first:,}" if first == last else f"from {start} at step {first:,} to {end} at step {last:,}"
    )
    text += "".join(f"; kept: step {step:,} with {value}" for step, value in finite if step == kept_step)
    lost = [step for step, value in points if not math.isfinite(value)]
    return text + (f"; {counted(len(lost), 'value')} not finite, first at step {lost[0]:,}." if lost else ".")


# ---- rates -----------------------------------------------------------------------------------------------------

Series = tuple[str, Mapping[float, float]]
"""A name, and values by learning rate."""


def rates_plot(title: str, series: Sequence[Series], metric: str, chosen: float) -> str:
    """Draw a metric over learning rates, which are on a log scale, as SVG; the second series is filled."""
    from matplotlib.ticker import NullLocator

    rates = sorted({rate for _, values in series for rate in values})
    with new_figure(WIDTH, CURVE_HEIGHT) as figure:
        axes = figure.subplots()
        for filled, (name, values) in enumerate(series):
            points = sorted((rate, value) for rate, value in values.items() if math.isfinite(value))
            if points:
                face = BLUE if filled else PAGE
                look: dict[str, Any] = {"color": BLUE, "markerfacecolor": face, "linewidth": 1.25}
                axes.plot(*zip(*points, strict=True), marker="o", markersize=6, label=name, **look)
        axes.set_xscale("log")
        style_axes(axes, metric, "y")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(rates, [f"{rate:.1g}" if len(rates) > _MOST_RATES else f"{rate:g}" for rate in rates])
        axes.set_xlabel("learning rate", color=QUIET, size=SMALL)
        axes.axvline(chosen, color=AMBER, linewidth=1.25, dashes=(4, 3))
        axes.legend(frameon=False, fontsize=SMALL, labelcolor=QUIET)
        return svg(figure, title, rates_in_words(series, metric))


def rates_in_words(series: Sequence[Series], metric: str) -> str:
    """Each value, by series."""
    parts = []
    for name, values in series:
        known = ((rate, values[rate]) for rate in sorted(values) if math.isfinite(values[rate]))
        if said := ", ".join(f"{format_metric(metric, value)} at {rate:g}" for rate, value in known):
            parts.append(f"{name}: {said}")
    return "; ".join(parts) + "."


# ---- intervals -------------------------------------------------------------------------------------------------


def interval_plot(title: str, marks: Sequence[Mark], metric: str) -> str:
    """Draw value and interval of every row on one common axis, the name above each, as SVG.

    Args:
        title: What is drawn; also the accessible name.
        marks: Rows from top to bottom; a row that is not finite is named without a mark.
        metric: The metric's name; decides how the axis is written.
    """
    names = [textwrap.wrap(words.one_line(mark.name), _NAME_LETTERS) or [""] for mark in marks]
    height = sum(_NAME_HEIGHT * len(lines) + _ROW_HEIGHT for lines in names) + _ROW_HEIGHT
    with new_figure(WIDTH, height) as figure:
        figure.set_layout_engine("none")
        # Left room for half a mark, right for the values in words, below for the axis.
        axes = figure.add_axes((0.05, 24 / height, 0.79, 1 - 28 / height))
        axes.set_ylim(height - 28, 0)
        style: dict[str, Any] = {"color": INK, "size": NORMAL, "parse_math": False}
        style["transform"] = axes.get_yaxis_transform()  # x is 0 and 1 at the axis' ends
        foot = 0
        for mark, lines in zip(marks, names, strict=True):
            for line in lines:
                foot += _NAME_HEIGHT
                axes.text(-0.06, foot, line, **style)
            axes.text(1.2, foot + 17, mark.text, ha="right", **style)
            if mark.is_finite:
                _draw_mark(axes, mark, mark.value, foot + 12)
            foot += _ROW_HEIGHT
        style_axes(axes, metric, "x")
        axes.set_yticks([])
        return svg(figure, title, "; ".join(f"{mark.name}: {mark.text}" for mark in marks) + ".")


def _draw_mark(axes: Axes, mark: Mark, x: float, y: float, upright: bool = False) -> None:
    """Draw a mark with its interval, lying or upright."""
    colour = BLUE if mark.filled else QUIET
    reach = [[max(0.0, mark.value - mark.low)], [max(0.0, mark.high - mark.value)]]
    axes.errorbar(
        x, y, yerr=reach if upright else None, xerr=None if upright else reach, fmt=mark.marker, markersize=7,
        color=colour, markerfacecolor=colour if mark.filled else PAGE, elinewidth=1.75, capsize=5, capthick=1.75,
        mew=1.75, zorder=4 if mark.filled else 3,
    )  # fmt: skip


# ---- quality against cost --------------------------------------------------------------------------------------


def cost_plot(plot: CostPlot) -> str:
    """Draw quality against cost as SVG."""
    with new_figure(WIDTH, COST_HEIGHT) as figure:
        _draw_costs(figure, figure.subplots(), plot)
        return svg(figure, plot.title, plot.words)


def cost_picture(title: str, subtitle: str, plots: Sequence[CostPlot], path: Path) -> None:
    """Write the same plots side by side into one PNG, under a title.

    Args:
        title: The verdict.
        subtitle: Of what.
        plots: At least one.
        path: The file.
    """
    head, width = 64, len(plots) * WIDTH
    with new_figure(width, COST_HEIGHT + head) as figure:
        figure.set(frameon=True, facecolor=PAGE)
        for text, size, colour, weight, y in ((title, 15, INK, "bold", 28), (subtitle, 9.5, QUIET, "normal", 48)):
            fitting = textwrap.shorten(words.one_line(text), int(width / (0.64 * size)), placeholder=" …")
            at = 1 - y / (COST_HEIGHT + head)
            figure.text(0.02, at, fitting, size=size, color=colour, weight=weight, parse_math=False, in_layout=False)
        figure.set_layout_engine("constrained", rect=(0, 0, 1, COST_HEIGHT / (COST_HEIGHT + head)))
        for axes, plot in zip(figure.subplots(1, len(plots), squeeze=False)[0], plots, strict=True):
            _draw_costs(figure, axes, plot)
        with replacing(path) as part:
            figure.savefig(part, format="png", dpi=_PICTURE_DPI)


def _draw_costs(figure: Figure, axes: Axes, plot: CostPlot) -> None:
    """Costs to the right, quality upwards; methods far off are pointed at from the axis' end."""
    from matplotlib.ticker import MaxNLocator

    marks = [mark for mark in plot.marks if mark.is_finite]
    if not marks:
        say_nothing_finite(axes, "no finite value")
        return
    style_axes(axes, plot.metric, "y")
    shown, better = _shown(marks, plot.greater_is_better, plot.margin), plot.greater_is_better
    span = _span(shown, plot.margin)
    low, high = min(mark.low for mark in shown) - 0.1 * span, max(mark.high for mark in shown) + 0.1 * span
    if is_share(plot.metric):
        low, high = max(0.0, low), min(1.0, high)
    for full in (mark.value for mark in marks if mark.marker == "s"):
        axes.axhspan(max(low, full - plot.margin), min(high, full + plot.margin), color=BAND, linewidth=0, zorder=0)
    edge = low if better else high
    if len(shown) < len(marks):  # a strip for those that are pointed at
        low, high = (low - 0.12 * span, high) if better else (low, high + 0.12 * span)
    axes.set_ylim(low, high)
    axes.set_xlim(-0.06, 1.12 * max(1.0, *(mark.cost for mark in marks)))
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], min_n_ticks=3))
    axes.xaxis.set_major_formatter("{x:g}×")
    axes.set_xlabel(f"{plot.cost_name}, relative to full", color=QUIET, size=SMALL)
    name = words.metric_name(plot.metric) + ("" if better else " (smaller is better)")
    axes.set_title(words.one_line(name), loc="left", color=QUIET, size=SMALL, parse_math=False)
    named = []
    # Names at the edge have the fewest places; then the methods that matter most get the best ones.
    for mark in sorted(marks, key=lambda mark: mark in shown):
        name = short_name(mark.name)
        if mark in shown:
            _draw_mark(axes, mark, mark.cost, mark.value, upright=True)
            named.append((name, mark.cost, mark.value, mark.low, mark.high))
        else:
            axes.plot(mark.cost, edge, "v" if better else "^", ms=8, color=QUIET, mfc=PAGE, mew=1.75)
            named.append((f"{name} {mark.text}", mark.cost, edge, edge, edge))
    _name(figure, axes, named)


def short_name(name: str) -> str:
    """As it stands in a plot."""
    name = words.one_line(name)
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"


def _shown(marks: Sequence[Mark], greater_is_better: bool, margin: float) -> list[Mark]:
    """Without methods so much worse than the others that these could not be told apart."""
    sign = 1 if greater_is_better else -1
    ranked = sorted(marks, key=lambda mark: sign * mark.value)
    needed = next((place for place, mark in enumerate(ranked) if mark.marker == "s" or mark.filled), len(ranked))
    for place in range(min(needed, len(ranked) - 2), 0, -1):
        if _span(ranked[place - 1 :], margin) > _MOST_OF_SPAN * _span(ranked[place:], margin):
            return ranked[place:]
    return ranked


def _span(marks: Sequence[Mark], margin: float) -> float:
    return max(2 * margin, max(mark.high for mark in marks) - min(mark.low for mark in marks))


def _name(figure: Figure, axes: Axes, named: Sequence[tuple[str, float, float, float, float]]) -> None:
    """Write each name beside its mark where nothing else is; one that had to go farther gets a line to its mark.

    Args:
        figure: All of it.
        axes: Where the marks are.
        named: Name, cost and value of each, and the ends of what is drawn upright there.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.transforms import Bbox

    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()  # lays the axes out
    place = axes.transData.transform
    inside = axes.get_window_extent(renderer)
    taken = [Bbox([place((x, low)) - 6, place((x, high)) + 6]) for _, x, _, low, high in named]
    for name, x, y, _, _ in named:
        note = axes.annotate(
            name, (x, y), (0, 0), textcoords="offset points", va="center", color=INK, size=NORMAL, parse_math=False,
            in_layout=False, annotation_clip=False,
        )  # fmt: skip
        for across, up, side in _PLACES:
            note.set(position=(across, up), ha=side)
            box = note.get_window_extent(renderer)
            is_inside = inside.contains(*box.min) and inside.contains(*box.max)
            if is_inside and not any(box.overlaps(other) for other in taken):
                break
        taken.append(box)
        if math.hypot(across, up) > _NEAR:
            line = {"arrowstyle": "-", "color": QUIET, "linewidth": 0.75, "shrinkA": 0, "shrinkB": 0}
            axes.annotate("", (x, y), (across, up), textcoords="offset points", arrowprops=line, in_layout=False)


_NEAR = 20.0
_SIDES = ((1, "left"), (-1, "right"))
_PLACES = [
    *((10 * way, up, side) for up in (0, 8, -8) for way, side in _SIDES),
    *((0, up, "center") for up in (18, -18)),
    *(
        (way * (10 + aside), up, side)
        for aside in (0, 25, 50, 100, 150, 200)
        for up in sorted(range(-160, 161, 8), key=abs)
        for way, side in _SIDES
    ),
]
"""Where a name may stand, from its mark on in points: across, up, and which side of it is there; near ones first."""
