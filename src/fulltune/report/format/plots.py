"""The plots: drawn by matplotlib, as SVG in the colours of `report.css`, and as PNG for a comparison."""

from __future__ import annotations

import io
import itertools
import math
import re
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fulltune.files import replacing
from fulltune.report.format import blocks, words
from fulltune.stats.curves import Point
from fulltune.text import counted, format_metric, format_number, is_share

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Series = tuple[str, Mapping[float, float]]
"""A name, and values by learning rate."""

COLOURS = {
    "page": "#ffffff", "ink": "#1b1f24", "quiet": "#57606a", "grid": "#e3e8ed", "blue": "#0a5bb5",
    "blue-soft": "#dbeafa", "amber": "#8a5200",
}  # fmt: skip
"""Variables of `report.css` with their values in light mode."""
PAGE, INK, QUIET, GRID, BLUE, BAND, AMBER = COLOURS.values()
WIDTH, CURVE_HEIGHT, COST_HEIGHT, LINE_HEIGHT = 400, 220, 280, 18
"""In points, which are the units of the SVG."""
FONT_SIZE = 12
_MOST_DOTS = 20
_DECADES_FOR_LOG = 2.0
_MOST_RATES = 4
"""More are written with one digit."""
_LONGEST_NAME = 22
_MOST_OF_SPAN = 4.0
"""Methods so bad that they would make the axis this many times longer are not drawn."""
_PICTURE_DPI = 160
_LABEL: dict[str, Any] = {"color": QUIET, "size": FONT_SIZE}
_LIMIT: dict[str, Any] = {"color": AMBER, "linewidth": 1.25, "dashes": (4, 3)}


@dataclass(frozen=True)
class Mark:
    """A value with its interval, as one mark of a plot."""

    name: str
    value: float
    low: float
    high: float
    text: str
    """The value in words."""
    is_full: bool = False
    """Full fine-tuning: drawn as a square."""
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


@dataclass(frozen=True)
class Frontier:
    """Drift and metric of several points; lines join the best of them."""

    name: str
    points: tuple[tuple[float, float], ...]
    lines: tuple[tuple[tuple[float, float], ...], ...] = ()
    is_full: bool = False
    """Drawn as squares."""
    filled: bool = False


@contextmanager
def _new_figure(width: int, height: int) -> Iterator[Figure]:
    """A figure of so many points whose settings are ours, whatever the user's own are; none of them outlives it."""
    import matplotlib
    from matplotlib.figure import Figure

    settings: Any = {name: value for name, value in matplotlib.rcParamsDefault.items() if name != "backend"}
    settings |= {
        "svg.fonttype": "none", "svg.hashsalt": "fulltune", "text.usetex": False, "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"], "path.simplify": True, "path.simplify_threshold": 1.0,
        "axes.unicode_minus": False, "text.parse_math": False,
    }  # fmt: skip
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # Names may hold what the font lacks; the page has fonts of its own.
        warnings.filterwarnings("ignore", message="Glyph|Matplotlib currently does not support")
        yield Figure(figsize=(width / 72, height / 72), dpi=72, frameon=False, layout="constrained")


def _style_axes(axes: Axes, metric: str, along: Literal["x", "y"]) -> None:
    """Thin lines across instead of a frame, and the metric's values written as the report writes them."""
    from matplotlib.ticker import MaxNLocator

    axes.set_frame_on(False)
    axes.set_axisbelow(True)
    axes.grid(axis=along, color=GRID, linewidth=1)
    axes.tick_params(which="both", length=0, pad=5, labelsize=FONT_SIZE, labelcolor=QUIET)
    axis = axes.yaxis if along == "y" else axes.xaxis
    if axis.get_scale() != "log":
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], min_n_ticks=3))
    shares = is_share(metric)

    def written(value: float, _: object) -> str:
        if not shares:
            return format_number(value)
        return f"{round(100 * value, 1):g}%" if 0 <= value <= 1 else ""

    axis.set_major_formatter(written)
    if shares:  # none lies below 0 or above 1
        low, high = axis.get_view_interval()
        axis.set_view_interval(max(0.0, low), min(1.0, high), ignore=True)


def _legend(figure: Figure, axes: Axes) -> None:
    """Below the plot; the figure grows by the lines that it takes."""
    handles, names = axes.get_legend_handles_labels()
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + math.ceil(len(names) / 3) * LINE_HEIGHT / 72)
    look: dict[str, Any] = {"frameon": False, "fontsize": FONT_SIZE, "labelcolor": INK, "handletextpad": 0.4}
    figure.legend(handles, names, loc="outside lower left", ncols=3, columnspacing=1, **look)


def _say_nothing_finite(axes: Axes, text: str) -> None:
    axes.set_axis_off()
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", **_LABEL)


