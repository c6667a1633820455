"""The end of a run on the terminal: whether it was worth it, and what to change, in 80 columns."""

from __future__ import annotations

import io

import pytest
from rich.cells import cell_len
from rich.console import Console

from fulltune.cli.show import run as display
from fulltune.records.data import DataSummary, SplitSummary
from fulltune.records.events import DataPrepared
from fulltune.report.format.blocks import Headline

LABEL = "The verdict"
BRIEF = "On the same 200 test rows, the accuracy of full-seed42 is 13.0 points lower than that of majority class."
STEPS = (
    "The train loss was still falling at the end (5.01 to 3.6). Train for longer: --set train.num_train_epochs=4.",
    "Only 179 rows are used for training. Use more: remove data.max_rows.",
)


def shown(kind: str, steps: tuple[str, ...] = (), unfit: str = "") -> list[str]:
    console = Console(width=80, highlight=False, file=io.StringIO())
    headline = Headline(kind, LABEL, "the long one", BRIEF, note="This is the first of 2.")
    for line in display.conclusion(headline, unfit, steps):
        console.print(line)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["better", "worse", "unresolved", "unpaired", "alone", "none"])
def test_verdict_is_said_first_with_its_sentence(kind: str) -> None:
    text = " ".join(shown(kind))
    assert text.startswith(f"{LABEL}. {BRIEF}")
    assert "first of 2" in text
    assert "What to do next" not in text


def test_over_fitted_run_is_said_between_verdict_and_proposals() -> None:
    lines = shown("worse", STEPS, "Over-fitted: the eval loss rose.")
    assert lines.index("Over-fitted: the eval loss rose.") + 1 == next(
        place for place, line in enumerate(lines) if line.startswith("What to do next")
    )


def test_proposals_stand_below_it_with_hanging_lines_in_80_columns() -> None:
    lines = shown("worse", STEPS)
    assert lines[0].startswith(f"{LABEL}. ")
    first = lines.index("What to do next, the same recipe with one change at a time:") + 1
    assert lines[first].startswith("  - The train loss")
    assert lines[first + 1].startswith("    ")
    assert lines[first + 2] == "  - Only 179 rows are used for training. Use more: remove data.max_rows."
    assert all(cell_len(line) <= 80 for line in lines)
    assert any("--set train.num_train_epochs=4." in line for line in lines)


def test_rows_of_a_run_that_goes_on_are_one_line() -> None:
    split = SplitSummary(rows=1200, tokens=4, trained_tokens=4, truncated_rows=0, dropped_rows=0, length_percentiles={})
    summary = DataSummary(
        task="text-classification",
        problem_type="single_label",
        columns={},
        max_length=8,
        max_length_reason="",
        splits={"train": split, "eval": split, "test": split},
        sources={},
        fingerprint="x",
    )
    console = Console(width=80, highlight=False, file=io.StringIO())
    display.Display(console)(DataPrepared(summary=summary, is_known=True))
    assert console.file.getvalue() == "rows as before: 1,200 train, 1,200 eval, 1,200 test\n"  # type: ignore[attr-defined]
