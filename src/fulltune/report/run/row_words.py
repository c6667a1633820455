"""What the rows of each problem type are called: one place for the report and the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fulltune.recipe.tasks import FORMS, FROM_FILE, Form
from fulltune.records.data import DataSummary
from fulltune.text import counted, format_percent


def row_words(summary: DataSummary | None) -> Form:
    """The words for a run's rows; those for one label each where nothing is known."""
    form = summary.form if summary else FORMS["single_label"]
    if summary and has_images(summary):
        return replace(form, kind="images", question="IMAGE.png")
    return replace(form, question=FROM_FILE) if summary and "text_pair" in summary.columns else form


def has_images(summary: DataSummary) -> bool:
    """Images are all of the same size, so that numbers of tokens say nothing."""
    return "image" in summary.columns


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
        if source.kind != summary.form.kind:
            parts.append(f"its form is {source.kind}")
        if often > 1:
            in_what = "in an epoch" if epochs is None else "over the run"
            parts.append(f"each is read {often:.1f} times {in_what}")
        elif epochs is not None:
            parts.append(f"{format_percent(often)} of its {counted(source.counts.rows, 'row')} are read")
        if trained_shares:
            parts.append(f"{format_percent(trained_shares[number])} of the tokens that were trained on")
        lines.append("; ".join(parts))
    return lines
