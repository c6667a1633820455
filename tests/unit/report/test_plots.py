"""Plots: axes, gaps, spikes, and text that cannot leave its element."""

from __future__ import annotations

import math
import re
from typing import Any
from xml.etree import ElementTree

from fulltune.report.format import plots


def learning_curve(*given: Any, **more: Any) -> str:
    return plots.draw_learning_curve(*given, **more).svg


def curve(drawing: str) -> str:
    """What the blue line does, as the SVG writes it."""
    paths = re.findall(r'<path d="([^"]+)" style="fill: none; stroke: var\(--blue\)', drawing)
    assert len(paths) == 1
    return str(paths[0])


def texts(drawing: str) -> list[ElementTree.Element]:
    return list(ElementTree.fromstring(drawing).iter("text"))


def test_curve_value_not_finite_breaks_the_line_and_is_said() -> None:
    points = [(1, 1.0), (2, 2.0), (3, math.nan), (4, 1.0), (5, 1.5)]
    drawing = learning_curve("loss", points, "loss")
    assert curve(drawing).count("M") == 2
    assert "1 value not finite, first at step 3" in drawing
    assert "nan" not in drawing
    assert "no finite value was logged" in learning_curve("loss", [(1, math.nan)], "loss")


def test_curve_one_point_is_a_dot_on_an_axis_that_ends_at_all() -> None:
    drawing = learning_curve("accuracy", [(100, 1.0)], "accuracy", saved_step=100)
    assert drawing.count("<use ") == 2, "the point and the ring around it"
    assert "101%" not in drawing
    assert "100%" in [text.text for text in texts(drawing)]


def test_curve_many_points_is_thinned_and_keeps_the_spike() -> None:
    points = [(step, 1.0 + step % 2) for step in range(20_000)]
    points[12_345] = (12_345, 99.0)
    heights = [float(y) for y in re.findall(r"[ML] [\d.]+ ([\d.]+)", curve(learning_curve("loss", points, "loss")))]
    assert len(heights) < 2000
    assert sum(height < 30 for height in heights) == 1


def test_curve_wide_range_uses_a_log_scale_but_not_for_the_learning_rate() -> None:
    points = [(1, 1e-7), (2, 1e-3)]
    assert "log scale" in learning_curve("gradient norm", points, "grad_norm")
    assert "log scale" not in learning_curve("learning rate", points, "learning_rate")


def test_curve_close_values_have_ticks_that_differ() -> None:
    numbers = [text.text for text in texts(learning_curve("loss", [(0, 2.1195), (3, 2.1201)], "loss"))]
    ticks = [number for number in numbers if number and number.startswith("2.1")]
    assert len({*ticks}) == len(ticks) >= 3


def test_plots_hostile_names_stay_text() -> None:
    name = '</title><script>alert(1)</script>"& $\\frac{1$'
    drawing = learning_curve(name, [(1, 0.5)], "accuracy")
    assert "<script" not in drawing
    assert ElementTree.fromstring(drawing).findtext("title") == name


def test_plots_have_the_page_s_colours_and_fonts_and_load_nothing() -> None:
    drawing = learning_curve("loss", [(1, 2.0), (2, 1.0)], "loss", saved_step=2)
    assert not re.search(r"#[0-9a-f]{6}|font-family|url\(|http|<style|<g id", drawing)
    assert {"var(--blue)", "var(--quiet)", "var(--grid)", "var(--amber)"} <= set(re.findall(r"var\([\w-]+\)", drawing))


def test_plots_twice_are_the_same_whatever_the_user_s_settings_are() -> None:
    import matplotlib

    points = [(1, 2.0), (2, 1.0), (3, math.nan)]
    first = learning_curve("loss", points, "loss", 2, skipped=[2])
    with matplotlib.rc_context({"svg.fonttype": "path", "font.size": 30, "axes.grid": True, "lines.linewidth": 9}):
        before = dict(matplotlib.rcParams)
        again = learning_curve("loss", points, "loss", 2, skipped=[2])
        assert dict(matplotlib.rcParams) == before
    assert again == first
