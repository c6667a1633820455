"""Blocks and a run's events on the terminal, in 80 columns."""

from __future__ import annotations

import io
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.cells import cell_len
from rich.console import Console

from fulltune import report
from fulltune.records.scores import Estimate
from fulltune.report.format import pages
from fulltune.report.format.blocks import (
    Code,
    Element,
    Headline,
    Paragraph,
    Section,
    Table,
    untrusted,
)


def printed(*parts: Headline | Section | Element) -> list[str]:
    console = Console(width=80, file=io.StringIO())
    pages.print_parts(console, parts)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]  # a StringIO


def test_wide_table_continues_below_with_its_first_column_again() -> None:
    header = ("model", *(f"metric {number}" for number in range(6)), "why")
    rows = tuple((name, *["12.3% [1.2%, 23.4%]"] * 6, "a reason of many words " * 3) for name in ("one", "two"))
    lines = printed(Table("What it is", header, rows, frozenset(range(1, 7))))
    assert max(map(cell_len, lines)) <= 80
    assert lines[0] == "What it is"
    assert sum(line.startswith("model") for line in lines) == sum(line.startswith("two ") for line in lines) == 3
    assert " ".join(lines).count("12.3% [1.2%, 23.4%]") == 12


def test_table_names_stay_whole_and_texts_are_broken() -> None:
    name = "logistic regression (frozen embeddings)"
    lines = printed(Table("", ("model", "value", "why"), ((name, "0.1", "because " * 12),), frozenset({1})))
    assert lines[1].startswith(f"{name}    0.1  because because")
    assert max(map(cell_len, lines)) <= 80


@pytest.mark.parametrize("text", ["[bold]x[/bold]", "a\x1b[31mb", "\u202eabc", "two\nlines"])
def test_nothing_of_a_text_is_obeyed(text: str) -> None:
    lines = printed(Paragraph(text), Table("", ("a",), ((untrusted(text),),)))
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e]", "".join(lines))
    assert len(lines) == 3
    assert "[bold]" in lines[0] or "bold" not in text


def test_long_command_can_be_copied() -> None:
    command = "fulltune run recipe.yaml " + " ".join(f"--set train.seed={number}" for number in range(5))
    lines = printed(Section("next", "next", (Code(command, "sh"), Code(f"1  {command[25:]}", "sh"))))
    assert " ".join(line.removesuffix("\\").strip() for line in lines[2:8]) == command
    assert lines[8] == "1  --set train.seed=0 \\"


def test_end_of_a_run_has_scores_verdict_and_what_to_try(classification: Path, kit: SimpleNamespace) -> None:
    ahead = {"nearest centroid (frozen)": Estimate(value=-0.1, low=-0.15, high=-0.05)}
    kit.save_scores(classification, kit.scores("full-seed42", "trained", 0.712, differences=ahead))
    lines = printed(*report.build_run_terminal_report(classification))
    text = " ".join(" ".join(lines).split())
    assert max(map(cell_len, lines)) <= 80
    places = [text.index(said) for said in ("Each metric on the test rows", "Worse than the best baseline.", "--set ")]
    assert places == sorted(places)
    markdown = " ".join(
        report.write_run_report(classification).with_name("report.md").read_text(encoding="utf-8").split()
    )
    assert text[places[1] :].partition(". ")[2].partition(" Run the same")[0][:200] in markdown.replace("\\", "")


def test_end_of_a_run_with_answers_shows_what_was_said_before_and_after(causal_lm: Path) -> None:
    text = " ".join(" ".join(printed(*report.build_run_terminal_report(causal_lm))).split())
    assert re.search(r"expected .* before training pretrained says .* after training trained says", text)
