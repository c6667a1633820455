"""What each kind of rows is called: one place for the report and the terminal."""

from __future__ import annotations

from fulltune.recipe.tasks import ProblemType
from fulltune.records.data import DataSummary

_KINDS: dict[ProblemType, str] = {
    "tags": "words with tags",
    "span": "answers in a context",
    "choice": "multiple choice",
    "text": "raw text",
    "prompt_completion": "prompt and completion",
    "source_target": "source and target",
}
_TARGETS: dict[ProblemType, str] = {
    "regression": "number",
    "multi_label": "labels",
    "tags": "entities",
    "span": "answer",
    "choice": "right choice",
}
_WORST: dict[ProblemType, str] = {
    "regression": "Test rows with the highest loss",
    "tags": "Test rows with the most wrong entities",
    "span": "Wrongly answered questions with the highest loss",
}
_LONGEST: dict[ProblemType, str] = {
    "span": "longest window",
    "choice": "longest choice",
    "source_target": "longest source or target",
}


def kind(summary: DataSummary) -> str:
    """The kind of rows in words."""
    if has_images(summary):
        return "images"
    return _KINDS.get(summary.problem_type, summary.problem_type.replace("_", " "))


def target(summary: DataSummary) -> str:
    """What the model shall give."""
    return _TARGETS.get(summary.problem_type, "label")


def row(summary: DataSummary) -> str:
    """What is counted as a row: windows of a context that is longer than the limit are several."""
    return "windows" if summary.problem_type == "span" else "rows"


def longest(summary: DataSummary) -> str:
    """What the longest number of tokens belongs to."""
    return _LONGEST.get(summary.problem_type, "longest row")


def worst(problem_type: ProblemType | None) -> str:
    """The caption over the worst mistakes."""
    return "Wrong test rows with the highest loss" if problem_type is None else _WORST.get(problem_type, worst(None))


def has_images(summary: DataSummary) -> bool:
    """Images are all of the same size, so that numbers of tokens say nothing."""
    return "image" in summary.columns


def has_untrained_tokens(summary: DataSummary) -> bool:
    """Only a part of the tokens is trained."""
    return summary.problem_type in ("prompt_completion", "chat", "source_target")


def question(summary: DataSummary) -> str:
    """What a model of this kind can be asked, as it stands behind `fulltune predict RUN`."""
    if summary.problem_type in ("choice", "span") or "text_pair" in summary.columns:
        return "--file ROWS.jsonl"
    if has_images(summary):
        return "IMAGE.png"
    words = {"chat": "a question", "prompt_completion": "a question", "text": "the beginning of a text"}
    return f'"{words.get(summary.problem_type, "a text")}"'
