"""What a new head's linear probe costs: rows, memory and seconds, by arithmetic."""

from __future__ import annotations

from fulltune.models.shapes import Shapes
from fulltune.recipe.fields import Recipe
from fulltune.recipe.tasks import FACTS
from fulltune.records.data import DataSummary
from fulltune.records.probe import LEAST_HELD_OUT, MOST_FEATURE_BYTES, MOST_HELD_OUT, MOST_ROWS
from fulltune.system import deepspeed

PARTS = 3.5
"""Times the features, at most: beside them lie their scaled copies, in 64 bits for a while, and what the dense layer
before the last one may become."""
SOLVER_VECTORS = 25
"""Of all weights, in 64 bits: L-BFGS keeps ten changes of them and of their gradients."""
SECONDS, PASSES, FLOPS = 2.0, 300, 2e10
"""scikit-learn's import; passes over all features in all fits, and operations a second of one core: 9,003 rows of 77
classes took 17 s (docs/log.md)."""
SPAN_TOKENS = 10


def is_new(recipe: Recipe, shapes: Shapes) -> bool:
    """Whether the head has no values yet."""
    return FACTS[recipe.task].head_is_new and not shapes.head_is_kept


def is_fitted(recipe: Recipe, shapes: Shapes) -> bool:
    """Whether the training begins with it."""
    shared = deepspeed.zero_of(recipe)
    return is_new(recipe, shapes) and recipe.method.head_init != "random" and (shared is None or shared.stage < 3)


def rows(summary: DataSummary) -> int:
    """Rows that linear classifiers are fitted on, and judged by."""
    train, held_out = (summary.splits[name].rows if name in summary.splits else 0 for name in ("train", "eval"))
    return min(train, MOST_ROWS) + (min(held_out, MOST_HELD_OUT) if held_out >= LEAST_HELD_OUT else 0)


def num_bytes(summary: DataSummary, hidden_size: int) -> int:
    """Beside the untouched model's weights.

    Args:
        summary: Of the prepared data.
        hidden_size: Of the model.
    """
    kinds = 2 if summary.problem_type == "tags" else 3
    features = min(MOST_FEATURE_BYTES, 4 * kinds * hidden_size * _items(summary))
    logits = 2 * _items(summary) if summary.problem_type in ("single_label", "tags") else 0
    solver = 8 * _outputs(summary) * (SOLVER_VECTORS * hidden_size + logits)
    return round(PARTS * features) + solver


def seconds(summary: DataSummary, hidden_size: int) -> float:
    """Of the fits, without the passes through the model."""
    return SECONDS + 4 * PASSES * _items(summary) * _outputs(summary) * hidden_size / FLOPS


def _items(summary: DataSummary) -> int:
    """Rows, words, choices or tokens that are fitted on."""
    train = summary.splits["train"]
    of_row = {"choice": summary.num_choices, "span": SPAN_TOKENS}.get(summary.problem_type, 1)
    each = train.trained_tokens / max(1, train.rows) if summary.problem_type == "tags" else of_row
    return round(min(train.rows, MOST_ROWS) * each)


def _outputs(summary: DataSummary) -> int:
    return {"choice": 1, "regression": 1, "span": 2}.get(summary.problem_type, len(summary.labels))
