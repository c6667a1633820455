"""Regression: what is learned does not depend on the targets' units, and the finished model gives the user's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fulltune import predict
from fulltune.errors import GuardStop
from fulltune.system.run_folder import RunResult
from tests import tiny
from tests.cases import others_long
from tests.train import runs
from tests.train.test_learning import NO_DROPOUT, labelled

SIGNAL = (-1.5, -0.5, 0.25, 1.75)
SCALES = {"standard": (0.0, 1.0), "large": (1e6, 1e3), "small": (2e-4, 1e-5), "far": (1e8, 1e4)}
RUN: dict[str, Any] = {
    "data": {"label": "score", "problem_type": "regression"},
    "method": {"kind": "full", "learning_rate": 2e-3, "head_init": "random"},
    "train": {"num_train_epochs": 8, "eval_strategy": "steps", "eval_steps": 30, "group_by_length": False},
    "evaluate": {"metric": "r2", "bootstrap_samples": 100, "generate_rows": 0},
}


def rows_in(scale: tuple[float, float], count: int = 240) -> list[dict[str, Any]]:
    mean, spread = scale
    return labelled(count, lambda word: mean + spread * SIGNAL[word], "score")


def go(folder: Path, model: Path, scale: tuple[float, float], until: Any = "evaluate", /, **blocks: Any) -> RunResult:
    return runs.run(folder, model, rows_in(scale), until=until, **{**RUN, **blocks})


def about_head(folder: Path) -> str:
    return next(one["result"] for one in runs.events(folder, "checks")[0]["checks"] if one["name"] == "head")


def answers(folder: Path, rows: list[dict[str, Any]]) -> np.ndarray:
    return np.array(
        [one["value"] for one in predict.load_predictor(folder).predict([{"text": row["text"]} for row in rows])]
    )


def plain(folder: Path, rows: list[dict[str, Any]]) -> np.ndarray:
    """What anyone gets from a whole model's folder."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    batch = AutoTokenizer.from_pretrained(folder)([row["text"] for row in rows], padding=True, return_tensors="pt")
    with torch.no_grad():
        return model(**batch).logits[:, 0].numpy()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("encoder"), "bert", **NO_DROPOUT)


