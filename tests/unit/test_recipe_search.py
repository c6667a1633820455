"""What a recipe can ask a search for, and what is refused, with its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from fulltune.errors import RecipeError
from fulltune.recipe.fields import Recipe
from fulltune.recipe.file import load_recipe


def read(folder: Path, lines: str, overrides: tuple[str, ...] = ()) -> Recipe:
    path = folder / "r.yaml"
    path.write_text(f"model: m\ntask: text-classification\ndata: {{train: x.csv}}\n{lines}\n", encoding="utf-8")
    return load_recipe(path, overrides)


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ("method: {learning_rate: serch}", "4  method.learning_rate: expected a number above 0 and below 1, or search"),
        ("method: {learning_rate: 2}", "4  method.learning_rate: expected a number above 0 .* found 2"),
        ("method: {learning_rate: true}", "4  method.learning_rate: expected a number above 0 .* found True"),
        (
            "method: {learning_rate: search, learning_rates: [1e-4]}",
            "4  method.learning_rates: a search needs at least two",
        ),
        ("method: {learning_rates: [1e-4, 2e-4]}", "4  method.learning_rates: has no effect without a search"),
        ("compare: {budget: 20m}", "4  compare.budget: .*nothing is compared or searched; .*'learning_rate: search'"),
        ("method: {learning_rate: search}\ntrain: {load_best_model_at_end: false}", "5  train.load_best_model_at_end"),
        (
            "methods: [{kind: full, learning_rate: search}, lora]",
            "4  methods.0.learning_rate: a comparison always searches",
        ),
    ],
)
def test_search_that_cannot_be_is_refused_once_with_its_line(tmp_path: Path, lines: str, problem: str) -> None:
    with pytest.raises(RecipeError, match=f"r.yaml:{problem}" if problem[0].isdigit() else problem) as refusal:
        read(tmp_path, lines)
    assert len(refusal.value.problems) == 1


def test_more_time_goes_on_with_the_same_search(tmp_path: Path) -> None:
    short, long = (
        read(tmp_path, "method: {learning_rate: search}", (f"compare.budget={time}",)) for time in ("1m", "9m")
    )
    assert short.fingerprint() == long.fingerprint() != read(tmp_path, "").fingerprint()
