"""The user's own functions; class weights, label smoothing, rates by layer; keeping the best weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fulltune
from fulltune.errors import RecipeError
from fulltune.inference.run import Batching, run_rows
from fulltune.inference.store import Rows
from fulltune.models.base import Base
from fulltune.models.load import load_model
from fulltune.recipe.model import ModelBlock
from fulltune.records.training import Outcome
from fulltune.tasks import LossSettings, Target, text_classification
from fulltune.train.optim.groups import layer_depth, parameter_groups
from tests import plans, tiny
from tests.train import runs

ROWS = tiny.topic_rows(64)
TRAIN: dict[str, Any] = {"num_train_epochs": 1, "logging_steps": 1, "warmup_steps": 0}


def rare_rows() -> list[dict[str, str]]:
    """One row in four is about food."""
    return [row for number, row in enumerate(tiny.topic_rows(128)) if row["label"] == "weather" or number % 6 == 1]


def test_user_metrics_stand_beside_the_usual_ones_with_intervals(tiny_encoder: Path, tmp_path: Path) -> None:
    shapes: set[tuple[str, int]] = set()

    def metrics(predictions: Any, references: Any) -> dict[str, float]:
        shapes.add((type(predictions).__name__, predictions.ndim))
        return {"same": float(np.mean(predictions == references))}

    data = tiny.write_csv(tmp_path / "rows.csv", ROWS)
    recipe = tiny.write_recipe(tmp_path / "recipe.yaml", tiny_encoder, data, train=TRAIN)
    with runs.in_this_process():
        reached = fulltune.run(recipe, metrics=metrics, listener=lambda event: None)

    trained = reached.scores[-1]
    assert shapes == {("ndarray", 1)}
    assert trained.metrics["same"].value == trained.metrics["accuracy"].value
    assert trained.metrics["same"].low <= trained.metrics["same"].value <= trained.metrics["same"].high
    assert "same" in (reached.folder / "report.md").read_text(encoding="utf-8")


def test_compute_loss_that_repeats_ours_gives_the_same_weights_in_this_process(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    def compute_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    runs.run(tmp_path / "ours", tiny_encoder, ROWS, train=TRAIN)
    # Without the replacement of the child process: with a function of the user's it must stay in this one.
    fulltune.pipeline.run(
        runs.job(tmp_path / "own", tiny_encoder, ROWS, train=TRAIN, options={"compute_loss": compute_loss}), "train"
    )

    ours, own = runs.final_weights(tmp_path / "ours"), runs.final_weights(tmp_path / "own")
    assert all(torch.equal(ours[name], own[name]) for name in ours)


def test_balanced_class_weights_make_a_rare_class_be_found_more_often(tmp_path: Path) -> None:
    model = tiny.save_model(tmp_path / "model", "bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    found = {}
    for name, weights in (("plain", None), ("weighted", {"food": 50.0, "weather": 0.02})):
        train = {**TRAIN, "class_weights": weights}
        reached = runs.run(tmp_path / name, model, rare_rows(), until="evaluate", train=train)
        confusion = reached.scores[-1].confusion
        assert confusion is not None
        found[name] = sum(row[0] for row in confusion.counts)

    assert reached.summary.labels == ("food", "weather")
    assert found["weighted"] > found["plain"]


def test_wrong_class_weights_are_refused_before_training(tiny_encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no weight for weather"):
        runs.run(tmp_path, tiny_encoder, ROWS, train={"class_weights": {"food": 2.0}})

    assert not (tmp_path / "run" / "attempts").exists()


# ---- the loss --------------------------------------------------------------------------------------------------


def test_label_smoothing_is_part_of_the_training_loss_only(tiny_encoder: Path, tmp_path: Path) -> None:
    target = Target("single_label", {}, ("a", "b", "c"))
    logits, labels = torch.tensor([[9.0, 0.0, 0.0], [0.0, 9.0, 0.0]]), torch.tensor([0, 1])
    plain = text_classification.loss(logits, labels, target)
    smooth = text_classification.loss(logits, labels, target, LossSettings(0.1))
    assert float(plain) < 0.01
    assert float(smooth) == pytest.approx(float(plain) + 2 * 0.1 * 6.0, rel=1e-2)
    assert float(text_classification.reduce_logits(logits, labels, target)["loss"].sum()) == pytest.approx(float(plain))

    first = {}
    for name, factor in (("plain", 0.0), ("smooth", 0.5)):
        runs.run(tmp_path / name, tiny_encoder, ROWS, train={**TRAIN, "label_smoothing_factor": factor})
        first[name] = runs.final_weights(tmp_path / name)
    assert any(not torch.equal(first["plain"][key], first["smooth"][key]) for key in first["plain"])


# ---- rates by layer --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "gpt_neox"])
def test_layerwise_decay_lowers_the_rate_from_the_head_to_the_embeddings(kind: str, tmp_path: Path) -> None:
    folder = tiny.save_model(tmp_path / kind, kind)
    base = Base.from_block(ModelBlock(name=str(folder)))
    target = Target("single_label", {}, ("a", "b"))
    model = load_model(
        base,
        text_classification.config_changes(target, base.processor),
        head_is_new=True,
    )
    names = [name for name, _ in model.named_parameters()]
    depths = {name: layer_depth(name, 2) for name in names}

    assert set(depths.values()) == {0, 1, 2, 3}
    head = {name for name in names if not name.startswith(f"{model.base_model_prefix}.")}
    assert head
    assert {depths[name] for name in head} == {3}
    assert depths[max(names, key=lambda name: dict(model.named_parameters())[name].shape[0])] == 0
    groups = parameter_groups(names, set(names[::2]), plans.plan(layerwise_lr_decay=0.5), 0.01)
    assert sorted(name for group in groups for name in group["params"]) == sorted(names)
    assert groups[0]["lr"] == 1e-3
    assert {group["lr"] for group in groups} == {1e-3, 5e-4, 2.5e-4, 1.25e-4}
    assert {group["weight_decay"] for group in groups} == {0.0, 0.01}


# ---- keeping the best ------------------------------------------------------------------------------------------


def eval_metrics(folder: Path) -> dict[str, float]:
    """The saved model on the eval rows."""
    block = ModelBlock(name=str(folder / "run" / "models" / "full"))
    notes = json.loads((folder / "run" / "models" / "full" / "fulltune.json").read_text(encoding="utf-8"))
    target = Target(notes["problem_type"], notes["columns"], tuple(notes["labels"]))
    model = load_model(Base.from_block(block), {}, head_is_new=False)
    rows = Rows(folder / "run" / "data" / "eval")
    kept = run_rows(model, rows, text_classification, target, 0, Batching(8))
    return text_classification.metrics(kept, target)


def test_keep_best_saves_the_weights_of_the_best_evaluation(tiny_encoder: Path, tmp_path: Path) -> None:
    """So high a rate that the loss goes up and down."""
    train = {"max_steps": 16, "eval_strategy": "steps", "eval_steps": 2, "save_total_limit": 1, "warmup_steps": 0}
    outcome = runs.run(
        tmp_path,
        tiny_encoder,
        tiny.topic_rows(120),
        method={"learning_rate": 0.02},
        train=train,
        evaluate={"metric": "loss"},
    ).outcome

    assert outcome is not None
    seen = {event["step"]: event["metrics"]["loss"] for event in runs.events(tmp_path, "eval") if event["step"]}
    best = min(seen.values())
    assert len(set(seen.values())) > 2
    assert outcome.best_metric == best
    assert outcome.best_step == next(step for step, value in seen.items() if value == best) != outcome.steps
    assert eval_metrics(tmp_path)["loss"] == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize(
    ("metric", "values", "kept"),
    [
        ("accuracy", (0.5, 0.8, 0.4, 0.6), "last"),  # 8 eval rows: two standard errors of 0.8 are 0.27
        ("accuracy", (0.5, 0.8, 0.6, 0.5), "best"),
        ("loss", (0.5, 0.2, 0.4, 0.21), "best"),
    ],
)
def test_last_weights_are_kept_where_eval_rows_cannot_tell_them_from_the_best(
    metric: str,
    values: tuple[float, ...],
    kept: str,
    tiny_encoder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    coming = iter(values)
    monkeypatch.setattr(text_classification, "metrics", lambda kept, target: {metric: next(coming)})
    reached = runs.run(
        tmp_path,
        tiny_encoder,
        ROWS,
        train={"num_train_epochs": 4, "save_total_limit": 1, "eval_on_start": False},
        evaluate={"metric": metric},
        data={"eval_fraction": 0.125},
    )
    outcome = reached.outcome
    assert outcome is not None
    assert reached.summary.splits["eval"].rows == 8
    if kept == "best":
        assert (outcome.best_step, outcome.best_metric) == (outcome.steps // 2, values[1])
        assert outcome.weights_reason is None
    else:
        assert (outcome.best_step, outcome.best_metric) == (outcome.steps, values[-1])
        said = f"the best {metric} was {values[1]:.1%} at step {outcome.steps // 2}, but the difference is less than "
        assert outcome.weights_reason.startswith(said + "two standard errors (")
        assert outcome.weights_reason.endswith(" points with 8 eval rows)")


def test_early_stopping_follows_the_task_metric_and_keeps_the_best(
    tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss falls all the time: it must not matter."""
    coming = iter([0.9, 0.5, 0.7, 0.6, 0.7, *[0.9] * 20])  # before step 1 first, which is no evaluation of the run
    losses = iter(range(100, 0, -1))
    monkeypatch.setattr(
        text_classification, "metrics", lambda kept, target: {"accuracy": next(coming), "loss": float(next(losses))}
    )
    train = {"num_train_epochs": 9, "early_stopping_patience": 2, "save_total_limit": 1}
    outcome = runs.run(tmp_path, tiny_encoder, ROWS, train=train, evaluate={"metric": "accuracy"}).outcome

    assert outcome is not None
    assert (outcome.steps, outcome.best_step, outcome.best_metric) == (4 * 7, 2 * 7, 0.7)
    assert outcome.reason == "early stopping"
    path = tmp_path / "run" / "attempts" / "full-seed42-01"
    assert "did not improve" in (path / "journal.jsonl").read_text(encoding="utf-8")
    assert Outcome.load(path / "outcome.json") == outcome