@pytest.fixture(scope="module")
def large(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """A run on targets around a million."""
    return go(tmp_path_factory.mktemp("large"), encoder, SCALES["large"])


# ---- units -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", others_long(("large", "far"), "large"))
def test_targets_of_any_size_are_learned_alike(name: str, encoder: Path, large: RunResult, tmp_path: Path) -> None:
    mean, spread = SCALES[name]
    reached = go(tmp_path, encoder, SCALES[name])

    found = {metric: one.value for metric, one in reached.scores[-1].metrics.items()}
    expected = {metric: one.value for metric, one in large.scores[-1].metrics.items()}
    assert found["r2"] > 0.9
    assert found["r2"] == pytest.approx(expected["r2"], abs=0.03)
    assert found["loss"] == pytest.approx(expected["loss"], abs=0.03)
    assert found["rmse"] / spread == pytest.approx(expected["rmse"] / SCALES["large"][1], abs=0.1)
    assert found["loss"] < 0.1
    assert reached.summary.scale == pytest.approx((mean, spread * np.std(SIGNAL)), rel=0.05, abs=0.2 * spread)

    rows, folder = rows_in(SCALES[name])[:12], reached.folder / "models" / "full"
    given = answers(folder, rows)
    np.testing.assert_allclose(given, plain(folder, rows), atol=1e-3 * spread, rtol=1e-6)
    np.testing.assert_allclose(given, [row["score"] for row in rows], atol=spread)


def test_losses_of_training_evaluation_and_test_rows_have_one_unit(large: RunResult, encoder: Path) -> None:
    folder = large.folder.parent
    losses = [event["loss"] for event in runs.events(folder, "train")]
    evaluated = [event["metrics"]["loss"] for event in runs.events(folder, "eval")]
    assert 0.3 < losses[0] < 4
    assert max(losses[-1], min(evaluated), large.scores[-1].metrics["loss"].value) < 0.2
    trained = large.scores[-1].metrics
    assert large.summary.scale is not None
    in_spreads = (trained["rmse"].value / large.summary.scale[1]) ** 2
    assert trained["loss"].value == pytest.approx(in_spreads, rel=0.02)


def test_head_without_a_bias_learns_their_size(tmp_path: Path) -> None:
    model = tiny.save_model(tmp_path / "model", "llama")
    reached = go(tmp_path, model, (3.0, 1.0))
    assert reached.summary.scale is not None
    size = np.hypot(*reached.summary.scale)
    assert f"it learns number / {size:.6g}; the saved model predicts the numbers themselves" in about_head(tmp_path)
    rows, folder = rows_in((3.0, 1.0))[:8], reached.folder / "models" / "full"
    np.testing.assert_allclose(answers(folder, rows), plain(folder, rows), atol=1e-4)
    assert reached.scores[-1].metrics["r2"].value > 0.8


# ---- going on ----------------------------------------------------------------------------------------------------


def test_finished_model_goes_on_with_what_it_knows(large: RunResult, tmp_path: Path) -> None:
    model = large.folder / "models" / "full"
    method = {"kind": "full", "learning_rate": 1e-9}
    reached = go(tmp_path, model, SCALES["large"], method=method, train={"max_steps": 1, "warmup_steps": 0})
    assert "kept from the checkpoint; it learns (number - 99" in about_head(tmp_path)
    assert runs.events(tmp_path, "train")[0]["loss"] < 0.2
    rows = rows_in(SCALES["large"])[:12]
    np.testing.assert_allclose(answers(reached.folder / "models" / "full", rows), answers(model, rows), atol=5)
    pretrained = next(row for row in reached.scores if row.kind == "untouched")
    assert pretrained.metrics["rmse"].value == pytest.approx(reached.scores[-1].metrics["rmse"].value, rel=0.05)


@pytest.mark.parametrize("method", [{"kind": "full", "learning_rate": 1e-3}, {"kind": "lora", "learning_rate": 1e-2}])
def test_run_interrupted_and_continued_equals_an_unbroken_one(
    method: dict[str, Any], large: RunResult, tmp_path: Path
) -> None:
    """From a model with a head, whose units are changed at each beginning."""
    model = large.folder / "models" / "full"
    train = {"max_steps": 8, "eval_strategy": "steps", "eval_steps": 3, "logging_steps": 1}
    blocks: dict[str, Any] = {"method": method, "train": train}
    whole = go(tmp_path / "whole", model, SCALES["far"], "train", **blocks)
    options = {"listener": runs.at_step(5, runs.fail)}
    with pytest.raises(Exception, match="a fault"):
        go(tmp_path / "broken", model, SCALES["far"], "train", options=options, **blocks)
    go(tmp_path / "broken", model, SCALES["far"], "train", **blocks)

    assert len(runs.events(tmp_path / "broken", "train")) < 8 + 5
    assert whole.plan is not None
    one, other = (weights(tmp_path / side / "run" / whole.plan.model_folder) for side in ("whole", "broken"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def weights(folder: Path) -> Mapping[str, torch.Tensor]:
    return load_file(next(folder.glob("*model.safetensors")))


# ---- where it cannot be ------------------------------------------------------------------------------------------


def test_own_loss_is_given_the_users_units(encoder: Path, tmp_path: Path) -> None:
    seen: list[torch.Tensor] = []

    def compute_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any) -> torch.Tensor:
        seen.append(labels)
        return torch.nn.functional.mse_loss(outputs.logits[:, 0], labels)

    options = {"compute_loss": compute_loss}
    go(tmp_path, encoder, (3.0, 1.0), "train", train={"max_steps": 2}, options=options)
    assert about_head(tmp_path).endswith("it learns the numbers unscaled: you supply the loss")
    assert 1 <= float(seen[-1].min()) < float(seen[-1].max()) <= 5


def test_bf16_weights_that_cannot_tell_the_targets_apart_are_refused(encoder: Path, tmp_path: Path) -> None:
    blocks: dict[str, Any] = {"model": {"weights_dtype": "bf16"}, "train": {"max_steps": 2, "precision": "bf16"}}
    with pytest.raises(
        GuardStop, match=r"values are 4.1e[+]03 apart, but .* deviation is 1.*; set model.weights_dtype: fp32"
    ):
        go(tmp_path / "far", encoder, SCALES["large"], "train", **blocks)
