"""What a new head's linear probe costs: rows, memory and seconds, by arithmetic."""

from __future__ import annotations

from fulltune.records import probe
from fulltune.records.data import DataSummary

PARTS = 3.5
"""Times the features, at most: beside them lie their scaled copies, in 64 bits for a while, and what the dense layer
before the last one may become."""
SECONDS, PASSES, FLOPS = 2.0, 150, 2e10
"""scikit-learn's import; passes over all features in all fits, and operations a second of one core: 9,003 rows of 77
classes took 8.5 s after the import (docs/log.md)."""


def rows(summary: DataSummary, width: int) -> int:
    """Rows that linear classifiers of the model's hidden size `width` are fitted on, and judged by; pairs count
    twice."""
    held_out = summary.splits["eval"].rows if "eval" in summary.splits else 0
    few = min(held_out, probe.MOST_HELD_OUT) if held_out >= probe.LEAST_HELD_OUT else 0
    return passes(summary) * (_train_rows(summary, width) + few)


def passes(summary: DataSummary) -> int:
    """Of each row through the untouched model, at most: a pair's texts are read together, and apart where the tokenizer
    tells them apart."""
    return 2 if "text_pair" in summary.columns else 1


def num_bytes(summary: DataSummary, width: int) -> int:
    """Beside the untouched model's weights, in the host's memory."""
    items = _items(summary, width)
    kinds = 2 if summary.form.tags_words else 3
    return round(PARTS * 4 * kinds * _kept(summary, width) * items) + (_solver_bytes(summary, width) or 0)


def seconds(summary: DataSummary, width: int) -> float:
    """Of the fits, without the passes through the model."""
    if _solver_bytes(summary, width) is None:
        return SECONDS
    return SECONDS + 4 * PASSES * _items(summary, width) * _outputs(summary) * width / FLOPS


def _solver_bytes(summary: DataSummary, width: int) -> int | None:
    """None: it is too much, and nothing is fitted."""
    found = probe.solver_bytes(summary.form.name, _items(summary, width), _outputs(summary), width)
    return found if found <= probe.MOST_SOLVER_BYTES else None


def _items(summary: DataSummary, width: int) -> int:
    """Train rows, words, choices or tokens that are looked at."""
    return round(_train_rows(summary, width) * _per_row(summary))


def _train_rows(summary: DataSummary, width: int) -> int:
    most = probe.rows_within(summary.form.name, _per_row(summary), _kept(summary, width))
    return min(summary.splits["train"].rows, most)


def _kept(summary: DataSummary, width: int) -> int:
    return round(width * probe.PAIRS) if passes(summary) == 2 else width


def _per_row(summary: DataSummary) -> float:
    train = summary.splits["train"]
    return probe.items_per_row(
        summary.form.name, max(1.0, train.trained_tokens / max(1, train.rows)), summary.num_choices
    )


def _outputs(summary: DataSummary) -> int:
    return {"choice": 1, "regression": 1, "span": 2}.get(summary.form.name, len(summary.labels))
