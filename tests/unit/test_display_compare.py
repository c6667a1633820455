"""A comparison on the terminal: 80 columns, whole words, nothing that a terminal would obey."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable

import pytest
from rich.cells import cell_len
from rich.console import Console

from fulltune.records.comparison import Comparison
from fulltune.report.comparison import content
from fulltune.report.format import pages
from fulltune.report.format.blocks import Element, Headline, Section
from fulltune.report.format.words import MetricFormatter
from tests import comparisons


def printed(parts: Iterable[Headline | Section | Element]) -> str:
    console = Console(width=80, file=io.StringIO())
    pages.print_parts(console, parts)
    return console.file.getvalue()  # type: ignore[attr-defined]  # a StringIO


def shown(comparison: Comparison) -> str:
    return printed(content.build_comparison_terminal_report(comparison))


def expected(comparison: Comparison, metric: str, **changes: object) -> str:
    design = comparison.expectation.model_copy(update=changes)
    return " ".join(printed([content.build_expectation_section(design, MetricFormatter(metric, 0.01))]).split())


def test_verdict_classification_is_said_first_with_the_field_below() -> None:
    lines = [line.rstrip() for line in shown(comparisons.comparison()).splitlines()]
    text = " ".join(" ".join(lines).split())
    assert text.startswith("EQUIVALENT: use lora. Use lora: it is as good as full within the margin and trains fewer")
    assert "▸ lora      973 k (4.3%)  92.2% [91.3, 93.0]     +0.34 [-0.27, +0.95]   99.6%" in lines
    assert "▸ lora   3 min 53 s · 0.86×    2.48 k  21.1 T · 0.68×  1.17 GiB · 0.81×" in lines
    assert "▸ lora   565 MiB · 0.62×   3.73 MiB · 0.043×  1.24 ms" in lines, "columns that do not fit stand below"
    assert "- prompt: trained with fewer seeds, because full and the best other method" in text
    assert "took 45 min 12 s in total, 10.0× as long as one full run (4 min 31 s)" in text


@pytest.mark.parametrize("made", [comparisons.comparison, comparisons.language, comparisons.hostile])
def test_verdict_fits_80_columns_and_cuts_no_number(made: Callable[[], Comparison]) -> None:
    text = shown(made())
    assert max(cell_len(line) for line in text.splitlines()) <= 80
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e]", text)
    assert not re.search(r"[\d%\]]…", text)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "5 seeds of each method at most; a clear result needs fewer"),
        ({"sequential": False}, "5 seeds of each method takes"),
        ({"num_seeds": 1}, "1 seed of each method takes"),
    ],
)
def test_expectation_promises_fewer_seeds_only_where_there_may_be(changes: dict[str, object], said: str) -> None:
    assert said in expected(comparisons.comparison(), "accuracy", **changes)


def test_expectation_of_a_budget_is_one_design_that_fits_into_it() -> None:
    changes = {"budget_seconds": 360.0, "seconds": 280.0, "num_seeds": 2, "detectable": None}
    text = expected(comparisons.comparison(), "accuracy", **changes)
    assert "2 seeds of full and of the best other method and one of each other method" in text
    assert "about 4 min 40 s of the 6 min budget" in text
    assert "detectable unknown until the first seeds are trained" in text
