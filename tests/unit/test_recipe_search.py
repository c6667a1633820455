"""What a recipe can ask a search for, and what is refused, with its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from fulltune.errors import RecipeError
from fulltune.recipe.fields import Recipe
from fulltune.recipe.file import load_recipe
from fulltune.recipe.several_runs import with_settings


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
        ("method: {learning_rate: search, learning_rates: [1e-4]}", "4  method.learning_rates: a search needs two or"),
        ("method: {learning_rates: [1e-4, 2e-4]}", "4  method.learning_rates: .*no effect on a single rate"),
        (
            "method: {learning_rate: search}\nsearch: {budget: 20 minutes}",
            "5  search.budget: expected a time .* found '20 minutes'",
        ),
        ("search: {budget: 20m}", "4  search.budget: nothing is searched; add 'learning_rate: search'"),
        (
            "search: {trials: 1, train.weight_decay: [0.1, 0.2]}",
            "4  search.trials: expected greater than or equal to 2",
        ),
        ("search: {train.num_train_epochs: 2}", r"4  search.train.num_train_epochs: expected a list .*write \[2"),
        ("search: {trials: 5}", "4  search.trials: is the number of runs with other settings, and names none"),
        ("search: {method.name: [a, b]}", "4  search.method.name: methods are compared"),
        ("search: {method.kind: [full, lora]}", "4  search.method.kind: methods are compared"),
        ("search: {method.learning_rate: [search, 1e-4]}", "4  search.method.learning_rate: give rates as values"),
        ("search: {method.learning_rate: [1e-4, 3]}", "4  search.method.learning_rate: expected a .* found 3$"),
        ("search: {train.seed: [1, 2]}", "4  search.train.seed: cannot be searched, because all"),
        ("search: {train.eval_strategy: [steps, epoch]}", "4  search.train.eval_strategy: how the eval rows are asked"),
        ("search: {train.num_train_epochs: [2, 4, 2]}", "4  search.train.num_train_epochs: names 2 twice"),
        (
            "search: {train.num_train_epochs: [2, 4], train.max_steps: [10, 20]}",
            "4  search: train.num_train_epochs 2, train.max_steps 10: max_steps and num_train_epochs are both given",
        ),
        (
            "search: {train.global_batch_size: [8, 12], train.micro_batch_size: [8, 4]}",
            "4  search: train.global_batch_size 12, train.micro_batch_size 8: .*not a multiple of",
        ),
        (
            "method: {learning_rates: [1e-4, 1e-3]}\nsearch: {train.weight_decay: [0, 1]}",
            "4  method.learning_rates: .*no effect on a single rate",
        ),
        ("method: {learning_rate: search}\ntrain: {load_best_model_at_end: false}", "5  train.load_best_model_at_end"),
        ("search: {train.num_train_epochs: [2]}", "4  search.train.num_train_epochs: expected two or more values"),
        ("search: {train.num_train_epochz: [2, 3]}", "no setting of train; did you mean 'num_train_epochs'"),
        ("search: {method.rank: [2, 4]}", "4  search.method.rank: no setting of method full"),
        ("search: {num_train_epochs: [2, 3]}", "4  search.num_train_epochs: unknown .*'train.num_train_epochs'"),
        ("search: {data.max_rows: [2, 3]}", "4  search.data.max_rows: only settings of 'method' and 'train'"),
        ("search: {train.num_train_epochs: [2, lots]}", "expected a valid number; found 'lots'"),
        ("search: {train.chunked_loss: [true, false]}", "True: train.chunked_loss: has no effect for text-class"),
        ("method: {learning_rate: search}\nsearch: {train.weight_decay: [0, 1]}", "5  search: .*which is another"),
        ("methods: [{kind: full, learning_rate: search}, lora]", "4  methods.0.learning_rate: a comparison searches"),
        ("methods: [full, lora]\nsearch: {train.weight_decay: [0, 1]}", "5  search: has no effect on a comparison"),
    ],
)
def test_search_that_cannot_be_is_refused_once_with_its_line(tmp_path: Path, lines: str, problem: str) -> None:
    with pytest.raises(RecipeError, match=f"r.yaml:{problem}" if problem[0].isdigit() else problem) as refusal:
        read(tmp_path, lines)
    assert len(refusal.value.problems) == 1


def test_settings_are_written_beside_the_other_keys_or_with_set(tmp_path: Path) -> None:
    lines = "search: {trials: 4, train.num_train_epochs: [2, 4], method: {layerwise_lr_decay: [0.9, 1.0]}}"
    wanted = {"train.num_train_epochs": (2, 4), "method.layerwise_lr_decay": (0.9, 1.0)}
    assert read(tmp_path, lines).search.settings == wanted
    given = ("search.train.num_train_epochs=[2, 4]", "search.method.layerwise_lr_decay=[0.9, 1.0]")
    assert read(tmp_path, "", given).search.settings == wanted
    assert read(tmp_path, lines).is_searched
    assert not read(tmp_path, "").is_searched


def test_more_time_goes_on_with_the_same_search(tmp_path: Path) -> None:
    short, long = (
        read(tmp_path, "method: {learning_rate: search}", (f"search.budget={time}",)) for time in ("1m", "9m")
    )
    assert short.fingerprint() == long.fingerprint() != read(tmp_path, "").fingerprint()


def test_run_that_is_found_has_one_rate_and_the_name_of_its_method(tmp_path: Path) -> None:
    recipe = read(tmp_path, "method: {kind: lora, learning_rate: search, learning_rates: [1e-4, 1e-3]}")
    found = with_settings(recipe, {"method.learning_rate": 1e-3, "method.rank": 4})
    assert (found.method.fixed_learning_rate, found.method.arm, found.is_searched) == (1e-3, "lora", False)
