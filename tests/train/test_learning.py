"""Whole runs on tiny models with a planted signal: the trained model must beat what costs no training."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import expit, softmax
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from fulltune import predict
from fulltune.inference.store import read_original_rows
from fulltune.system.run_folder import RunResult
from tests import tiny
from tests.train import runs

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TRAIN: dict[str, Any] = {"num_train_epochs": 6, "eval_strategy": "steps", "eval_steps": 30}
EVALUATE: dict[str, Any] = {"bootstrap_samples": 100, "generate_rows": 0}


def labelled(count: int, label: Callable[[int], Any], name: str = "label") -> list[dict[str, Any]]:
    """Texts in which one of four words carries the signal, among words that carry none."""
    rows = []
    for number in range(count):
        filler = [tiny.PLACES[(number * step + step) % 10] for step in (1, 3, 7)]
        filler.insert(number % 4, tiny.WEATHER[number % 4])
        rows.append({"text": " ".join([*filler, str(number)]), name: label(number % 4)})
    return rows


def gain(reached: RunResult, metric: str) -> float:
    """How much the trained model is above the best baseline."""
    *baselines, trained = reached.scores
    assert trained.kind == "trained"
    assert baselines
    return trained.metrics[metric].value - max(scores.metrics[metric].value for scores in baselines)


def assert_files_are_whole(reached: RunResult) -> Path:
    folder = reached.folder / "models" / "full"
    written = {path.name for path in folder.iterdir()}
    assert written >= {"config.json", "model.safetensors", "tokenizer.json", "fulltune.json", "README.md"}
    assert "<html" in (reached.folder / "report.html").read_text(encoding="utf-8").lower()
    runs.assert_report_is_whole(reached)
    assert not (reached.folder / "checkpoints" / "full-seed42").exists()
    assert not list(reached.folder.rglob("*.part"))
    return folder


def assert_plain_transformers_agree(folder: Path, texts: list[str]) -> list[dict[str, Any]]:
    """Probabilities of `fulltune predict` are those that anyone gets from the folder, with its temperature."""
    answers = predict.load_predictor(folder).predict([{"text": text} for text in texts])
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    batch = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**batch).logits.numpy()
    notes = json.loads((folder / "fulltune.json").read_text(encoding="utf-8"))
    match notes["problem_type"]:
        case "multi_label":
            found, expected = [list(answer["probabilities"].values()) for answer in answers], expit(logits)
        case _:
            found = [list(answer["probabilities"].values()) for answer in answers]
            expected = softmax(logits / notes["temperature"], axis=-1)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    return answers


def test_single_label_run_beats_the_baselines(tmp_path: Path) -> None:
    """Classes go by pairs of words, so that the nearest centroid of random embeddings does not find them."""
    model = tiny.save_model(tmp_path / "model", "bert", **NO_DROPOUT)
    rows = labelled(240, lambda word: "odd" if word in (0, 3) else "even")
    reached = runs.run(
        tmp_path, model, rows, until="report", method={"learning_rate": 5e-3}, train=TRAIN, evaluate=EVALUATE
    )

    majority = reached.scores[0].metrics["accuracy"].value
    trained = reached.scores[-1]
    assert trained.metrics["accuracy"].value > majority + 0.3
    assert gain(reached, "accuracy") >= 0
    folder = assert_files_are_whole(reached)
    words = [row["text"] for row in read_original_rows(reached.folder / "data" / "test")]
    answers = assert_plain_transformers_agree(folder, words)
    assert trained.calibration is not None
    notes = json.loads((folder / "fulltune.json").read_text(encoding="utf-8"))
    assert notes["temperature"] == trained.calibration.temperature
    assert answers[0]["probability"] == max(answers[0]["probabilities"].values())
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["id2label"] == {"0": "even", "1": "odd"}


@pytest.mark.long
def test_multi_label_run_beats_the_baselines(tmp_path: Path) -> None:
    model = tiny.save_model(tmp_path / "model", "bert", **NO_DROPOUT)
    rows = labelled(240, lambda word: [["wet"], ["wet", "cold"], ["cold"], []][word], "labels")
    reached = runs.run(
        tmp_path,
        model,
        rows,
        until="report",
        method={"learning_rate": 5e-3},
        # Here the labels go with the length, so the plan does not group by it: batches would hold one kind each.
        train={**TRAIN, "num_train_epochs": 20},
        evaluate=EVALUATE,
    )

    assert reached.summary.problem_type == "multi_label"
    assert reached.plan is not None
    assert not reached.plan.group_by_length
    assert reached.scores[-1].metrics["f1_micro"].value > 0.9
    assert reached.scores[-1].metrics["f1_micro"].value > reached.scores[0].metrics["f1_micro"].value + 0.2
    folder = assert_files_are_whole(reached)
    answers = assert_plain_transformers_agree(folder, [row["text"] for row in rows[:8]])
    assert sum(set(answers[i]["labels"]) == set(rows[i]["labels"]) for i in range(8)) >= 7


def letter_rows(count: int) -> list[dict[str, str]]:
    letters = "abcd"
    return [
        {"prompt": f"{number} {letters[number % 4]}:", "completion": letters[number % 4] * 2} for number in range(count)
    ]


def said_by_the_card(folder: Path) -> str:
    """What the card's own code prints for a question."""
    card = (folder / "README.md").read_text(encoding="utf-8")
    code = card.split("```python\n")[1].split("```")[0]
    assert '"..."' in code
    with contextlib.chdir(folder.parent), contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code.replace('"..."', '"7 d:"').replace("max_new_tokens=128", "max_new_tokens=8"), {})
    return printed.getvalue()


