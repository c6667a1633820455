"""A rare class: what chooses the checkpoint, what an epoch draws, and the threshold that is kept with the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from fulltune.errors import FulltuneError, RecipeError
from fulltune.predict import load_predictor
from fulltune.records.plan import Plan
from fulltune.system.run_folder import RunResult
from tests import tiny
from tests.train import runs

GUIDE = (Path(__file__).parents[2] / "docs" / "guides" / "training.md").read_text(encoding="utf-8")
SHOWN = yaml.safe_load(GUIDE.partition("## Rare classes")[2].split("```")[1].removeprefix("yaml"))
"""The settings that the guide shows."""
EVALUATE = {**SHOWN["evaluate"], "bootstrap_samples": 100}
TRAIN = {"max_steps": 24, "eval_strategy": "steps", "eval_steps": 6, "save_total_limit": 9, **SHOWN["train"]}
LABELS = {"weather": "ham", "food": "spam"}
OPTIONS: dict[str, Any] = {"data": {"eval_fraction": 0.3, "test_fraction": 0.3}, "evaluate": EVALUATE, "train": TRAIN}
LEARNING = {"method": {"kind": "full", "learning_rate": 3e-3}}


def rare_rows() -> list[dict[str, str]]:
    """One row in six is spam."""
    rows = [{**row, "label": LABELS[row["label"]]} for row in tiny.topic_rows(300)]
    return rows[::2] + rows[1::10]


@pytest.fixture(scope="module")
def reached(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    with runs.without_tracing():
        folder = tmp_path_factory.mktemp("rare")
        return runs.run(folder, tiny_encoder, rare_rows(), until="report", **OPTIONS, **LEARNING)


def test_f1_of_the_class_chooses_and_is_reported_with_the_others(reached: RunResult) -> None:
    assert reached.outcome
    assert reached.scores
    lines = runs.events(reached.folder.parent, "eval")
    by_step = {line["step"]: line["metrics"]["f1"] for line in lines if line["step"]}
    assert reached.outcome.best_metric == max(by_step.values()) == by_step[reached.outcome.best_step]
    trained, majority = reached.scores[-1], next(one for one in reached.scores if one.name == "majority class")
    names = {"f1", "precision", "recall", "roc_auc", "average_precision", "balanced_accuracy"}
    assert names <= trained.metrics.keys()
    assert all(one.low <= one.value <= one.high for one in trained.metrics.values())
    assert majority.metrics["roc_auc"].value == 0.5
    runs.assert_report_is_whole(reached)


def test_threshold_is_kept_with_the_model_and_decides(reached: RunResult) -> None:
    assert reached.scores
    assert reached.outcome
    folder, trained = reached.folder, reached.scores[-1]
    notes = json.loads((folder / str(reached.outcome.model_folder) / "fulltune.json").read_text(encoding="utf-8"))
    assert trained.threshold
    kept = notes["threshold"]
    assert (kept["label"], kept["value"]) == ("spam", trained.threshold.value.value)
    assert 0 <= kept["low"] <= kept["value"] <= kept["high"] <= 1
    rows = rare_rows()
    answers = load_predictor(folder).predict(rows)
    chances = np.array([row["probabilities"]["spam"] for row in answers])
    assert [row["label"] == "spam" for row in answers] == (chances >= kept["value"]).tolist()
    assert all(row["probability"] == row["probabilities"][row["label"]] for row in answers)
    # Test scores and the confusion are those of the same decision.
    assert trained.confusion
    (_, wrong), (missed, right) = trained.confusion.counts
    assert trained.metrics["f1"].value == pytest.approx(2 * right / (2 * right + missed + wrong))
    for page in (folder / "report.md", folder / "models" / "full" / "README.md"):
        text = page.read_text(encoding="utf-8")
        assert "'spam' is predicted from a calibrated probability of" in text
        assert "Plain transformers ignores this threshold" in text


def test_plan_says_how_often_the_rarest_class_is_drawn(reached: RunResult) -> None:
    counts = reached.summary.splits["train"].label_counts
    (setting,) = [
        one for one in Plan.load(reached.folder / "plan" / "full.json").settings if one.name.endswith(".sampling")
    ]
    assert setting.value == "balanced"
    assert f"'spam', the rarest class, is used {sum(counts.values()) / 2 / counts['spam']:.3g} times" in setting.reason


def test_balanced_run_that_is_interrupted_has_the_weights_of_one_that_is_not(
    tiny_encoder: Path, tmp_path: Path, reached: RunResult
) -> None:
    options = {"listener": runs.at_step(8, runs.fail)}
    changed = {**OPTIONS, "train": {**TRAIN, "logging_steps": 1}} | LEARNING
    with runs.without_tracing():
        with pytest.raises(FulltuneError, match="a fault"):
            runs.run(tmp_path, tiny_encoder, rare_rows(), options=options, **changed)
        runs.run(tmp_path, tiny_encoder, rare_rows(), **changed)
    expected = runs.final_weights(reached.folder.parent)
    assert all((value == expected[name]).all() for name, value in runs.final_weights(tmp_path).items())


@pytest.mark.parametrize("several", [{"methods": ["full", "lora"]}, {"data": {"folds": 3}}])
def test_threshold_of_several_models_is_refused(tiny_encoder: Path, tmp_path: Path, several: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=r"evaluate\.threshold: is not supported (in a comparison|with data\.folds)"):
        runs.job(tmp_path, tiny_encoder, rare_rows(), evaluate=EVALUATE, **several)
