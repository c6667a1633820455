"""What `fulltune compare` says to input that it cannot use, before anything is trained."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from rich.console import Console

from fulltune import pipeline
from fulltune.cli import compare as cli_compare
from fulltune.compare import fairness, timing
from fulltune.compare import run as comparing
from fulltune.compare.design import Cost, Fixed
from fulltune.recipe.file import load_recipe
from fulltune.system.run_folder import find_or_make
from tests import tiny
from tests.contract.command import fulltune


def recipe(folder: Path, methods: list[Any], rows: list[dict[str, Any]] | None = None, **blocks: Any) -> Path:
    if not (folder / "model").exists():
        tiny.save_model(folder / "model", "bert")
    data = tiny.write_jsonl(folder / "rows.jsonl", rows or tiny.topic_rows(40))
    return tiny.write_recipe(folder / "recipe.yaml", folder / "model", data, methods=methods, **blocks)


@pytest.mark.parametrize(
    ("methods", "code", "problem"),
    [
        (["full", "lara"], 2, "found 'lara'; did you mean 'lora'?"),
        (["full", {"kind": "peft", "type": "IA4"}], 2, "PEFT has no 'IA4'; did you mean 'IA3'?"),
        (["full", {"kind": "prompt", "num_virtual_tokens": 100}], 2, "100 are more than half of the 128 tokens"),
        (["full", "lora", "lora"], 2, "methods: two are called 'lora'; give one of them another 'name'"),
    ],
)
def test_method_that_cannot_be_is_refused_before_any_training(
    methods: list[Any], code: int, problem: str, tmp_path: Path
) -> None:
    said = fulltune("compare", recipe(tmp_path, methods), "--run-folder", tmp_path / "run")
    assert said.code == code
    assert problem in said.err
    assert not (tmp_path / "run" / "attempts").exists()


@pytest.mark.parametrize("command", [["compare"], ["compare", "--lint"]])
def test_recipe_without_methods_is_named(command: list[str], tmp_path: Path) -> None:
    path = recipe(tmp_path, [])
    said = fulltune(*command, path)
    assert said.code == 2
    assert said.problems == [
        f"{path}: methods: names nothing to compare; add for example 'methods: [base, full, lora, adapter, prompt]'"
    ]


def test_fewer_rows_than_classes_are_refused(tmp_path: Path) -> None:
    rows = [{"text": f"text number {number}", "label": f"class {number}"} for number in range(60)]
    said = fulltune("compare", recipe(tmp_path, ["full", "lora"], rows), "--run-folder", tmp_path / "run")
    assert said.code == 4
    assert "60 different labels in 60 rows" in said.err


def test_folder_of_another_comparison_is_refused(tmp_path: Path) -> None:
    path = recipe(tmp_path, ["full", "lora"])
    one = comparing.recipe_for(load_recipe(path))
    find_or_make(one, path.read_text(encoding="utf-8"), "run", tmp_path / "run", False)
    said = fulltune("compare", path, "--set", "compare.margin=0.02", "--run-folder", tmp_path / "run")
    assert said.code == 2
    assert "other settings (compare.margin)" in said.err


def test_budget_that_is_no_time_is_refused(tmp_path: Path) -> None:
    said = fulltune("compare", recipe(tmp_path, ["full", "lora"]), "--budget", "soon")
    assert (said.code, "--budget: 'soon': expected a time such as 30m, 2h or 90s" in said.err) == (2, True)


# ---- lint ------------------------------------------------------------------------------------------------------


def test_lint_that_finds_something_unfair_ends_with_code_2_and_a_clean_one_with_0(tmp_path: Path) -> None:
    fixed = fulltune("compare", recipe(tmp_path, [{"kind": "full", "learning_rate": 1e-3}, "lora"]), "--lint")
    assert fixed.code == 2
    assert "unfair: full: its learning rate was not searched" in fixed.out
    clean = fulltune("compare", recipe(tmp_path, ["full", "lora"]), "--lint")
    assert (clean.code, clean.out) == (0, "nothing found that would make this comparison unfair\n")


def test_lint_with_a_budget_says_what_its_design_will_be_marked_for(tmp_path: Path) -> None:
    path = recipe(tmp_path, ["full", "lora", "adapter", "head"])
    costs = {arm: Cost(100, 3, arm != "head") for arm in ("full", "lora", "adapter", "head")}
    with (
        mock.patch.object(timing, "_measure"),
        mock.patch.object(timing, "costs_of", return_value=costs),
        mock.patch.object(timing, "fixed_of", return_value=Fixed(0)),
    ):
        rich, poor, too_poor = (fulltune("compare", path, "--lint", "--budget", time) for time in ("9h", "12m", "2m"))
    assert [line.partition(":")[0] for line in rich.out.splitlines()] == ["worth knowing"]
    assert "worth knowing: eval rows: 4 rows choose the learning rates, too few to tell rates apart" in rich.out
    assert poor.code == 0, poor.out
    assert "worth knowing: full: 2 seeds: the budget ends before the next one" in poor.out
    assert "worth knowing: adapter, head: not trained: the budget leaves no time for it" in poor.out
    assert "nothing found" not in poor.out
    assert too_poor.code == 2
    assert "--budget 2m is too short for a verdict: 2 runs each of full and lora" in " ".join(too_poor.err.split())
    assert not [path for path in tmp_path.rglob("*") if path.name == "expectation.json"]


@pytest.mark.slow
def test_lint_with_a_budget_says_that_test_rows_stand_in_train_and_were_opened_by_another_comparison(
    tmp_path: Path,
) -> None:
    path = recipe(tmp_path, ["full", "lora"])
    known = tiny.write_jsonl(tmp_path / "known.jsonl", tiny.topic_rows(10))
    other = comparing.recipe_for(load_recipe(path, [f"data.test={known}", "compare.margin=0.02"]))
    folder, _ = find_or_make(other, "", "recipe", None, False)
    pipeline.prepare(pipeline.Run(other, folder))
    (folder / "compare").mkdir()
    (folder / "compare" / "test-openings.jsonl").write_text("{}\n", encoding="utf-8")
    recipes = [other, other.model_copy(update={"compare": other.compare.model_copy(update={"margin": 0.01})})]
    with mock.patch.object(timing, "_measure"):
        goes_on, begins = (fairness.lint_recipe(one, "9h") for one in recipes)
    assert "test-opened-again" not in [one.rule for one in goes_on]  # that is the one that it would go on with
    said = {one.rule: (one.level, one.what) for one in begins}
    assert said["test-opened-again"][0] == said["test-in-train"][0] == "worth knowing"
    assert f"other comparisons used them for a verdict before ({folder.name})" in said["test-opened-again"][1]
    assert "test rows have a text that also stands in train" in said["test-in-train"][1]


def test_comparison_that_could_go_on_with_other_settings_is_named(tmp_path: Path) -> None:
    path, console = recipe(tmp_path, ["full", "lora"]), Console(width=200, file=io.StringIO())

    def said(*overrides: str, fresh: bool = False) -> tuple[Path, str]:
        console.file = io.StringIO()
        _, folder = cli_compare._open(console, path, list(overrides), None, fresh)
        return folder, console.file.getvalue()

    first, told = said()
    assert "beginning anew" not in told
    other, told = said("compare.margin=0.02", "train.seed=7")
    assert other != first
    assert told.splitlines()[0] == (
        f"beginning anew: {first} is unfinished, but has other settings (train.seed: 42 there, 7 here, "
        "compare.margin: 0.01 there, 0.02 here)"
    )
    assert said()[0] == first
    assert "beginning anew" not in said()[1] + said("compare.budget=1h")[1] + said("compare.seeds=2", fresh=True)[1]
    assert "other settings (methods, compare.seeds: 2 there, not set here)" in said("methods=[full, adapter]")[1]