def chat(row: dict[str, str]) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"]},
        ]
    }


@pytest.mark.long
def test_language_model_run_learns_to_answer_and_to_stop(tmp_path: Path) -> None:
    """The answer repeats a letter of the question; the end token of the turn must end generation."""
    pytest.importorskip("rouge_score", reason="the extra text-metrics is not installed")
    pytest.importorskip("sacrebleu", reason="the extra text-metrics is not installed")
    tokenizer = tiny.decoder_tokenizer(eos="<|endoftext|>")
    model = tiny.save_model(tmp_path / "model", "llama", tokenizer=tokenizer)
    reached = runs.run(
        tmp_path,
        model,
        [chat(row) for row in letter_rows(240)],
        until="report",
        task="causal-lm",
        method={"learning_rate": 1e-2},
        train={"num_train_epochs": 6, "eval_strategy": "steps", "eval_steps": 40},
        evaluate={"bootstrap_samples": 100, "generate_rows": 12, "max_new_tokens": 8},
    )

    before, trained = reached.scores
    assert before.kind == "untouched"
    assert trained.metrics["loss"].value < before.metrics["loss"].value / 3
    assert trained.metrics["exact_match"].value > before.metrics["exact_match"].value + 0.8
    folder = assert_files_are_whole(reached)
    question = {"messages": [{"role": "user", "content": "7 d:"}]}
    assert predict.load_predictor(reached.folder).predict([question], max_new_tokens=8) == [{"answer": "dd"}]
    plain = AutoModelForCausalLM.from_pretrained(folder)
    reader = AutoTokenizer.from_pretrained(folder)
    ends = plain.generation_config.eos_token_id
    assert reader.convert_tokens_to_ids("<|im_end|>") in (ends if isinstance(ends, list) else [ends])
    text = reader.apply_chat_template(question["messages"], tokenize=False, add_generation_prompt=True)
    assert said_by_the_card(folder) == "dd\n"
    batch = reader(text, return_tensors="pt", add_special_tokens=False)
    batch.pop("token_type_ids", None)
    made = plain.generate(**batch, max_new_tokens=20, do_sample=False)
    assert reader.decode(made[0, batch["input_ids"].shape[1] :]) == "dd<|im_end|>"
