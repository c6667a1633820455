"""What the rows of each problem type are called: one place for the report and the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fulltune.recipe.tasks import ProblemType
from fulltune.records.data import DataSummary
from fulltune.text import counted, format_percent


@dataclass(frozen=True)
class RowWords:
    """The words for one problem type."""

    kind: str
    """The kind of rows."""
    target: str = "label"
    """What the model shall give."""
    row: str = "row"
    """What is counted: a context that is longer than the limit becomes several windows."""
    longest: str = "longest row"
    """What the longest number of tokens belongs to."""
    worst: str = "Wrong test rows with the highest loss"
    """The caption over the worst mistakes."""
    question: str = '"a text"'
    """What a model of this type can be asked, as it stands behind `fulltune predict RUN`."""


_FILE = "--file ROWS.jsonl"
_WORDS: dict[ProblemType, RowWords] = {
    "regression": RowWords("regression", "number", worst="Test rows with the highest loss"),
    "multi_label": RowWords("multi label", "labels"),
    "tags": RowWords("words with tags", "entities", worst="Test rows with the most wrong entities"),
    "span": RowWords(
        "answers in a context", "answer", "window", longest="longest window",
        worst="Wrongly answered questions with the highest loss", question=_FILE,
    ),
    "choice": RowWords("multiple choice", "right choice", longest="longest choice", question=_FILE),
    "text": RowWords("raw text", question='"the beginning of a text"'),
    "prompt_completion": RowWords("prompt and completion", question='"a question"'),
    "chat": RowWords("chat", question='"a question"'),
    "source_target": RowWords("source and target", longest="longest source or target"),
}  # fmt: skip


def row_words(summary: DataSummary | None) -> RowWords:
    """The words for a run's rows; those for one label each where nothing is known."""
    if summary is None or summary.problem_type not in _WORDS:
        found = RowWords("single label")
    else:
        found = _WORDS[summary.problem_type]
    if summary and has_images(summary):
        return replace(found, kind="images", question="IMAGE.png")
    return replace(found, question=_FILE) if summary and "text_pair" in summary.columns else found


def has_images(summary: DataSummary) -> bool:
    """Images are all of the same size, so that numbers of tokens say nothing."""
    return "image" in summary.columns


def has_untrained_tokens(summary: DataSummary) -> bool:
    """Only a part of the tokens is trained."""
    return summary.problem_type in ("prompt_completion", "chat", "source_target")


def mixed_words(summary: DataSummary, epochs: float | None = None, trained_shares: Sequence[float] = ()) -> list[str]:
    """A line for each source that is mixed into the train rows.

    Args:
        summary: Of the prepared data.
        epochs: Of the run; None: not known yet.
        trained_shares: Of the tokens that were trained on, each source's share.
    """
    lines = []
    for number, source in enumerate(summary.mixed):
        often = source.times_read(1 if epochs is None else epochs)
        share = source.tokens_per_epoch / max(1, summary.tokens_per_epoch)
        parts = [
            f"{source.where}: weight {source.weight:g}, {counted(source.rows_per_epoch, 'row')} of each epoch's "
            f"{summary.rows_per_epoch:,}, {format_percent(share)} of the tokens"
        ]
        if source.problem_type != summary.problem_type:
            parts.append(f"its form is {_WORDS[source.problem_type].kind}")
        if often > 1:
            in_what = "in an epoch" if epochs is None else "over the run"
            parts.append(f"each is read {often:.1f} times {in_what}")
        elif epochs is not None:
            parts.append(f"{format_percent(often)} of its {counted(source.counts.rows, 'row')} are read")
        if trained_shares:
            parts.append(f"{format_percent(trained_shares[number])} of the tokens that were trained on")
        lines.append("; ".join(parts))
    return lines
