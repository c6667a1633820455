"""Plots of a task's metric over the drift on generic text: of one run, and of a comparison's methods."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fulltune.report.format.canvas import AMBER, BLUE, PAGE, QUIET, SMALL, WIDTH, new_figure, style_axes, svg
from fulltune.report.format.plots import COST_HEIGHT, CURVE_HEIGHT, short_name
from fulltune.text import counted, format_metric


def frontier_plot(
    title: str, points: Sequence[tuple[float, float, str]], chosen: tuple[float, float], limit: float, metric: str
) -> str:
    """Draw a metric over the drift on generic text, as SVG: how much of the task costs how much of what was.

    Args:
        title: What is drawn; also the accessible name.
        points: Drift, metric and kind of each point; those of a kind in their order on the way, which a line joins.
        chosen: Drift and metric of the one that is kept, marked with a ring.
        limit: The budget, drawn as an upright line.
        metric: Decides how values are written.
    """
    with new_figure(WIDTH, CURVE_HEIGHT) as figure:
        axes = figure.subplots()
        for kind, marker in (("whole", "o"), ("by layer", "s")):
            found = [(drift, value) for drift, value, of in points if of == kind and math.isfinite(value)]
            if found:
                look: dict[str, Any] = {"color": BLUE, "markersize": 6, "linewidth": 1.25 if kind == "whole" else 0}
                axes.plot(*zip(*found, strict=True), marker=marker, markerfacecolor=PAGE, label=kind, **look)
        style_axes(axes, metric, "y")
        axes.axvline(limit, color=AMBER, linewidth=1.25, dashes=(4, 3), label="budget")
        axes.plot(*chosen, marker="o", markersize=6, color=BLUE, linewidth=0, label="kept")
        axes.set_xlabel("drift on generic text", color=QUIET, size=SMALL)
        _legend_above(axes)
        described = "; ".join(f"{format_metric(metric, value)} at {drift:.2g}" for drift, value, _ in sorted(points))
        return svg(figure, title, f"{described}.")


@dataclass(frozen=True)
class Frontier:
    """A method's metric over the drift, run by run."""

    name: str
    is_full: bool
    """Drawn as squares."""
    filled: bool
    """The recommended method, filled and blue."""
    points: tuple[tuple[tuple[float, float], ...], ...]
    """Of each run the drift and the metric of all points."""
    best: tuple[tuple[tuple[float, float], ...], ...]
    """Of each run those that no other one beats, which a line joins."""


def frontiers_plot(title: str, frontiers: Sequence[Frontier], limit: float, metric: str) -> str:
    """Draw the frontiers of several methods over each other, as SVG.

    Args:
        title: What is drawn; also the accessible name.
        frontiers: The methods.
        limit: The budget, drawn as an upright line.
        metric: Decides how values are written.
    """
    markers = itertools.cycle("o^Dv")
    with new_figure(WIDTH, COST_HEIGHT) as figure:
        axes = figure.subplots()
        for one in frontiers:
            colour, marker = BLUE if one.filled else QUIET, "s" if one.is_full else next(markers)
            look: dict[str, Any] = {"color": colour, "markerfacecolor": colour if one.filled else PAGE}
            places = [place for run in one.points for place in run if all(map(math.isfinite, place))]
            if places:
                look["label"] = short_name(one.name)
                axes.plot(*zip(*places, strict=True), marker=marker, markersize=5, linewidth=0, **look)
            for run in one.best:
                axes.plot(*zip(*run, strict=True), linewidth=1.25, color=colour, zorder=1)
        style_axes(axes, metric, "y")
        axes.axvline(limit, color=AMBER, linewidth=1.25, dashes=(4, 3), label="budget")
        axes.set_xlabel("drift on generic text", color=QUIET, size=SMALL)
        _legend_above(axes)
        named = (f"{one.name}: {counted(sum(map(len, one.points)), 'point')}" for one in frontiers)
        return svg(figure, title, f"{'; '.join(named)}.")


def _legend_above(axes: Any) -> None:
    """Where no point and no line is."""
    place = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 4, "columnspacing": 1, "handletextpad": 0.4}
    for text in axes.legend(frameon=False, fontsize=SMALL, labelcolor=QUIET, borderpad=0, **place).get_texts():
        text.set_parse_math(False)
