"""The end of a run on the terminal: whether it was worth it, and what to change, in 80 columns."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from fulltune.cli.show import run as display
from fulltune.records.data import DataSummary, MixedSummary, SplitSummary
from fulltune.records.events import DataPrepared, Planned
from fulltune.report.format.blocks import Headline
from tests import plans

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


def test_mixed_sources_are_shown_with_their_share_and_how_often_their_rows_are_read() -> None:
    split = SplitSummary(
        rows=900,
        tokens=9000,
        trained_tokens=900,
        truncated_rows=0,
        dropped_rows=0,
        length_percentiles={"p50": 10, "p95": 10, "max": 10},
    )
    rare = split.model_copy(update={"rows": 25, "tokens": 1000})
    common = split.model_copy(update={"rows": 5000, "tokens": 50_000})
    rest: dict[str, Any] = {"weight": 0.05, "rows_per_epoch": 50}
    summary = DataSummary(
        task="causal-lm",
        problem_type="chat",
        columns={},
        max_length=10,
        max_length_reason="",
        splits={"train": split, "eval": split, "test": split},
        sources={"train": "file a", "eval": "file b", "test": "file c"},
        mixed=(
            MixedSummary(where="few.jsonl", kind="chat", counts=rare, **rest),
            MixedSummary(where="[many].txt", kind="raw text", counts=common, **rest),
        ),
        fingerprint="x",
    )
    console = Console(width=80, highlight=False, file=io.StringIO())
    shown = display.Display(console)
    shown(DataPrepared(summary=summary))
    shown(Planned(plan=plans.plan(num_train_epochs=2.0)))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert all(cell_len(line) <= 80 for line in lines)
    text = " ".join(" ".join(lines).split())
    assert "mixed in 25 1,000 10/10/10 0 0 file few.jsonl" in text
    few = "mixed in: few.jsonl: weight 0.05, 50 rows of each epoch's 1,000, 17.4% of the tokens; each is read"
    many = "mixed in: [many].txt: weight 0.05, 50 rows of each epoch's 1,000, 4.3% of the tokens; its form is raw text"
    for said in (f"{few} 2.0 times in an epoch", f"{few} 4.0 times over the run", many):
        assert said in text
    assert f"{many}; 2.0% of its 5,000 rows are read" in text
