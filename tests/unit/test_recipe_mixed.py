"""Files of `data.train` with a weight: how they are written, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from fulltune.errors import RecipeError
from fulltune.recipe.data import MixedFile, rows_per_epoch
from fulltune.recipe.fields import Recipe
from fulltune.recipe.file import load_recipe

START = "model: some/model\ntask: causal-lm\ndata:\n  eval: dev.jsonl\n"


def written(folder: Path, train: str, start: str = START) -> Path:
    (folder / "recipe.yaml").write_text(f"{start}  train: {train}\n")
    return folder / "recipe.yaml"


def problems(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return [problem.replace(f"{path}", "recipe.yaml") for problem in caught.value.problems]


def test_file_with_a_weight_stands_beside_those_of_the_task(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, "[a.jsonl, {path: b.jsonl, weight: 0.05}, {path: c.jsonl}]"))
    assert recipe.data.task_files == (str(tmp_path / "a.jsonl"), str(tmp_path / "c.jsonl"))
    assert recipe.data.mixed_files == (MixedFile(path=str(tmp_path / "b.jsonl"), weight=0.05),)


def test_override_and_a_recipe_from_python_take_weights(tmp_path: Path) -> None:
    by_flag = load_recipe(written(tmp_path, "a.jsonl"), ["data.train=[a.jsonl, {path: b.jsonl, weight: 0.05}]"])
    entries = [str(tmp_path / "a.jsonl"), {"path": str(tmp_path / "b.jsonl"), "weight": 0.05}]
    data = {"train": entries, "eval": str(tmp_path / "dev.jsonl")}
    from_python = Recipe.model_validate({"model": "some/model", "task": "causal-lm", "data": data})
    assert by_flag.data == from_python.data
    assert Recipe.model_validate(by_flag.model_dump(mode="json")).data == by_flag.data


@pytest.mark.parametrize("train", ["{path: a.jsonl}", "[{path: a.jsonl}]", "[a.jsonl]"])
def test_entry_without_a_weight_is_its_path(tmp_path: Path, train: str) -> None:
    plain = load_recipe(written(tmp_path, "a.jsonl"))
    assert load_recipe(written(tmp_path, train)).fingerprint() == plain.fingerprint()


def test_weight_is_part_of_what_shapes_a_run(tmp_path: Path) -> None:
    trains = ["a.jsonl", "[a.jsonl, {path: b.jsonl, weight: 0.1}]", "[a.jsonl, {path: b.jsonl, weight: 0.2}]"]
    assert len({load_recipe(written(tmp_path, train)).fingerprint() for train in trains}) == 3


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ("[a, {path: b, weight: 5%}]", ["data.train.1.weight: expected number, found '5%'; write 0.05"]),
        (
            "[a, {path: b, weight: -1}, {path: c, weight: 0}, {path: d, weight: 1}]",
            [
                "data.train.1.weight: expected greater than 0, found -1",
                "data.train.2.weight: expected greater than 0, found 0",
                "data.train.3.weight: expected less than 1, found 1",
            ],
        ),
        (
            "[{path: b, weight: 0.6}, {path: c, weight: 0.4}]",
            [
                "data.train: all files have a weight, but the task's rows, from which eval and test are split, need a "
                "file without a weight; remove one of the weights",
                "data.train: the weights add up to 1, expected at most 0.999, because each epoch needs rows of the "
                "task; lower the weights",
            ],
        ),
        ("[a, {path: a, weight: 0.1}]", ["data.train: a is listed twice, once with a weight; keep one entry"]),
        (
            "[a, {path: b, weight: 0.1}, {path: b, weight: 0.2}]",
            ["data.train: b is listed twice, once with a weight; keep one entry"],
        ),
        (
            "[a, {pth: b, weights: 0.3}]",
            [
                "data.train.1.path: missing; expected: File, folder or address, as for `data.train`",
                "data.train.1.weight: missing; expected: Share of each epoch's rows that come from this file, such "
                "as 0.05",
                "data.train.1.pth: unknown setting; did you mean 'path'?",
                "data.train.1.weights: unknown setting; did you mean 'weight'?",
            ],
        ),
        ("[a, 7]", ["data.train.1: expected text, found 7"]),
    ],
)
def test_wrong_entries_are_refused_all_at_once(tmp_path: Path, train: str, expected: list[str]) -> None:
    assert problems(written(tmp_path, train)) == [f"recipe.yaml:5  {problem}" for problem in expected]


def test_file_to_score_on_cannot_be_mixed_in(tmp_path: Path) -> None:
    assert problems(written(tmp_path, "[a.jsonl, {path: dev.jsonl, weight: 0.1}]")) == [
        "recipe.yaml:4  data.eval: also in train, but a model must not be scored on train rows; use another file"
    ]


def test_images_cannot_be_mixed_in(tmp_path: Path) -> None:
    start = START.replace("causal-lm", "image-classification")
    assert problems(written(tmp_path, "[a, {path: b, weight: 0.1}]", start)) == [
        "recipe.yaml:5  data.train: images cannot be mixed in by weight yet; list the folders without weights"
    ]


@pytest.mark.parametrize(
    ("weights", "expected"), [((0.05,), (53,)), ((0.5,), (1000,)), ((0.1, 0.4), (200, 800)), ((), ())]
)
def test_rows_per_epoch_make_up_the_weight_of_all(weights: tuple[float, ...], expected: tuple[int, ...]) -> None:
    assert rows_per_epoch(1000, weights) == expected