def _drawn(figure: Figure, title: str, said: str) -> blocks.Figure:
    """The figure as an `<svg>` element to stand in the page."""
    for artist in figure.findobj():
        artist.set_clip_on(False)  # nothing lies outside; clipping would need urls
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    drawn = buffer.getvalue()
    width, height = (round(72 * inches) for inches in figure.get_size_inches())
    # Without the file's head, its style sheet (it would hold for the whole page) and names that another plot has too.
    drawn = drawn[drawn.index('<g id="figure') : drawn.rindex("</g>") + 4]
    drawn = re.sub(r'<g id="[\w.]+"', "<g", drawn).replace("xlink:href", "href")
    drawn = re.sub(r"\s*\n\s*", " ", re.sub(r"font-family: [^;\"]+;? ?", "", drawn))
    for name, colour in COLOURS.items():
        drawn = drawn.replace(colour, f"var(--{name})")
    label = escape(title)
    svg = (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}"><title>{label}</title>'
        f"<desc>{escape(said)}</desc>{drawn}</svg>"
    )
    return blocks.Figure(svg, title, said)


def _short(name: str) -> str:
    name = words.one_line(name)
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"


def _draw_mark(axes: Axes, mark: Mark, x: float, y: float, marker: str, upright: bool) -> None:
    """Draw a mark with its interval, lying or upright."""
    colour = BLUE if mark.filled else QUIET
    reach = [[max(0.0, mark.value - mark.low)], [max(0.0, mark.high - mark.value)]]
    axes.errorbar(
        x, y, yerr=reach if upright else None, xerr=None if upright else reach, fmt=marker, markersize=7,
        color=colour, markerfacecolor=colour if mark.filled else PAGE, elinewidth=1.75, capsize=5, capthick=1.75,
        mew=1.75, zorder=4 if mark.filled else 3, label=_short(mark.name),
    )  # fmt: skip


def learning_curve(
    title: str,
    points: Sequence[Point],
    metric: str,
    kept_step: int | None = None,
    restarts: Sequence[int] = (),
    skipped: Sequence[int] = (),
) -> blocks.Figure:
    """Draw one series over the optimizer steps: a ring at the step whose weights were kept, ticks on the axis where a
    later attempt took over and at the top where an update was left out; values that are not finite break the line."""
    steps, values = [step for step, _ in points], [value if math.isfinite(value) else math.nan for _, value in points]
    with _new_figure(WIDTH, CURVE_HEIGHT) as figure:
        axes = figure.subplots()
        if all(map(math.isnan, values)):
            _say_nothing_finite(axes, "no finite value was logged")
        else:
            _draw_curve(axes, steps, values, metric, kept_step)
            for marked, low, high, color in ((restarts, -0.03, 0.05, INK), (skipped, 0.94, 1.0, AMBER)):
                for step in (one for one in marked if steps[0] <= one <= steps[-1]):
                    axes.axvline(step, low, high, color=color, linewidth=2)
        return _drawn(figure, title, _curve_in_words(points, metric, kept_step))


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
    _style_axes(axes, metric, "y")
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("optimizer step" + (" (value on a log scale)" if logarithmic else ""), **_LABEL)
    for step, value in zip(steps, values, strict=True):
        if step == kept_step and not math.isnan(value):
            axes.axvline(step, **_LIMIT)
            axes.plot(step, value, "o", markersize=12, color=AMBER, markerfacecolor="none", mew=2)


def _curve_in_words(points: Sequence[Point], metric: str, kept_step: int | None) -> str:
    """First and last value, the kept step, values that were not finite."""
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


def rates_plot(title: str, series: Sequence[Series], metric: str, chosen: float) -> blocks.Figure:
    """Draw a metric over learning rates, which are on a log scale; the second series is filled."""
    from matplotlib.ticker import NullLocator

    rates, said = sorted({rate for _, values in series for rate in values}), []
    with _new_figure(WIDTH, CURVE_HEIGHT) as figure:
        axes = figure.subplots()
        for filled, (name, values) in enumerate(series):
            points = sorted((rate, value) for rate, value in values.items() if math.isfinite(value))
            if points:
                look: dict[str, Any] = {"color": BLUE, "markerfacecolor": BLUE if filled else PAGE, "linewidth": 1.25}
                axes.plot(*zip(*points, strict=True), marker="o", markersize=6, label=name, **look)
                written = ", ".join(f"{format_metric(metric, value)} at {rate:g}" for rate, value in points)
                said.append(f"{name}: {written}")
        axes.set_xscale("log")
        _style_axes(axes, metric, "y")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(rates, [f"{rate:.1g}" if len(rates) > _MOST_RATES else f"{rate:g}" for rate in rates])
        axes.set_xlabel("learning rate", **_LABEL)
        axes.axvline(chosen, **_LIMIT)
        _legend(figure, axes)
        return _drawn(figure, title, f"{'; '.join(said)}.")


def interval_plot(title: str, marks: Sequence[Mark], metric: str, legend: str) -> blocks.Figure:
    """Draw value and interval of every mark on one common axis, from top to bottom; what is not finite is left out."""
    shown = [mark for mark in marks if mark.is_finite]
    names = [textwrap.fill(words.one_line(mark.name), _LONGEST_NAME) for mark in shown]
    lines = sum(max(2, name.count("\n") + 1) for name in names)
    with _new_figure(WIDTH, (lines + 2) * LINE_HEIGHT) as figure:
        axes = figure.subplots()
        for place, mark in enumerate(shown):
            _draw_mark(axes, mark, mark.value, place, "o", upright=False)
        axes.set_yticks(range(len(shown)), names)
        axes.set_ylim(len(shown) - 0.5, -0.5)
        _style_axes(axes, metric, "x")
        return _drawn(figure, title, legend)


