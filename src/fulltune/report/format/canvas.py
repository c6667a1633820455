"""What all plots have in common: colours, sizes, axes, and the way to SVG.

matplotlib is imported when the first plot is drawn. An SVG names colours by the variables of `report.css`, so it
follows the page into dark mode; its text stays text, in the page's font.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any, Literal

from fulltune.report.format import words
from fulltune.text import is_share

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {
    "page": "#ffffff", "ink": "#1b1f24", "quiet": "#57606a", "grid": "#e3e8ed", "blue": "#0a5bb5",
    "blue-soft": "#dbeafa", "amber": "#8a5200",
}  # fmt: skip
"""Variables of `report.css` with their values in light mode."""
PAGE, INK, QUIET, GRID, BLUE, BAND, AMBER = COLOURS.values()
WIDTH = 400
"""In points, which are the units of the SVG."""
SMALL, NORMAL = 12, 13


@contextmanager
def new_figure(width: int, height: int) -> Iterator[Figure]:
    """A figure of so many points whose settings are ours, whatever the user's own are; none of them outlives it."""
    import matplotlib
    from matplotlib.figure import Figure

    settings: Any = {name: value for name, value in matplotlib.rcParamsDefault.items() if name != "backend"}
    settings |= {
        "svg.fonttype": "none", "svg.hashsalt": "fulltune", "text.usetex": False, "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"], "path.simplify": True, "path.simplify_threshold": 1.0,
        "axes.unicode_minus": False,
    }  # fmt: skip
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # Names may hold what the font lacks; the page has fonts of its own.
        warnings.filterwarnings("ignore", message="Glyph|Matplotlib currently does not support")
        yield Figure(figsize=(width / 72, height / 72), dpi=72, frameon=False, layout="constrained")


def style_axes(axes: Axes, metric: str, along: Literal["x", "y"]) -> None:
    """Thin lines across instead of a frame, and the metric's values written as the report writes them."""
    from matplotlib.ticker import MaxNLocator

    axes.set_frame_on(False)
    axes.set_axisbelow(True)
    axes.grid(axis=along, color=GRID, linewidth=1)
    axes.tick_params(which="both", length=0, pad=5, labelsize=SMALL, labelcolor=QUIET)
    axis = axes.yaxis if along == "y" else axes.xaxis
    if axis.get_scale() != "log":
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], min_n_ticks=3))
    shares = is_share(metric)
    axis.set_major_formatter(lambda value, _: "" if shares and not 0 <= value <= 1 else words.tick(metric, value))
    if shares:  # none lies below 0 or above 1
        low, high = axis.get_view_interval()
        axis.set_view_interval(max(0.0, low), min(1.0, high), ignore=True)


def say_nothing_finite(axes: Axes, text: str) -> None:
    axes.set_axis_off()
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", color=QUIET, size=SMALL)


def svg(figure: Figure, title: str, described: str) -> str:
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
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}"><title>{label}</title>'
        f"<desc>{escape(described)}</desc>{drawn}</svg>"
    )
