from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any

from fulltune.report.format import blocks
from fulltune.stats.curves import Point
from fulltune.text import counted, format_metric, format_number, is_share

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


COLOURS = {
    "ink": "#1b1f24", "quiet": "#57606a", "grid": "#e3e8ed", "blue": "#0a5bb5", "amber": "#8a5200",
}  # fmt: skip
INK, QUIET, GRID, BLUE, AMBER = COLOURS.values()
WIDTH, HEIGHT = 400, 220
"""Sizes in points, the units of the SVG."""
FONT_SIZE = 12
_MOST_DOTS = 20
_DECADES_FOR_LOG = 2.0
_LIMIT: dict[str, Any] = {"color": AMBER, "linewidth": 1.25, "dashes": (4, 3)}


@contextmanager
def _new_figure() -> Iterator[tuple[Figure, Axes]]:
    import matplotlib
    from matplotlib.figure import Figure

    settings: Any = {name: value for name, value in matplotlib.rcParamsDefault.items() if name != "backend"}
    settings |= {
        "svg.fonttype": "none", "svg.hashsalt": "fulltune", "text.usetex": False, "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"], "path.simplify": True, "path.simplify_threshold": 1.0,
        "axes.unicode_minus": False, "axes.labelcolor": QUIET, "axes.labelsize": FONT_SIZE, "axes.axisbelow": True,
        "axes.grid": True, "grid.color": GRID, "grid.linewidth": 1, "xtick.labelsize": FONT_SIZE,
        "ytick.labelsize": FONT_SIZE, "xtick.labelcolor": QUIET, "ytick.labelcolor": QUIET,
    }  # fmt: skip
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72), dpi=72, frameon=False, layout="constrained")
        yield figure, figure.subplots()


def _style_axes(axes: Axes, metric: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_frame_on(False)
    axes.tick_params(which="both", length=0, pad=5)
    axes.grid(visible=False, axis="x")
    axis = axes.yaxis
    if axis.get_scale() != "log":
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], min_n_ticks=3))
    if not is_share(metric):
        ticks = axis.get_ticklocs()
        if len({format_number(tick) for tick in ticks}) == len(ticks):
            axis.set_major_formatter(lambda value, _: format_number(value))
        else:  # too close for rounded numbers
            axes.ticklabel_format(axis="y", style="plain", useOffset=False)
        return
    axis.set_major_formatter(lambda value, _: f"{round(100 * value, 1):g}%" if 0 <= value <= 1 else "")
    low, high = axis.get_view_interval()  # a share is between 0 and 1
    axis.set_view_interval(max(0.0, low), min(1.0, high), ignore=True)


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
    with _new_figure() as (figure, axes):
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
    _style_axes(axes, metric)
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
