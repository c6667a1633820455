"""Each row type is shown in its own words."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fulltune import report
from fulltune.records.data import DataSummary, Preview, Segment
from fulltune.records.scores import Answer
from fulltune.report.run.about_data import choose_row_form
from fulltune.report.run.model_card import build_loading_code


def rewritten(folder: Path, labels: tuple[str, ...] = (), counts: Any = None, **changes: Any) -> tuple[str, str]:
    """The reports of a run with another summary of its data: Markdown and HTML."""
    path = folder / "data" / "summary.json"
    summary = DataSummary.load(path)
    splits = {name: split.model_copy(update={"label_counts": counts or {}}) for name, split in summary.splits.items()}
    summary.model_copy(update={"labels": labels, "splits": splits, **changes}).save(path)
    html = report.write_run_report(folder)
    return (folder / "report.md").read_text(encoding="utf-8"), html.read_text(encoding="utf-8")


def read_only(text: str, label: str | None) -> tuple[Preview, ...]:
    return (Preview(segments=(Segment(text=text, trained=False),), label=label),)


def test_reports_tags_count_entities_and_show_no_legend_of_trained_tokens(
    classification: Path, kit: SimpleNamespace
) -> None:
    worst = (Answer(text="Ada slept .", expected="[Ada]PER slept .", predicted="Ada slept .", loss=2.0),)
    kit.save_scores(classification, kit.scores("full-seed42", "trained", 0.9, metric="f1", worst=worst))
    markdown, html = rewritten(
        classification,
        labels=("O", "B-LOC", "B-PER", "I-LOC", "I-PER"),
        counts={"PER": 7, "LOC": 3},
        problem_type="tags",
        columns={"tokens": "tokens", "tags": "tags"},
        previews=read_only("Ada lives in London .", "[Ada]PER lives in [London]LOC ."),
    )
    assert "Rows per entity type:" in markdown
    assert "B-PER" not in markdown.partition("## Data")[2]
    assert "entities: [Ada]PER lives in [London]LOC ." in markdown
    assert "Test rows with the most wrong entities:" in markdown
    assert "The model is trained on the tokens between" not in markdown
    assert "trained tokens are bold" not in html
    assert "entities: <mark>[Ada]PER lives in [London]LOC .</mark>" in html


def test_reports_images_name_no_tokens_and_escape_paths(classification: Path) -> None:
    columns = {"image": "image", "label": "label"}
    markdown, html = rewritten(classification, columns=columns, previews=read_only("<b>cats</b>/1.png", "cat"))
    data = markdown.partition("## Data")[2].partition("\n## ")[0]
    assert "row type: images" in data
    assert "tokens" not in data
    assert "p50" not in data
    assert "&lt;b&gt;cats&lt;/b&gt;/1.png" in html
    assert "<b>cats" not in html
    assert "fulltune predict banking-1 IMAGE.png" in markdown


def test_reports_windows_and_answers_of_questions(classification: Path) -> None:
    columns = {"context": "context", "question": "question", "answers": "answers"}
    markdown, _ = rewritten(
        classification, problem_type="span", columns=columns, previews=read_only("[CLS]Who?[SEP]Ada did.[SEP]", "Ada")
    )
    assert "| split | windows |" in markdown
    assert "maximum length: 97 tokens" in markdown
    assert "answer: Ada" in markdown
    assert "fulltune predict banking-1 --file ROWS.jsonl" in markdown


@pytest.mark.parametrize(
    ("task", "parts"),
    [
        ("text-classification", ("AutoModelForSequenceClassification", "AutoTokenizer")),
        ("token-classification", ("AutoModelForTokenClassification", 'aggregation_strategy="first"')),
        ("question-answering", ("AutoModelForQuestionAnswering", "AutoTokenizer")),
        ("multiple-choice", ("AutoModelForMultipleChoice", "AutoTokenizer")),
        ("image-classification", ("AutoModelForImageClassification", "AutoImageProcessor")),
        ("causal-lm", ("AutoModelForCausalLM", "AutoTokenizer")),
        ("seq2seq", ("AutoModelForSeq2SeqLM", "AutoTokenizer")),
    ],
)
def test_loading_code_of_each_task_compiles_and_names_its_class(task: str, parts: tuple[str, ...]) -> None:
    code = build_loading_code('a "folder"', task, None)
    compile(code, task, "exec")
    assert all(part in code for part in parts)


def test_loading_code_finds_a_base_in_a_package() -> None:
    code = build_loading_code("m", "text-classification", None, "package:json/tool.py")
    [place] = [
        line.partition("from_pretrained(")[2].partition(", config=")[0]
        for line in code.splitlines()
        if "base =" in line
    ]
    assert eval(place, {"files": files}) == str(Path(json.__file__).parent / "tool.py")
    assert "from importlib.resources import files\n" in code


@pytest.mark.parametrize(
    ("kind", "columns", "expected"),
    [
        ("single_label", {"text": "a"}, '"a text"'),
        ("single_label", {"text": "a", "text_pair": "b"}, "--file ROWS.jsonl"),
        ("single_label", {"image": "a"}, "IMAGE.png"),
        ("choice", {"choices": "a"}, "--file ROWS.jsonl"),
        ("chat", {"messages": "a"}, '"a question"'),
        ("text", {"text": "a"}, '"the beginning of a text"'),
    ],
)
def test_question_fits_what_the_model_reads(
    classification: Path, kind: str, columns: dict[str, str], expected: str
) -> None:
    summary = DataSummary.load(classification / "data" / "summary.json")
    assert choose_row_form(summary.model_copy(update={"problem_type": kind, "columns": columns})).question == expected
