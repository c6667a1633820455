"""Drawings: axes, gaps, spikes, and text that cannot leave its element."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from fulltune.report.format.curves import Bar, interval_plot, learning_curve, nice_ticks


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.83, 0.92), (3, 3), (0, 0), (-2e-5, 7e-6), (1, 90_000)])
def test_nice_ticks_any_range_covers_it_in_equal_steps(low: float, high: float) -> None:
    found = nice_ticks(low, high, 4)
    room = 1e-9 * (found[-1] - found[0])
    assert found[0] <= low + room
    assert found[-1] >= high - room
    steps = [after - before for before, after in pairwise(found)]
    assert steps == pytest.approx([steps[0]] * len(steps))
    assert 3 <= len(found) <= 7


def test_curve_value_not_finite_breaks_the_line_and_is_said() -> None:
    points = [(1, 1.0), (2, 2.0), (3, math.nan), (4, 1.0), (5, 1.5)]
    drawing = learning_curve("loss", points, "loss")
    assert drawing.count("<polyline") == 2
    assert "1 value not finite, first at step 3" in drawing
    assert "nan" not in drawing


def test_curve_nothing_finite_says_so() -> None:
    assert "no finite value was logged" in learning_curve("loss", [(1, math.nan)], "loss")


def test_curve_one_point_is_a_dot_inside_the_drawing() -> None:
    drawing = ElementTree.fromstring(learning_curve("accuracy", [(100, 1.0)], "accuracy", kept_step=100))
    dots = [circle for circle in drawing.iter("circle") if circle.get("class") == "dot"]
    assert len(dots) == 1
    assert "101%" not in ElementTree.tostring(drawing, encoding="unicode")


def test_curve_many_points_is_thinned_and_keeps_the_spike() -> None:
    points = [(step, 1.0 + step % 2) for step in range(20_000)]
    points[12_345] = (12_345, 99.0)
    drawing = learning_curve("loss", points, "loss")
    path = re.search(r'points="([^"]+)"', drawing)
    assert path is not None
    heights = [float(pair.split(",")[1]) for pair in path[1].split()]
    assert len(heights) <= 310
    assert sum(height < 30 for height in heights) == 1


def test_curve_wide_range_uses_a_log_scale_but_not_for_the_learning_rate() -> None:
    points = [(1, 1e-7), (2, 1e-3)]
    assert "log scale" in learning_curve("gradient norm", points, "grad_norm")
    assert "log scale" not in learning_curve("learning rate", points, "learning_rate")


def test_interval_plot_shows_names_whole_and_values_beside_the_marks() -> None:
    names = ["nearest centroid (frozen embeddings of 10,000 train rows)", "a " + "very long name of a method " * 4, "x"]
    drawing = ElementTree.fromstring(
        interval_plot("accuracy", [Bar(name, "trained", 1.0, 0.98, 1.0, "100.0%") for name in names], "accuracy")
    )
    texts = [element for element in drawing.iter("text") if element.get("class") == "name"]
    assert " ".join(text.text or "" for text in texts if text.text != "100.0%") == " ".join(map(str.strip, names))
    values = [text for text in texts if text.text == "100.0%"]
    marks = [float(re.search(r"M([\d.]+)", str(mark.get("d")))[1]) for mark in drawing.iter("path")]  # type: ignore[index]
    assert len(values) == len(names)
    # Seven letters of 7 units to the left of where they end: right of all marks.
    assert all(float(str(value.get("x"))) - 7 * len("100.0%") > max(marks) for value in values)
    heights = [float(str(text.get("y"))) for text in texts]
    assert heights == sorted(heights)
    assert len(set(heights)) == len(heights)


def test_drawings_hostile_names_stay_text() -> None:
    name = '</title><script>alert(1)</script>"&'
    bars = [Bar(name, "trained", 0.9, 0.8, 1.0, "90.0%"), Bar("b", "baseline", math.nan, 0, 1, "not finite")]
    for drawing in (interval_plot(name, bars, "accuracy"), learning_curve(name, [(1, 0.5)], "accuracy")):
        assert "<script" not in drawing
        root = ElementTree.fromstring(drawing)
        assert root.findtext("title") == name
