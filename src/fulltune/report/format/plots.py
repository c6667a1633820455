from __future__ import annotations

import io
import itertools
import math
import re
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any, Literal

from fulltune.records.comparison import Decision
from fulltune.report.format import blocks, words
from fulltune.stats.curves import Point
from fulltune.text import counted, format_metric, format_number, is_share

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


COLOURS = {
    "page": "#ffffff", "ink": "#1b1f24", "quiet": "#57606a", "grid": "#e3e8ed", "blue": "#0a5bb5",
    "blue-soft": "#dbeafa", "amber": "#8a5200",
}  # fmt: skip
PAGE, INK, QUIET, GRID, BLUE, BAND, AMBER = COLOURS.values()
WIDTH, CURVE_HEIGHT, COST_HEIGHT, LINE_HEIGHT = 400, 220, 280, 18
"""Sizes in points, the units of the SVG."""
FONT_SIZE = 12
_MOST_DOTS = 20
_DECADES_FOR_LOG = 2.0
_LONGEST_NAME = 22
_LIMIT: dict[str, Any] = {"color": AMBER, "linewidth": 1.25, "dashes": (4, 3)}


@dataclass(frozen=True)
class Mark:
    name: str
    value: float
    low: float
    high: float
    text: str
    is_full: bool = False
    filled: bool = False
    cost: float = 0.0

    @property
    def is_finite(self) -> bool:
        return all(map(math.isfinite, (self.cost, self.value, self.low, self.high)))


@contextmanager
def _new_figure(height: int) -> Iterator[tuple[Figure, Axes]]:
    """Yield a figure of `height` points, and its axes."""
    import matplotlib
    from matplotlib.figure import Figure

    settings: Any = {name: value for name, value in matplotlib.rcParamsDefault.items() if name != "backend"}
    settings |= {
        "svg.fonttype": "none", "svg.hashsalt": "fulltune", "text.usetex": False, "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"], "path.simplify": True, "path.simplify_threshold": 1.0,
        "axes.unicode_minus": False, "text.parse_math": False, "axes.labelcolor": QUIET, "axes.titlecolor": QUIET,
        "axes.titlelocation": "left", "axes.titlesize": FONT_SIZE, "axes.labelsize": FONT_SIZE, "axes.axisbelow": True,
        "axes.grid": True, "grid.color": GRID, "grid.linewidth": 1, "xtick.labelsize": FONT_SIZE,
        "ytick.labelsize": FONT_SIZE, "xtick.labelcolor": QUIET, "ytick.labelcolor": QUIET, "legend.frameon": False,
        "legend.fontsize": FONT_SIZE, "legend.labelcolor": INK, "legend.handletextpad": 0.4, "legend.columnspacing": 1,
    }  # fmt: skip
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # Names may hold characters that the font lacks; the page has its own fonts.
        warnings.filterwarnings("ignore", message="Glyph|Matplotlib currently does not support")
        figure = Figure(figsize=(WIDTH / 72, height / 72), dpi=72, frameon=False, layout="constrained")
        yield figure, figure.subplots()


def _style_axes(axes: Axes, metric: str, metric_axis: Literal["x", "y"]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_frame_on(False)
    axes.tick_params(which="both", length=0, pad=5)
    axes.grid(visible=False, axis="x" if metric_axis == "y" else "y")
    axis = axes.yaxis if metric_axis == "y" else axes.xaxis
    if axis.get_scale() != "log":
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], min_n_ticks=3))
    if not is_share(metric):
        axis.set_major_formatter(lambda value, _: format_number(value))
        return
    axis.set_major_formatter(lambda value, _: f"{round(100 * value, 1):g}%" if 0 <= value <= 1 else "")
    low, high = axis.get_view_interval()  # a share is between 0 and 1
    axis.set_view_interval(max(0.0, low), min(1.0, high), ignore=True)


def _add_legend_below(figure: Figure, axes: Axes) -> None:
    handles, names = axes.get_legend_handles_labels()
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + math.ceil(len(names) / 3) * LINE_HEIGHT / 72)
    figure.legend(handles, names, loc="outside lower left", ncols=3)


def _show_no_finite_value(axes: Axes) -> None:
    axes.set_axis_off()
    axes.text(0.5, 0.5, "no finite value", transform=axes.transAxes, ha="center", color=QUIET, size=FONT_SIZE)


def _to_svg_figure(figure: Figure, title: str, description: str) -> blocks.Figure:
    for artist in figure.findobj():
        artist.set_clip_on(False)  # nothing is outside, and clipping would need URLs
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    drawn = buffer.getvalue()
    width, height = (round(72 * inches) for inches in figure.get_size_inches())
    # Drop the file's head, its style sheet (it would apply to the whole page) and ids that other plots share.
    drawn = drawn[drawn.index('<g id="figure') : drawn.rindex("</g>") + 4]
    drawn = re.sub(r'<g id="[\w.]+"', "<g", drawn).replace("xlink:href", "href")
    drawn = re.sub(r"\s*\n\s*", " ", re.sub(r"font-family: [^;\"]+;? ?", "", drawn))
    for name, colour in COLOURS.items():
        drawn = drawn.replace(colour, f"var(--{name})")
    label = escape(title)
    svg = (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}"><title>{label}</title>'
        f"<desc>{escape(description)}</desc>{drawn}</svg>"
    )
    return blocks.Figure(svg, title, description)


