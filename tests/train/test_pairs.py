"""Runs on pairs of texts that are read apart: what they save, how they go on, and what they never fall below."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fulltune import predict
from fulltune.errors import InterruptedRun
from fulltune.evaluate import LINEAR_PROBE
from tests import tiny
from tests.cases import others_long
from tests.train import runs
from tests.train.test_resume import ask_to_stop, assert_same

APART: dict[str, Any] = {"model": {"pairs": "apart"}}
NUMBERS: dict[str, Any] = {**APART, "data": {"problem_type": "regression", "test_fraction": 0.3}}


def pair_rows(count: int, numbers: bool = False) -> list[dict[str, Any]]:
    """Two texts of eight words, and how many of them are the same."""
    rows = []
    words = (*tiny.PLACES, *tiny.FOOD)
    for number in range(count):
        drawn = np.random.default_rng(number)
        first, second = drawn.choice(words, 8), drawn.choice(words, 8)
        same = number % 9
        second[:same] = first[:same]
        label: Any = same / 8 + drawn.normal(0, 0.05) if numbers else ("alike" if same > 4 else "other")
        rows.append({"text": " ".join(first), "text_pair": " ".join(second), "label": label})
    return rows


@pytest.mark.long
def test_a_run_saves_an_encoder_that_predicts_and_that_sentence_transformers_reads(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    from sentence_transformers import SentenceTransformer

    rows = pair_rows(200)
    reached = runs.run(tmp_path, tiny_encoder, rows, until="report", **APART, train={"num_train_epochs": 1})
    runs.assert_report_is_whole(reached)
    majority, frozen, as_head, trained = reached.scores
    assert frozen.name == "logistic regression (frozen embeddings, each text encoded separately)"
    assert as_head.name == LINEAR_PROBE
    assert trained.metrics["accuracy"].value > majority.metrics["accuracy"].value + 0.1
    assert reached.summary.task == "text-pairs"

    folder = tmp_path / "run" / "models" / "full"
    rows[0] |= {"text": " ".join([rows[0]["text"]] * 9)}  # longer than the limit
    answers = predict.load_predictor(tmp_path / "run").predict(rows[:9])
    weights = load_file(folder / "model.safetensors")
    encoder = SentenceTransformer(str(folder), device="cpu")
    first, second = (
        encoder.encode([row[name] for row in rows[:9]], convert_to_tensor=True, normalize_embeddings=True)
        for name in ("text", "text_pair")
    )
    features = torch.cat([first, second, (first - second).abs(), first * second], dim=1)
    logits = features @ weights["classifier.weight"].T + weights["classifier.bias"]
    labels = np.array(reached.summary.labels)[logits.argmax(dim=1).numpy()]
    assert [answer["label"] for answer in answers] == labels.tolist()
    # The card says how to do the same in plain transformers.
    code = (folder / "README.md").read_text(encoding="utf-8").partition("```python\n")[2].partition("```")[0]
    code = code.replace('folder = "full"', f"folder = {str(folder)!r}")
    for name in ("text", "text_pair"):
        shown = '["a text"]' if name == "text" else '["another text"]'
        code = code.replace(shown, repr([row[name] for row in rows[:9]]))
    values: dict[str, Any] = {}
    exec(code, values)  # the card's own code
    torch.testing.assert_close(values["logits"], logits, rtol=1e-4, atol=1e-4)


def test_training_that_only_harms_keeps_its_start(tiny_encoder: Path, tmp_path: Path) -> None:
    """At a rate that destroys the model; with few eval rows no guard can tell."""
    reached = runs.run(
        tmp_path,
        tiny_encoder,
        pair_rows(150, numbers=True),
        until="evaluate",
        **NUMBERS,
        method={"learning_rate": 0.5},
        train={"max_steps": 6, "warmup_steps": 0, "eval_strategy": "steps", "eval_steps": 3},
    )
    assert reached.outcome is not None
    assert reached.outcome.best_step == 0
    assert reached.outcome.weights_reason == "the loss on the eval rows was lowest"
    before, after = load_file(tiny_encoder / "model.safetensors"), runs.final_weights(tmp_path)
    kept = [name for name in after if name.startswith("bert.")]
    assert kept
    assert all(torch.equal(after[name], before[name.removeprefix("bert.")]) for name in kept)
    [probed] = [scores for scores in reached.scores if scores.name == LINEAR_PROBE]
    for name, value in reached.scores[-1].metrics.items():
        assert value.value == pytest.approx(probed.metrics[name].value, rel=1e-3)


@pytest.mark.parametrize("kind", others_long(["full", "lora"], "full"))
def test_a_run_that_was_stopped_goes_on_to_the_same_weights(kind: str, tiny_encoder: Path, tmp_path: Path) -> None:
    blocks: dict[str, Any] = {
        **NUMBERS,
        "method": {"kind": kind, "learning_rate": 1e-3},
        "train": {"max_steps": 8, "logging_steps": 1, "save_steps": 2, "global_batch_size": 8, "micro_batch_size": 4},
    }
    rows, name = pair_rows(80, numbers=True), "adapter_model" if kind == "lora" else "model"
    runs.run(tmp_path / "whole", tiny_encoder, rows, **blocks)
    options = {"listener": runs.at_step(5, ask_to_stop)}
    with pytest.raises(InterruptedRun):
        runs.run(tmp_path / "two", tiny_encoder, rows, options=options, **blocks)
    reached = runs.run(tmp_path / "two", tiny_encoder, rows, **blocks)
    assert reached.outcome is not None
    assert reached.outcome.attempt == 2
    files = [tmp_path / part / f"run/models/{kind}/{name}.safetensors" for part in ("whole", "two")]
    assert_same(*map(load_file, files))


def test_trained_loras_predict_and_are_merged_to_an_encoder(tiny_encoder: Path, tmp_path: Path) -> None:
    from fulltune.methods.folder import merge_into_pretrained

    rows = pair_rows(80)
    runs.run(tmp_path, tiny_encoder, rows, until="evaluate", **APART, method={"kind": "lora"}, train={"max_steps": 4})
    folder = tmp_path / "run" / "models" / "lora"
    answers = predict.load_predictor(tmp_path / "run").predict(rows[:9])
    merge_into_pretrained(folder, tmp_path / "merged")
    assert (tmp_path / "merged" / "1_Pooling" / "config.json").exists()
    again = predict.load_predictor(tmp_path / "merged").predict(rows[:9])
    for one, other in zip(answers, again, strict=True):
        assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-4)
