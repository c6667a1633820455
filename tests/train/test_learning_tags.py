"""A whole run that tags words: the type of a name depends on the word before it, which no lexicon knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForTokenClassification, AutoTokenizer

from fulltune import predict
from fulltune.evaluate import LINEAR_PROBE
from fulltune.inference.store import Rows, read_original_rows
from tests import tiny
from tests.contract.command import fulltune
from tests.train import runs

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
KINDS = {"from": "LOC", "ask": "PER", "no": None}
"""Word before a name to the name's type."""


def tagged(count: int) -> list[dict[str, Any]]:
    """Sentences with two names, of which some have two words; every name occurs with every type."""
    rows = []
    for number in range(count):
        tokens, tags = [tiny.PLACES[number % 10]], ["O"]
        for step in (1, 2):
            before = list(KINDS)[(number // step + step * number) % 3]
            name = [tiny.FOOD[(number * step + step) % 8], *(["rain"] if (number // 5) % 2 else [])]
            tokens += [before, *name]
            kind = KINDS[before]
            tags += ["O", *(f"{mark}-{kind}" if kind else "O" for mark in "BI"[: len(name)])]
        rows.append({"tokens": [*tokens, str(number)], "tags": [*tags, "O"]})
    return rows


def test_tagging_run_beats_the_baselines_and_is_scored_as_seqeval_does(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from seqeval.metrics import f1_score  # ZeRO's environment, which collects this file, lacks it

    model = tiny.save_model(tmp_path / "model", "bert", **NO_DROPOUT)
    reached = runs.run(
        tmp_path,
        model,
        tagged(240),
        until="report",
        task="token-classification",
        method={"learning_rate": 5e-3},
        train={"num_train_epochs": 14, "eval_strategy": "steps", "eval_steps": 60},
    )

    runs.assert_report_is_whole(reached)
    assert reached.summary.labels == ("O", "B-LOC", "B-PER", "I-LOC", "I-PER")
    assert reached.plan is not None
    assert reached.plan.metric == "f1"
    *baselines, trained = reached.scores
    assert [scores.name for scores in baselines] == [
        "every word O",
        "most frequent tag of each word",
        "logistic regression (frozen embeddings)",
        LINEAR_PROBE,
    ]
    assert baselines[0].metrics["f1"].value == 0
    assert trained.metrics["f1"].value > 0.9
    assert trained.metrics["f1"].value > max(scores.metrics["f1"].value for scores in baselines) + 0.3
    assert trained.metrics["f1"].low <= trained.metrics["f1"].value <= trained.metrics["f1"].high

    folder = reached.folder / "models" / "full"
    test = list(read_original_rows(reached.folder / "data" / "test"))
    answers = predict.load_predictor(reached.folder).predict([{"tokens": row["tokens"]} for row in test])
    ours = [answer["tags"] for answer in answers]
    expected = [row["tags"] for row in test]
    assert trained.metrics["f1"].value == pytest.approx(f1_score(expected, ours))
    assert plain_transformers(folder, [row["tokens"] for row in test[:5]]) == ours[:5]
    assert len(Rows(reached.folder / "data" / "test")) == len(test)

    predictor = predict.load_predictor(reached.folder)
    limit = predictor.notes["max_length"]
    assert limit == reached.summary.limit > reached.summary.max_length
    caplog.clear()
    assert len(predictor.predict([{"tokens": ["soup"] * 2}, {"tokens": ["soup"] * limit}])[1]["tags"]) == limit
    assert f"row 2, is longer than {limit} tokens: the remaining words are not read and get the tag O" in caplog.text

    printed = fulltune("predict", reached.folder, "ask soup rain, from bread", "--json")
    assert printed.code == 0, printed.err
    answer = json.loads(printed.out)
    assert answer["tokens"] == ["ask", "soup", "rain", ",", "from", "bread"]
    for entity in answer["entities"]:
        assert entity["text"] == " ".join(answer["tokens"][entity["start"] : entity["end"]])
        assert 0 < entity["probability"] <= 1
    assert {"soup rain", "bread"} & {entity["text"] for entity in answer["entities"]}


def plain_transformers(folder: Path, sentences: list[list[str]]) -> list[list[str]]:
    """Tags that anyone gets from the folder: the label at each word's first token."""
    model = AutoModelForTokenClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for words in sentences:
        batch = tokenizer(" ".join(words), return_tensors="pt", return_offsets_mapping=True)
        offsets = batch.pop("offset_mapping")[0].tolist()
        with torch.no_grad():
            labels = model(**batch).logits[0].argmax(dim=-1).tolist()
        # A byte-level tokenizer counts the space before a word as the word's first character.
        starts = [max(0, sum(len(word) + 1 for word in words[:number]) - 1) for number in range(len(words))]
        first = [next(i for i, (one, two) in enumerate(offsets) if one <= start < two) for start in starts]
        found.append([model.config.id2label[labels[i]] for i in first])
    return found
