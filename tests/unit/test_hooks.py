"""Runs with other functions of the user are other runs; pairs of which one would be ignored are refused."""

import functools
import subprocess
import sys
from typing import Any

import pytest

from fulltune.errors import RecipeError
from fulltune.recipe.fields import Recipe
from fulltune.records.data import DataSummary
from fulltune.train.hooks import Hooks

SCRIPT = """
from fulltune.train.hooks import Hooks
def loss(outputs, labels, n): return sum(x for x in {"a", "b", "c"} if x) and [y for y in labels]
print(Hooks(compute_loss=loss).digest())
"""


def recipe(**blocks: Any) -> Recipe:
    return Recipe.model_validate({"model": "m", "task": "text-classification", "data": {"train": "t.csv"}, **blocks})


def weighted(gamma: float) -> Any:
    return lambda outputs, labels, num_items_in_batch=None: gamma


def test_marks_in_two_processes_are_the_same() -> None:
    made = {subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True).stdout for _ in range(2)}
    assert len(made) == 1
    assert made != {""}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"compute_loss": weighted(1.0)}, {"compute_loss": weighted(2.0)}),
        ({"compute_loss": functools.partial(max, 1)}, {"compute_loss": functools.partial(max, 2)}),
        ({"preprocess": dict}, {}),
    ],
)
def test_marks_of_different_hooks_differ(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert Hooks(**one).digest() != Hooks(**other).digest()


def test_marks_without_hooks_that_change_the_weights_are_empty() -> None:
    assert Hooks().digest() == ""
    assert Hooks(metrics=lambda predictions, references: {}).digest() == ""


@pytest.mark.parametrize(
    ("hooks", "blocks", "message"),
    [
        ({"compute_loss": max}, {"train": {"class_weights": "balanced"}}, "apply class weights in your own loss"),
        ({"compute_loss": max}, {"train": {"label_smoothing_factor": 0.1}}, "smooth the labels in your own loss"),
        ({"compute_loss": max}, {"train": {"num_processes": 2}}, "train.num_processes: 1"),
        ({"metrics": max}, {"task": "causal-lm", "evaluate": {"generate_rows": 0}}, "generate_rows above 0"),
    ],
)
def test_check_of_pairs_that_cancel_each_other_refuses(
    hooks: dict[str, Any], blocks: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        Hooks(**hooks).check_recipe(recipe(**blocks))


@pytest.mark.parametrize(("kind", "refused"), [("text", True), ("chat", False), ("prompt_completion", False)])
def test_metrics_of_raw_text_are_refused(kind: Any, refused: bool) -> None:
    summary = DataSummary(
        task="causal-lm",
        problem_type=kind,
        columns={},
        max_length=8,
        max_length_reason="",
        splits={},
        sources={},
        fingerprint="",
    )
    Hooks().check_data(summary)
    if refused:
        with pytest.raises(RecipeError, match="but raw text has none"):
            Hooks(metrics=max).check_data(summary)
    else:
        Hooks(metrics=max).check_data(summary)
