"""Every recipe in `examples` loads; those whose rows are in the project are prepared and planned with a tiny model."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from fulltune.recipe_file import load_recipe
from fulltune.records import DataSummary
from tests.contract.command import fulltune

EXAMPLES = Path(__file__).parents[2] / "examples"
RECIPES = sorted(EXAMPLES.glob("*.yaml"))
OWN_ROWS = {
    "chat": ("chat", 40, ()),
    "regression": ("regression", 60, ()),
    "multi_label": ("multi_label", 48, ("cleaning", "guests", "money", "shopping")),
}
"""Recipe to problem type, rows in all splits, labels."""


@pytest.fixture(autouse=True)
def _data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FULLTUNE_BENCH_DATA", str(tmp_path / "bench"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_of_an_example_is_accepted(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.method.kind == "full"
    assert Path(recipe.output) == EXAMPLES.parent / "runs"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_of_an_example_says_how_to_run_it(path: Path) -> None:
    comments = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert comments
    named = [line for line in comments if "fulltune run" in line]
    assert all(f"examples/{path.name}" in line for line in named)


def test_examples_with_rows_in_the_project_are_all_tested() -> None:
    own = {path.stem for path in RECIPES if all(Path(file).exists() for file in load_recipe(path).train_files())}
    assert own == set(OWN_ROWS)


@pytest.mark.parametrize("name", OWN_ROWS)
def test_example_with_own_rows_is_prepared_and_planned(
    name: str, tmp_path: Path, tiny_encoder: Path, tiny_decoder: Path
) -> None:
    kind, rows, labels = OWN_ROWS[name]
    model = tiny_decoder if name == "chat" else tiny_encoder
    result = fulltune(
        *("plan", EXAMPLES / f"{name}.yaml", "--run-folder", tmp_path / "run", "--json"),
        *("--set", f"model={model}", "--set", "evaluate.generate_rows=0"),
    )
    assert result.code == 0, result.err
    assert json.loads(result.out)["trial"] == "full-seed42"
    summary = DataSummary.load(tmp_path / "run" / "data" / "summary.json")
    assert summary.problem_type == kind
    assert summary.labels == labels
    assert sum(split.rows for split in summary.splits.values()) == rows
    assert not summary.dropped
    assert all("eval rows" in note for note in summary.notes)  # the examples are small on purpose


def test_classic_script_imports_only_two_names_of_ours() -> None:
    tree = ast.parse((EXAMPLES / "classic_script.py").read_text(encoding="utf-8"))
    ours = [
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "fulltune"
        for alias in node.names
    ]
    assert ours == ["Trainer", "TrainingArguments"]