def _draw_mark(axes: Axes, mark: Mark, position: tuple[float, float], axis: Literal["x", "y"], marker: str) -> None:
    """Draw a mark with its interval as an error bar along `axis`."""
    name, colour = words.one_line(mark.name), BLUE if mark.filled else QUIET
    reach: dict[str, Any] = {f"{axis}err": [[max(0.0, mark.value - mark.low)], [max(0.0, mark.high - mark.value)]]}
    axes.errorbar(
        *position, **reach, fmt=marker, markersize=7, color=colour, markerfacecolor=colour if mark.filled else PAGE,
        elinewidth=1.75, capsize=5, capthick=1.75, mew=1.75, zorder=4 if mark.filled else 3,
        label=name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…",
    )  # fmt: skip


def draw_learning_curve(
    title: str,
    points: Sequence[Point],
    metric: str,
    saved_step: int | None = None,
    restarts: Sequence[int] = (),
    skipped: Sequence[int] = (),
) -> blocks.Figure:
    """Draw one metric over the optimizer steps.

    A ring marks `saved_step`, whose weights were saved. Ticks mark restarts and skipped updates.
    """
    steps, values = [step for step, _ in points], [value if math.isfinite(value) else math.nan for _, value in points]
    with _new_figure(CURVE_HEIGHT) as (figure, axes):
        if all(map(math.isnan, values)):
            _show_no_finite_value(axes)
        else:
            _draw_curve(axes, steps, values, metric)
            for marked, low, high, color in ((restarts, -0.03, 0.05, INK), (skipped, 0.94, 1.0, AMBER)):
                for step in (one for one in marked if steps[0] <= one <= steps[-1]):
                    axes.axvline(step, low, high, color=color, linewidth=2)
            for step, value in zip(steps, values, strict=True):
                if step == saved_step and not math.isnan(value):
                    axes.axvline(step, **_LIMIT)
                    axes.plot(step, value, "o", markersize=12, color=AMBER, markerfacecolor="none", mew=2)
        return _to_svg_figure(figure, title, _describe_curve(points, metric, saved_step))


def _draw_curve(axes: Axes, steps: list[int], values: list[float], metric: str) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    marker = "o" if len(values) <= _MOST_DOTS else "None"
    axes.plot(steps, values, color=BLUE, linewidth=1.75, marker=marker, markersize=5)
    low, high = (extreme(value for value in values if not math.isnan(value)) for extreme in (min, max))
    # A schedule that ends near zero would look like a cliff on a log scale.
    logarithmic = metric != "learning_rate" and low > 0 and math.log10(high / low) > _DECADES_FOR_LOG
    if logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(numticks=6))
        axes.yaxis.set_minor_locator(NullLocator())
    _style_axes(axes, metric, "y")
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("optimizer step" + (" (value on a log scale)" if logarithmic else ""))


def _describe_curve(points: Sequence[Point], metric: str, saved_step: int | None) -> str:
    finite = [(step, format_metric(metric, value)) for step, value in points if math.isfinite(value)]
    if not finite:
        return "no finite value was logged."
    (first, start), (last, end) = finite[0], finite[-1]
    text = f"from {start} at step {first:,} to {end} at step {last:,}"
    text += "".join(f"; saved: step {step:,} with {value}" for step, value in finite if step == saved_step)
    lost = [step for step, value in points if not math.isfinite(value)]
    return text + (f"; {counted(len(lost), 'value')} not finite, first at step {lost[0]:,}." if lost else ".")


def draw_intervals(title: str, marks: Sequence[Mark], metric: str, description: str) -> blocks.Figure:
    """Draw each finite mark's value and interval on one axis."""
    shown = [mark for mark in marks if mark.is_finite]
    names = [textwrap.fill(words.one_line(mark.name), _LONGEST_NAME) for mark in shown]
    lines = sum(max(2, name.count("\n") + 1) for name in names)
    with _new_figure((lines + 2) * LINE_HEIGHT) as (figure, axes):
        for row, mark in enumerate(shown):
            _draw_mark(axes, mark, (mark.value, row), "x", "o")
        axes.set_yticks(range(len(shown)), names)
        axes.set_ylim(len(shown) - 0.5, -0.5)
        _style_axes(axes, metric, "x")
        return _to_svg_figure(figure, title, description)


def draw_cost_plot(marks: Sequence[Mark], decision: Decision) -> blocks.Figure:
    """Draw each finite mark's quality over its cost, the training time relative to full fine-tuning."""
    shown = [mark for mark in marks if mark.is_finite]
    with _new_figure(COST_HEIGHT) as (figure, axes):
        _draw_quality_and_cost(axes, shown, decision)
        _add_legend_below(figure, axes)
        description = "; ".join(f"{mark.name}: {mark.text} at {mark.cost:.2f}×" for mark in shown)
        return _to_svg_figure(figure, "Quality against training time", f"{description}.")


def _draw_quality_and_cost(axes: Axes, marks: Sequence[Mark], decision: Decision) -> None:
    from matplotlib.ticker import MaxNLocator

    markers = itertools.cycle("o^DvP<X>*")
    if not marks:
        _show_no_finite_value(axes)
        return
    for mark in marks:
        _draw_mark(axes, mark, (mark.cost, mark.value), "y", "s" if mark.is_full else next(markers))
        if mark.is_full:
            band = mark.value - decision.margin, mark.value + decision.margin
            axes.axhspan(*band, color=BAND, linewidth=0, zorder=0)
    _style_axes(axes, decision.metric, "y")
    axes.set_xlim(-0.06, 1.12 * max(1.0, *(mark.cost for mark in marks)))
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], min_n_ticks=3))
    axes.xaxis.set_major_formatter("{x:g}×")
    axes.set_xlabel("training time, relative to full")
    better = "" if decision.greater_is_better else " (smaller is better)"
    axes.set_title(words.one_line(words.metric_name(decision.metric) + better))
