"""A new task is its module and its facts: with them alone it is planned, trained, scored, reported and asked."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fulltune import predict
from fulltune.errors import RecipeError
from fulltune.recipe.data import DataBlock
from fulltune.recipe.tasks import FACTS, FORMS, TaskFacts
from fulltune.tasks import Row, RowExamples, Target, labels, text_classification
from tests import tiny
from tests.train import runs

NAME = "ending-classification"


def find_target(rows: Iterable[Row], columns: Mapping[str, str], data: DataBlock, where: str) -> Target:
    return replace(labels.find_target(rows, columns, data, where), problem_type="ending")


def encode(rows: Sequence[Row], target: Target, tokenizer: Any, max_length: int) -> RowExamples:
    """The last two words are read, and nothing before them."""
    text = target.columns["text"]
    cut = [{**row, text: " ".join(str(row[text]).split()[-2:])} for row in rows]
    return text_classification.encode(cut, target, tokenizer, max_length)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    functions = {name: value for name, value in vars(text_classification).items() if not name.startswith("__")}
    module: Any = ModuleType("fulltune.tasks.ending_classification")
    vars(module).update(functions | {"find_target": find_target, "encode": encode})
    form = replace(FORMS["single_label"], name="ending", kind="ends of texts", metrics=("accuracy", "loss"))
    module.FACTS = TaskFacts(
        auto_class="AutoModelForSequenceClassification",
        models="cannot classify ends of texts",
        hub="text-classification",
        data=("text", "label"),
        types=("ending",),
        length_cap=64,
        scored_by="classifiers",
        has_classes=True,
    )
    monkeypatch.setitem(FACTS, NAME, module.FACTS)  # type: ignore[arg-type]  # a dict, read by others only
    monkeypatch.setitem(FORMS, "ending", form)  # type: ignore[arg-type]  # a dict, read by others only
    monkeypatch.setitem(sys.modules, module.__name__, module)


def rows(count: int) -> list[dict[str, str]]:
    """The last two words tell the label, all others are noise."""
    words = tiny.FOOD
    return [
        {
            "text": f"{words[number % 7]} {words[(3 * number) % 8]} {number} {words[(number // 2) % 8]} {end}",
            "label": label,
        }
        for number in range(count)
        for end, label in [(("rain", "wet"), ("sun", "dry"))[number % 2]]
    ]


@pytest.mark.slow
def test_task_is_learned_scored_reported_and_asked(toy: None, tmp_path: Path) -> None:
    model = tiny.save_model(tmp_path / "model", "bert")
    train = {"num_train_epochs": 6, "device": "cpu"}
    with runs.without_tracing():
        reached = runs.run(
            tmp_path, model, rows(120), until="report", task=NAME, method={"learning_rate": 5e-3}, train=train
        )

    runs.assert_report_is_whole(reached)
    assert (reached.summary.problem_type, reached.summary.labels) == ("ending", ("dry", "wet"))
    assert reached.scores[-1].metrics["accuracy"].value > 0.9
    assert "ends of texts" in (reached.folder / "report.md").read_text(encoding="utf-8")
    assert reached.outcome is not None
    asked = predict.load_predictor(reached.folder).predict(
        [{"text": "soup and then rain"}, {"text": "rain before the sun"}]
    )
    assert [answer["label"] for answer in asked] == ["wet", "dry"]


def test_unknown_task_is_refused_with_those_that_are_known(toy: None, tmp_path: Path) -> None:
    recipe = tiny.write_recipe(tmp_path / "recipe.yaml", "m", "rows.csv", task="ending-classifier")
    with pytest.raises(RecipeError, match=f"task: expected one of .*, {NAME}, found 'ending-classifier'; did you mean"):
        runs.api.load_recipe(recipe)
