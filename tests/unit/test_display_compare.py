"""A comparison on the terminal: 80 columns, whole words, nothing that a terminal would obey."""

from __future__ import annotations

import io
import re

import pytest
from rich.cells import cell_len
from rich.console import Console

from fulltune.cli.show import compare as display_compare
from fulltune.records.comparison import Comparison
from tests import comparisons


def shown(comparison: Comparison) -> str:
    console = Console(width=80, highlight=False, file=io.StringIO())
    display_compare.verdict(console, comparison)
    return console.file.getvalue()  # type: ignore[attr-defined]


def expected(comparison: Comparison, metric: str, margin: float | None = 0.01, **changes: object) -> str:
    console = Console(width=80, highlight=False, file=io.StringIO())
    display_compare.expectation(console, comparison.expectation.model_copy(update=changes), metric, margin)
    return " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]


def test_verdict_classification_is_said_first_with_the_field_below() -> None:
    text = shown(comparisons.comparison())
    lines = [line.rstrip() for line in text.splitlines()]
    assert lines[1:3] == [
        "EQUIVALENT: take lora",
        "Take lora: as good as full within the margin, and it trains fewer weights.",
    ]
    assert "> lora        4.3%  92.2% [91.3, 93.0]     +0.34 [-0.27, +0.95]      3" in lines
    assert "> lora     99.6%  3 min 53 s  0.86×  0.68×    0.62×  3.73 MiB  0.0489" in lines
    assert "note  fewer seeds of prompt: the verdict did not hinge on them" in lines
    assert "does not hold  “LoRA costs a tenth of the compute”" in text
    assert "took       45 min 12 s in all, 10.0× one full run (4 min 31 s)" in lines


def test_verdict_language_model_writes_losses() -> None:
    text = shown(comparisons.language())
    assert "\nFULL\n" in text
    assert "Smaller loss is better." in text
    assert "1.916 [1.894, 1.938]  +0.012 [+0.006, +0.018]" in text


def test_verdict_undecided_says_what_would_decide_and_what_is_unfair() -> None:
    made = comparisons.undecided(openings=comparisons.openings(3), findings=(comparisons.finding(),))
    text = " ".join(shown(made).split())
    assert "UNDECIDED These rows and seeds do not tell the methods apart." in text
    assert "what to do lora: would be decided by 9,240 test rows or 12 seeds per method, if the true" in text
    assert "Unfair full: the best rate, 0.0002, is the highest that was tried" in text
    assert "> lora" not in text


def test_verdict_with_a_budget_has_a_line_about_what_was_forgotten() -> None:
    lines = [line.rstrip() for line in shown(comparisons.held()).splitlines()]
    assert "drift  at 92.0%: full 7.91%, lora 4.40%, ±0.42%: lora less" in lines


@pytest.mark.parametrize("made", [comparisons.comparison, comparisons.language, comparisons.held, comparisons.hostile])
def test_verdict_fits_80_columns_and_cuts_no_cell(made: type[Comparison]) -> None:
    text = shown(made())
    assert max(cell_len(line) for line in text.splitlines()) <= 80
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e]", text)
    assert not re.search(r"[\d%\]]…", text)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "5 seeds of each method at most; clear answers need fewer"),
        ({"sequential": False}, "5 seeds of each method takes"),
        ({"num_seeds": 1}, "1 seed of each method takes"),
    ],
)
def test_expectation_promises_fewer_seeds_only_where_there_may_be(changes: dict[str, object], said: str) -> None:
    assert said in expected(comparisons.comparison(), "accuracy", **changes)


def test_expectation_says_cost_and_what_can_be_found() -> None:
    text = expected(comparisons.comparison(), "accuracy")
    assert "methods head, full, lora, adapter, prompt" in text
    said = "25 short ones to find the rates, more where the best is at an edge; then 5 seeds of each method at most"
    assert f"trials {said}; clear answers need fewer" in text
    assert "about 1 h 7 min, 1 h 40 min if every method needs all" in text
    assert "differences of 0.97 points of accuracy or more if seeds differ by half a point" in text
    assert "UNDECIDED" not in text


def test_expectation_of_one_seed_says_that_it_decides_nothing() -> None:
    text = expected(comparisons.comparison(), "accuracy", num_seeds=1, detectable=None)
    assert "can find nothing: one seed tells nothing about the spread between seeds" in text


def test_expectation_says_what_the_budget_took_away_and_that_the_margin_is_too_small() -> None:
    note = "2 instead of 5 seeds at most, to stay within the budget"
    text = expected(comparisons.comparison(), "accuracy", detectable=0.0234, notes=(note,), budget_seconds=60.0)
    assert f"budget {note}" in text
    assert "margin 1 point, less than it can find: it may end UNDECIDED" in text


def test_expectation_of_very_few_rows_says_that_nothing_can_be_found() -> None:
    assert "can find nothing: with so few test rows and seeds" in expected(
        comparisons.comparison(), "accuracy", detectable=1.5
    )


def test_expectation_of_a_loss_says_that_it_is_not_known() -> None:
    assert "not known before seeds have been run: loss is no share of rows" in expected(comparisons.language(), "loss")


def test_expectation_of_a_budget_is_one_design_that_fits_into_it() -> None:
    changes = {"budget_seconds": 360.0, "seconds": 280.0, "most_seconds": 280.0, "num_seeds": 2, "detectable": None}
    text = expected(comparisons.comparison(), "accuracy", **changes)
    assert "2 seeds of full and of the best of the others, one of the rest" in text
    assert "about 4 min 40 s of the 6 min given" in text
    assert "can find not known before seeds have been run" in text
    assert "if every method" not in text