def frontiers_plot(title: str, frontiers: Sequence[Frontier], limit: float, metric: str, said: str) -> blocks.Figure:
    """Draw a metric over the drift on generic text, of methods or of one run's points, with the budget as a line."""
    markers = itertools.cycle("o^Dv")
    with _new_figure(WIDTH, COST_HEIGHT) as figure:
        axes = figure.subplots()
        for one in frontiers:
            colour, marker = BLUE if one.filled else QUIET, "s" if one.is_full else next(markers)
            places = [place for place in one.points if all(map(math.isfinite, place))]
            if places:
                look: dict[str, Any] = {"color": colour, "markerfacecolor": colour if one.filled else PAGE}
                axes.plot(*zip(*places, strict=True), marker=marker, linewidth=0, label=_short(one.name), **look)
            for line in one.lines:
                axes.plot(*zip(*line, strict=True), linewidth=1.25, color=colour, zorder=1)
        _style_axes(axes, metric, "y")
        axes.axvline(limit, label="budget", **_LIMIT)
        axes.set_xlabel("drift on generic text", **_LABEL)
        _legend(figure, axes)
        return _drawn(figure, title, said)


def cost_plot(plot: CostPlot) -> blocks.Figure:
    """Draw quality against cost; × is relative to full fine-tuning."""
    with _new_figure(WIDTH, COST_HEIGHT) as figure:
        axes = figure.subplots()
        _draw_costs(axes, plot)
        _legend(figure, axes)
        said = "; ".join(f"{mark.name}: {mark.text} at {mark.cost:.2f}×" for mark in plot.marks if mark.is_finite)
        return _drawn(figure, plot.title, f"{said}.")


def cost_picture(title: str, subtitle: str, plots: Sequence[CostPlot], path: Path) -> None:
    """Write the same plots side by side into one PNG, under the verdict and of what it is."""
    width = len(plots) * WIDTH
    with _new_figure(width, COST_HEIGHT + 2 * LINE_HEIGHT) as figure:
        figure.set(frameon=True, facecolor=PAGE)
        lines = [textwrap.shorten(words.one_line(text), width // 8, placeholder=" …") for text in (title, subtitle)]
        figure.suptitle("\n".join(lines), x=0.02, ha="left", color=INK, size=FONT_SIZE)
        found = figure.subplots(1, len(plots), squeeze=False)[0]
        for axes, plot in zip(found, plots, strict=True):
            _draw_costs(axes, plot)
        _legend(figure, found[0])
        with replacing(path) as part:
            figure.savefig(part, format="png", dpi=_PICTURE_DPI)


def _draw_costs(axes: Axes, plot: CostPlot) -> None:
    """Costs to the right, quality upwards; methods far off are in the legend alone, with their value."""
    from matplotlib.ticker import MaxNLocator

    marks = [mark for mark in plot.marks if mark.is_finite]
    if not marks:
        _say_nothing_finite(axes, "no finite value")
        return
    shown, markers = _near_the_best(marks, plot.greater_is_better, plot.margin), itertools.cycle("o^DvP<X>*")
    for mark in marks:
        if mark in shown:
            marker = "s" if mark.is_full else next(markers)
            _draw_mark(axes, mark, mark.cost, mark.value, marker, upright=True)
        else:
            axes.plot([], [], " ", label=f"{_short(mark.name)}: {mark.text}")
        if mark.is_full:
            axes.axhspan(mark.value - plot.margin, mark.value + plot.margin, color=BAND, linewidth=0, zorder=0)
    _style_axes(axes, plot.metric, "y")
    axes.set_xlim(-0.06, 1.12 * max(1.0, *(mark.cost for mark in marks)))
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], min_n_ticks=3))
    axes.xaxis.set_major_formatter("{x:g}×")
    axes.set_xlabel(f"{plot.cost_name}, relative to full", **_LABEL)
    name = words.metric_name(plot.metric) + ("" if plot.greater_is_better else " (smaller is better)")
    axes.set_title(words.one_line(name), loc="left", **_LABEL)


def _near_the_best(marks: Sequence[Mark], greater_is_better: bool, margin: float) -> list[Mark]:
    """Without methods so much worse than the others that these could not be told apart."""

    def span(of: Sequence[Mark]) -> float:
        return max(2 * margin, max(mark.high for mark in of) - min(mark.low for mark in of))

    ranked = sorted(marks, key=lambda mark: mark.value if greater_is_better else -mark.value)
    needed = next((place for place, mark in enumerate(ranked) if mark.is_full or mark.filled), len(ranked))
    for place in range(min(needed, len(ranked) - 2), 0, -1):
        if span(ranked[place - 1 :]) > _MOST_OF_SPAN * span(ranked[place:]):
            return ranked[place:]
    return ranked
