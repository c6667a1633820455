"""A run is compared with the model before step 1: what is decided, what it rests on, and whole runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fulltune import pipeline
from fulltune.errors import Diverged
from fulltune.recipe.tasks import TaskName
from fulltune.records.training import Outcome
from fulltune.stats.curves import check_got_worse, judge_got_worse
from fulltune.tasks import Target
from fulltune.train.worker.evaluation import _metric_for_comparison
from tests import tiny
from tests.train import faults, runs

ROWS = tiny.topic_rows(96)
TRAIN: dict[str, Any] = {"global_batch_size": 8, "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 5}
BLOCKS: dict[str, Any] = {
    "data": {"eval_fraction": 0.4},
    "evaluate": {"metric": "loss"},
    "method": {"learning_rate": 1e-3},
}


@pytest.mark.parametrize(
    ("behind", "losses", "untrained", "action"),
    [
        (2, [1.0] * 10 + [1.5] * 20, None, "stop"),
        (3, [1.0] * 30, None, "stop"),  # not fallen
        (1, [1.0] * 10 + [1.5] * 20, None, "go on"),  # once is no sign
        (2, [1.0] * 10 + [0.8] * 20, None, "go on"),  # over-fitted, if anything
        (2, [1.0] * 4 + [1.5] * 15, None, "go on"),  # hardly begun
        (2, [1.0] * 10 + [1.5] * 20, 2.0, "go on"),  # the first batch was easy
    ],
)
def test_run_that_makes_the_model_worse_stops_when_its_loss_has_not_fallen(
    behind: int, losses: list[float], untrained: float | None, action: str
) -> None:
    decision = check_got_worse(behind, "accuracy is 0.1 lower (standard error 0.02)", losses, 3e-4, untrained)
    assert decision.action == action
    if losses[-1:] == [1.5] and action == "stop":
        assert decision.reason == (
            "training makes the model worse: accuracy is 0.1 lower (standard error 0.02) than before step 1 in "
            "2 evaluations in a row, and the train loss has not fallen (1 at the beginning, 1.5 now). Usual cause: a "
            "learning rate that is too high (here 0.0003); try a tenth of it"
        )


@pytest.mark.parametrize(
    ("losses", "action"),
    [
        ([1.0] * 3 + [1.5] * 5, "stop"),
        ([1.0] * 5 + [0.5] * 5, "warn"),  # over-fitted, if anything
        ([1.0, 1.5, 1.5], "warn"),  # hardly a run
        ([], "warn"),
    ],
)
def test_run_whose_kept_model_is_worse_stops_when_its_loss_has_not_fallen(losses: list[float], action: str) -> None:
    found = judge_got_worse("accuracy is 0.1 lower (standard error 0.02)", losses, 3e-4)
    assert found.action == action
    assert found.reason.startswith("training made the model worse: accuracy is 0.1 lower (standard error 0.02) than be")


CLASSES = {"logits": np.eye(12), "labels": np.arange(12), "loss": np.ones(12)}
NUMBERS = {"logits": np.ones((5, 1)), "labels": np.zeros(5), "loss": np.ones(5)}
WRITTEN = {"nll": np.ones(5), "tokens": np.ones(5), "right": np.ones(5)}


@pytest.mark.parametrize(
    ("task", "problem", "metric", "kept", "judged"),
    [
        ("text-classification", "single_label", "accuracy", CLASSES, "accuracy"),
        ("text-classification", "single_label", "f1_macro", CLASSES, "loss"),  # 36 numbers of each row
        ("text-classification", "regression", "spearman", NUMBERS, "loss"),
        ("causal-lm", "prompt_completion", "perplexity", WRITTEN, "perplexity"),
    ],
)
def test_judged_by_the_metric_of_the_run_or_by_the_loss_where_rows_do_not_add_up(
    task: TaskName, problem: Any, metric: str, kept: dict[str, np.ndarray], judged: str
) -> None:
    labels = tuple("abcdefghijkl") if problem == "single_label" else ()
    found = _metric_for_comparison(task, Target(problem, labels, None), metric, kept)
    assert found.name == judged
    assert found.row_terms is not None
    assert len(found.row_terms(kept)) == len(next(iter(kept.values())))


def upwards(trainer: Any, inputs: dict[str, Any]) -> Callable[[], None]:
    """Each step goes the wrong way."""

    def act() -> None:
        for parameter in trainer.model.parameters():
            if parameter.grad is not None:
                parameter.grad.neg_()

    return act


def test_run_that_makes_the_model_worse_ends_with_exit_code_5(tiny_encoder: Path, tmp_path: Path) -> None:
    train = {**TRAIN, "max_steps": 30, "warmup_steps": 0}
    job = runs.job(tmp_path, tiny_encoder, ROWS, train=train, **BLOCKS)
    with (
        runs.in_this_process(),
        faults.planted(upwards, lambda step: True),
        pytest.raises(Diverged, match="training makes the model worse: loss is") as caught,
    ):
        pipeline.run(job, "train")

    assert caught.value.exit_code == 5
    assert [event["step"] for event in runs.events(tmp_path, "eval")] == [0, 5, 10, 15, 20], "of 20 losses"
    assert Outcome.load(next(tmp_path.glob("run/attempts/*/outcome.json"))).status == "diverged"


@pytest.mark.parametrize(("data", "on_start"), [({}, True), (BLOCKS["data"], False)], ids=["few rows", "no beginning"])
def test_without_enough_rows_or_the_evaluation_before_step_1_nothing_is_judged(
    data: dict[str, Any], on_start: bool, tiny_encoder: Path, tmp_path: Path
) -> None:
    train = {**TRAIN, "max_steps": 25, "warmup_steps": 0, "eval_on_start": on_start}
    with faults.planted(upwards, lambda step: True):
        runs.run(tmp_path, tiny_encoder, ROWS, train=train, **{**BLOCKS, "data": data})
    assert [event["step"] for event in runs.events(tmp_path, "eval")][-1] == 25
