"""A recipe names the user's own functions: metrics that choose, a loss, a function that changes rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fulltune import api
from fulltune.errors import FulltuneError, RecipeError, SetupError
from fulltune.inference.own_metrics import own_scores
from fulltune.recipe.fields import local_paths
from fulltune.recipe.file import load_recipe
from fulltune.recipe.functions import import_functions
from fulltune.records.events import Message
from fulltune.records.run import Environment
from fulltune.tasks import PLACE
from tests import tiny
from tests.train import runs

CODE = """
import torch

def loss(outputs, labels, num_items_in_batch=None):
    summed = torch.nn.functional.cross_entropy(outputs.logits.float(), labels, reduction="sum")
    return summed / num_items_in_batch

def vector(outputs, labels, num_items_in_batch=None):
    return outputs.logits.sum(dim=1)

def infinite(outputs, labels, num_items_in_batch=None):
    return outputs.logits.sum() / 0

def shout(row):
    return {**row, "text": row["text"].upper()}

def lose(row):
    return None if "number 9" in row["text"] else row

def exact(answers, expected, rows):
    assert all(row["label"] == label for row, label in zip(rows, expected))
    return [answer == label for answer, label in zip(answers, expected)]

def wrong(answers, expected, rows):
    return sum(answer != label for answer, label in zip(answers, expected)) / len(rows)

def broken(answers, expected, rows):
    return [len(answer) / len(row["txt"]) for answer, row in zip(answers, rows)]
