"""What `fulltune compare` says to input that it cannot use, before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fulltune.compare import run as comparing
from fulltune.recipe.file import load_recipe
from fulltune.system.run_folder import find_or_make_folder
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
        (
            ["full", {"kind": "prompt", "num_virtual_tokens": 100}],
            2,
            "100 is more than half of the model's maximum length of 128 tokens",
        ),
        (["full", "lora", "lora"], 2, "methods: two methods are called 'lora'; give one of them a different 'name'"),
    ],
)
def test_method_that_cannot_be_is_refused_before_any_training(
    methods: list[Any], code: int, problem: str, tmp_path: Path
) -> None:
    said = fulltune("compare", recipe(tmp_path, methods), "--run-folder", tmp_path / "run")
    assert said.code == code
    assert problem in said.err
    assert not (tmp_path / "run" / "attempts").exists()


@pytest.mark.parametrize(
    ("task", "method", "labels"),
    [
        ("text-classification", {"kind": "full"}, ["full", "head", "lora"]),
        ("text-classification", {"kind": "lora", "rank": 4}, ["full", "head", "lora-r4"]),
        (
            "text-classification",
            {"kind": "full", "freeze": ["embeddings"]},
            ["full", "head", "lora", "full-freeze-embeddings"],
        ),
        ("text-classification", {"kind": "full", "learning_rate": "search"}, ["full", "head", "lora"]),
        ("causal-lm", {"kind": "full"}, ["full", "lora"]),
    ],
)
def test_recipe_without_methods_compares_the_usual_ones(
    task: str, method: Any, labels: list[str], tmp_path: Path
) -> None:
    data = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.topic_rows(40))
    path = tiny.write_recipe(tmp_path / "recipe.yaml", "MODEL", data, task=task, method=method)
    compared = comparing.comparison_recipe(load_recipe(path))
    assert [one.label for one in compared.methods] == labels
    assert not any(getattr(one, "is_searched", False) for one in compared.methods)


def test_recipe_that_init_wrote_is_compared(tmp_path: Path) -> None:
    data = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.topic_rows(40))
    assert fulltune("init", data, "--output", tmp_path / "recipe.yaml").code == 0
    said = fulltune("compare", tmp_path / "recipe.yaml", "--lint")
    assert said.code == 0, said.err
    assert f"{tmp_path / 'recipe.yaml'}: names no methods, so these are compared: full, head, lora" in said.err


def test_folder_of_another_comparison_is_refused(tmp_path: Path) -> None:
    path = recipe(tmp_path, ["full", "lora"])
    one = comparing.comparison_recipe(load_recipe(path))
    find_or_make_folder(one, path.read_text(encoding="utf-8"), "run", tmp_path / "run", False)
    said = fulltune("compare", path, "--set", "compare.margin=0.02", "--run-folder", tmp_path / "run")
    assert said.code == 2
    assert "other settings (compare.margin)" in said.err


def test_budget_that_is_no_time_is_refused(tmp_path: Path) -> None:
    said = fulltune("compare", recipe(tmp_path, ["full", "lora"]), "--budget", "soon")
    assert (said.code, "--budget: expected a time such as 30m, 2h or 90s, found 'soon'" in said.err) == (2, True)


def test_budget_for_less_than_a_run_of_each_method_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    path = recipe(tmp_path, ["full", "lora"], train={"num_train_epochs": 50_000})
    said = fulltune("compare", path, "--budget", "1s", "--run-folder", tmp_path / "run")
    assert said.code == 2
    assert "--budget 1s" in said.problems[-1]
    assert "is too short for a verdict" in said.problems[-1]
    assert not (tmp_path / "run" / "attempts").exists()


# ---- lint ------------------------------------------------------------------------------------------------------


def test_lint_that_finds_something_unfair_ends_with_code_2_and_a_clean_one_with_0(tmp_path: Path) -> None:
    fixed = fulltune("compare", recipe(tmp_path, [{"kind": "full", "learning_rate": 1e-3}, "lora"]), "--lint")
    assert fixed.code == 2
    assert "unfair: full: its learning rate was not searched" in fixed.out
    clean = fulltune("compare", recipe(tmp_path, ["full", "lora"]), "--lint")
    assert (clean.code, clean.out) == (0, "no unfair setting was found\n")


def test_lint_with_a_budget_is_refused(tmp_path: Path) -> None:
    refused = fulltune("compare", recipe(tmp_path, ["full", "lora"]), "--lint", "--budget", "9h")
    assert refused.code == 2
    assert "--budget: has no effect with --lint" in refused.err
