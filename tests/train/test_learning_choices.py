"""Whole runs on choices and on pairs of sentences with a planted signal: they must beat what costs no training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import softmax
from transformers import AutoModelForMultipleChoice, AutoTokenizer

from fulltune import predict
from fulltune.errors import DataError
from fulltune.evaluate import LINEAR_PROBE
from fulltune.inference.store import read_original_rows
from tests import tiny
from tests.near import near
from tests.train import runs

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TRAIN: dict[str, Any] = {"num_train_epochs": 6, "eval_strategy": "steps", "eval_steps": 30}


def choice_rows(count: int) -> list[dict[str, Any]]:
    """One choice is a food, the others are places; neither its position nor its length tells which."""
    rows = []
    for number in range(count):
        drawn = np.random.default_rng(number)
        texts = [str(drawn.choice(tiny.PLACES)) + " and" * int(drawn.integers(0, 3)) for _ in range(3)]
        right = int(drawn.integers(0, 4))
        texts.insert(right, str(drawn.choice(tiny.FOOD)) + " and" * int(drawn.integers(0, 3)))
        rows.append({"question": f"what do we eat on day {number}?", "choices": texts, "label": right})
    return rows


@pytest.mark.long
def test_multiple_choice_run_beats_the_baselines(tmp_path: Path) -> None:
    model = tiny.save_model(tmp_path / "model", "bert", **NO_DROPOUT)
    rows = choice_rows(240)
    reached = runs.run(
        tmp_path,
        model,
        rows,
        until="report",
        task="multiple-choice",
        method={"learning_rate": 5e-3},
        train=TRAIN,
    )

    runs.assert_report_is_whole(reached)
    position, longest, frozen, as_head, trained = reached.scores
    assert (position.name, longest.name) == ("most frequent position", "longest choice")
    assert (frozen.name, as_head.name) == ("logistic regression (frozen embeddings)", LINEAR_PROBE)
    assert trained.metrics["accuracy"].value > 0.9
    assert max(position.metrics["accuracy"].value, longest.metrics["accuracy"].value) < 0.6
    assert trained.confusion is None
    assert trained.calibration is not None
    assert reached.summary.problem_type == "choice"
    assert reached.summary.labels == ()
    assert reached.summary.num_choices == 4

    folder = reached.folder / "models" / "full"
    assert json.loads((folder / "fulltune.json").read_text(encoding="utf-8"))["num_choices"] == 4
    held_out = list(read_original_rows(reached.folder / "data" / "test"))[:6]
    predictor = predict.load_predictor(folder)
    answers = predictor.predict(held_out)
    plain = AutoModelForMultipleChoice.from_pretrained(folder).eval()
    reader = AutoTokenizer.from_pretrained(folder)
    for row, answer in zip(held_out, answers, strict=True):
        batch = reader([row["question"]] * 4, row["choices"], padding=True, return_tensors="pt")
        with torch.no_grad():
            [logits] = plain(**{name: tensor[None] for name, tensor in batch.items()}).logits
        expected = softmax(logits.numpy() / predictor.notes["temperature"])
        np.testing.assert_allclose(answer["probabilities"], expected, atol=1e-5)
        assert answer["text"] == row["choices"][answer["index"]]
    without_label = {name: value for name, value in held_out[0].items() if name != "label"}
    assert predictor.predict([without_label]) == near(answers[:1])
    with pytest.raises(DataError, match="with the columns "):
        predict.row_from_text("what?", predictor.notes)
    with pytest.raises(DataError, match="row 1: 3 choices, expected 4"):
        predictor.predict([{**held_out[0], "choices": ["a", "b", "c"]}])


def test_rows_with_another_number_of_choices_are_left_out_and_listed(tiny_encoder: Path, tmp_path: Path) -> None:
    rows = choice_rows(60)
    rows[7]["choices"].append("one more")
    reached = runs.run(tmp_path, tiny_encoder, rows, until="data", task="multiple-choice")
    assert reached.summary.dropped == {"other number of choices": 1}
    for row in rows[:10]:
        row["choices"] = row["choices"][:2]
        row["label"] = 0
    with pytest.raises(DataError, match=r"10 of 60 rows cannot be used \(other number of choices: 10\)"):
        runs.run(tmp_path / "many", tiny_encoder, rows, until="data", task="multiple-choice")
