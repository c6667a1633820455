"""The same drawings as one PNG. matplotlib is an optional extra, imported here alone and only when one is drawn."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fulltune.report.format import scatter
from fulltune.report.format.words import harmless

_INK, _QUIET, _GRID, _BLUE, _SOFT, _PAGE = "#1b1f24", "#57606a", "#e3e8ed", "#0a5bb5", "#eaf2fb", "#ffffff"
_HEAD = 64
_GAP = 18
_DPI = 160


def draw(title: str, subtitle: str, drawings: Sequence[scatter.Drawing], path: Path) -> bool:
    """Write the drawings side by side into a PNG.

    Args:
        title: The verdict.
        subtitle: Of what.
        drawings: At least one.
        path: The file.

    Returns:
        Whether it was written; False without matplotlib.
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    width = len(drawings) * (scatter.WIDTH + _GAP) + _GAP
    height = scatter.HEIGHT + _HEAD
    # Names may hold what TeX or a font would stumble over; settings of the user's own must not change the picture.
    settings: Any = {"text.usetex": False, "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"]}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")
        warnings.filterwarnings("ignore", message="Matplotlib currently does not support")
        figure = Figure(figsize=(width / 72, height / 72), dpi=_DPI, facecolor=_PAGE)
        FigureCanvasAgg(figure)
        axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
        axes.set_xlim(0, width)
        axes.set_ylim(height, 0)
        axes.set_axis_off()
        _write(axes, _GAP, 28, _fitting(title, width, 15), "left", 15, _INK, "bold")
        _write(axes, _GAP, 48, _fitting(subtitle, width, 9.5), "left", 9.5, _QUIET)
        for number, drawing in enumerate(drawings):
            for shape in drawing.shapes:
                _draw(axes, shape, _GAP + number * (scatter.WIDTH + _GAP), _HEAD)
        part = path.with_name(path.name + ".part")
        figure.savefig(part, format="png")
        part.replace(path)
    return True


def _fitting(text: str, width: float, size: float) -> str:
    """As much of the text as the picture is wide."""
    most = int((width - 2 * _GAP) / (0.64 * size))
    text = " ".join(harmless(text).split())
    return text if len(text) <= most else text[: most - 1] + "…"


def _write(
    axes: Any, x: float, y: float, text: str, side: str, size: float, colour: str, weight: str = "normal"
) -> None:
    text = " ".join(harmless(text).split())
    axes.text(
        x, y, text, ha=side, va="baseline", fontsize=size, color=colour, weight=weight, parse_math=False, zorder=6
    )


def _draw(axes: Any, shape: scatter.Shape, x: float, y: float) -> None:
    from matplotlib.patches import Polygon, Rectangle

    match shape:
        case scatter.Line():
            colour = {"grid": _GRID, "leader": _QUIET}.get(shape.style, _BLUE if shape.taken else _QUIET)
            wide = 1.6 if shape.style == "whisker" else 0.8
            ends = [x + shape.x1, x + shape.x2], [y + shape.y1, y + shape.y2]
            axes.plot(
                *ends, color=colour, linewidth=wide, solid_capstyle="butt", zorder=2 if shape.style == "grid" else 3
            )
        case scatter.Band():
            left, right = scatter.inner()
            box = Rectangle((x + left, y + shape.y1), right - left, shape.y2 - shape.y1, color=_SOFT, linewidth=0)
            axes.add_patch(box)
        case scatter.Label():
            side = {"start": "left", "middle": "center", "end": "right"}[shape.anchor]
            size, colour = (9.5, _INK) if shape.style == "name" else (8.5, _QUIET)
            _write(axes, x + shape.x, y + shape.y, shape.text, side, size, colour)
        case scatter.Mark():
            corners = [(x + across, y + down) for across, down in scatter.outline(shape)]
            face, edge = (_BLUE, _BLUE) if shape.taken else (_PAGE, _QUIET)
            axes.add_patch(Polygon(corners, closed=True, facecolor=face, edgecolor=edge, linewidth=1.4, zorder=5))