"""
EVALUATE = {"metric": "mine:wrong", "greater_is_better": False, "metrics": ["mine:exact"], "bootstrap_samples": 100}


@pytest.fixture(autouse=True)
def untraced() -> Iterator[None]:
    with runs.without_tracing():
        yield


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(CODE, encoding="utf-8")
    return tiny.save_model(tmp_path / "model", "bert")


def test_an_own_metric_chooses_and_is_scored_on_test_rows_like_the_tasks_metric(tmp_path: Path, model: Path) -> None:
    reached = runs.run(
        tmp_path, model, tiny.topic_rows(), until="report", train={"num_train_epochs": 2}, evaluate=EVALUATE
    )
    values = [entry["metrics"] for entry in runs.events(tmp_path, "eval")]
    assert len(values) > 1
    assert all(math.isclose(one["mine:wrong"], 1 - one["accuracy"]) for one in values)
    assert all(one["mine:exact"] == one["accuracy"] for one in values)
    assert reached.outcome is not None
    steps = {one["step"]: one["metrics"]["mine:wrong"] for one in runs.events(tmp_path, "eval") if one["step"]}
    assert (reached.outcome.best_step, reached.outcome.best_metric) == min(steps.items(), key=lambda item: item[1])
    *baselines, trained = reached.scores
    assert trained.metrics["mine:exact"] == trained.metrics["accuracy"], "one number per row: the same resamples"
    wrong = trained.metrics["mine:wrong"]
    assert wrong.value == pytest.approx(1 - trained.metrics["accuracy"].value)
    assert wrong.low <= wrong.value <= wrong.high
    assert all("mine:wrong" in one.metrics for one in baselines), "a verdict compares with what needs no training"
    runs.assert_report_is_whole(reached)
    report = (reached.folder / "report.md").read_text(encoding="utf-8")
    assert "mine:wrong" in report
    assert Environment.load(reached.folder / "environment.json").functions["mine:exact"] in report


def test_an_own_loss_by_name_trains_as_the_same_function_from_python(tmp_path: Path, model: Path) -> None:
    rows, steps = tiny.topic_rows(), {"max_steps": 4}
    runs.run(tmp_path / "named", model, rows, train={"loss": "mine:loss", **steps}, functions=str(tmp_path))
    import_functions({"mine:loss": "train.loss"}, str(tmp_path))
    from mine import loss  # type: ignore[import-not-found]  # written by the fixture

    runs.run(tmp_path / "passed", model, rows, train=steps, options={"compute_loss": loss})
    named, passed = runs.final_weights(tmp_path / "named"), runs.final_weights(tmp_path / "passed")
    assert all(torch.equal(named[name], passed[name]) for name in passed)


def test_rows_are_changed_by_a_function_that_the_recipe_names(tmp_path: Path, model: Path) -> None:
    reached = runs.run(tmp_path, model, tiny.topic_rows(), until="data", data={"preprocess": "mine:shout"})
    assert "SUN" in reached.summary.previews[0].segments[0].text
    with pytest.raises(SetupError, match=r"rows.csv:\d+: your preprocess function returned None"):
        runs.run(
            tmp_path / "b",
            model,
            tiny.topic_rows(),
            until="data",
            data={"preprocess": "mine:lose"},
            functions=str(tmp_path),
        )


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ({"evaluate": {"metrics": ["mine:exct"]}}, r"evaluate.metrics: .*no function 'exct'; did you mean 'exact'\?"),
        ({"evaluate": {"metrics": ["mine:broken"]}}, r"broken.*KeyError: 'txt'.*mine.py:\d+.* on .*rows.csv:\d+"),
        ({"train": {"loss": "mime:loss"}}, r"train.loss: 'mime:loss': no module in .*'mime'.*did you mean 'mine'\?"),
    ],
)
def test_a_function_that_is_not_found_or_fails_is_refused_before_training(
    tmp_path: Path, model: Path, blocks: dict[str, Any], message: str
) -> None:
    with pytest.raises(SetupError, match=message):
        runs.run(tmp_path, model, tiny.topic_rows(), until="data", **blocks)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vector", r"train.loss: 'mine:vector' returned a tensor of shape .*expected a scalar"),
        ("infinite", "your loss returned (inf|nan) for the longest"),
    ],
)
def test_a_loss_that_is_no_finite_scalar_is_refused_before_step_1(
    tmp_path: Path, model: Path, name: str, message: str
) -> None:
    with pytest.raises(FulltuneError, match=message):
        runs.run(tmp_path, model, tiny.topic_rows(), train={"loss": f"mine:{name}"})
    assert not runs.events(tmp_path, "train")


def test_a_run_does_not_go_on_with_another_loss_and_says_that_a_metric_changed(tmp_path: Path, model: Path) -> None:
    blocks: dict[str, Any] = {"train": {"loss": "mine:loss"}, "evaluate": {"metrics": ["other:exact"]}}
    (tmp_path / "other.py").write_text(CODE, encoding="utf-8")
    heard = list[Any]()
    runs.run(tmp_path, model, tiny.topic_rows(), until="plan", **blocks)
    (tmp_path / "other.py").write_text(f"{CODE}\n", encoding="utf-8")
    runs.run(tmp_path, model, tiny.topic_rows(), until="plan", options={"listener": heard.append}, **blocks)
    assert any(isinstance(one, Message) and "other:exact: the file has changed" in one.text for one in heard)
    (tmp_path / "mine.py").write_text(f"{CODE}\n", encoding="utf-8")
    with pytest.raises(SetupError, match="files of your own functions"):
        runs.job(tmp_path, model, tiny.topic_rows(), **blocks)
    assert api.job(tmp_path / "recipe.yaml").folder != tmp_path / "run", "it starts a new run"


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ({"evaluate": {"metric": "mine:exact"}}, "say whether more is better; add greater_is_better: true or false"),
        ({"evaluate": {"greater_is_better": True}}, "evaluate.greater_is_better: has no effect"),
        ({"evaluate": {"metrics": ["accuracy"]}}, "metrics.0: expected module:function, such as .*found 'accuracy'"),
        ({"train": {"loss": "mine.py:loss"}}, "train.loss: expected module:function"),
        ({"train": {"loss": "mine:loss", "label_smoothing_factor": 0.1}}, "train.loss: .*smooth the labels in your"),
        ({"task": "token-classification", "evaluate": EVALUATE}, "own functions are not supported for token-class"),
        ({"evaluate": EVALUATE, "data": {"folds": 3}}, "own functions cannot score all folds together"),
    ],
)
def test_settings_that_contradict_an_own_function_are_refused(
    tmp_path: Path, blocks: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(tiny.write_recipe(tmp_path / "recipe.yaml", "model", tmp_path / "rows.csv", **blocks))


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("'high'", "returned 'high' for 2 rows"),
        ("None", "returned None for 2 rows"),
        ("[1.0, None]", "returned None for f:2"),
        ("[0.5, float('nan')]", "returned nan for f:2"),
        ("float('inf')", "returned inf for 2 rows"),
        ("[1.0]", "returned 1 values for 2 rows"),
        ("[[1.0], [1.0, 2.0]]", "not a finite number"),
    ],
)
def test_a_metric_that_returns_no_finite_numbers_is_refused_with_the_row(
    tmp_path: Path, returned: str, message: str
) -> None:
    (tmp_path / "returns.py").write_text(f"def it(answers, expected, rows):\n    return {returned}\n", encoding="utf-8")
    import_functions({"returns:it": "evaluate.metric"}, str(tmp_path))
    with pytest.raises(SetupError, match=f"'returns:it': .*{message}"):
        own_scores(["returns:it"], ["a", "b"], ["a", "c"], [{PLACE: "f:1"}, {PLACE: "f:2"}])


def test_a_number_stands_for_every_row_and_values_stay_at_their_rows(tmp_path: Path) -> None:
    code = "def one(a, e, rows):\n    return len(rows)\n\ndef each(a, e, rows):\n    return [a[0] == e[0], False]\n"
    (tmp_path / "counts.py").write_text(code, encoding="utf-8")
    import_functions({"counts:one": "evaluate.metric", "counts:each": "evaluate.metrics"}, str(tmp_path))
    values = own_scores(["counts:one", "counts:each"], ["a", "b"], ["a", "c"], [{PLACE: "1"}, {PLACE: "2"}])
    assert {name: one.tolist() for name, one in values.items()} == {"counts:one": [2, 2], "counts:each": [1, 0]}
    assert all(one.dtype == np.float64 for one in values.values())


def test_the_file_of_a_function_belongs_to_what_other_machines_need(tmp_path: Path, model: Path) -> None:
    blocks = {"train": {"loss": "mine:loss"}, "evaluate": {"metrics": ["json:loads"]}}
    recipe = load_recipe(tiny.write_recipe(tmp_path / "recipe.yaml", model, tmp_path / "rows.csv", **blocks))
    assert str(tmp_path / "mine.py") in local_paths(recipe)
    assert not any("json" in path for path in local_paths(recipe)), "an installed module"
