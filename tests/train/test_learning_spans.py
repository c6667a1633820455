"""A whole run that finds answers: the word after a cue, in contexts of which some need several windows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

from fulltune import predict
from fulltune.evaluate import LINEAR_PROBE
from fulltune.evaluate.spans import squad_scores
from fulltune.inference.store import Rows, read_original_rows
from tests import tiny
from tests.contract.command import fulltune
from tests.train import runs

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def cooking(count: int) -> list[dict[str, Any]]:
    """The answer is the dish after `cook`; other dishes stand elsewhere, and one row in six has no `cook`."""
    rows = []
    for number in range(count):
        words = [tiny.PLACES[(number * step + step) % 10] for step in (1, 3, 7)] + [tiny.FOOD[(number * 3 + 1) % 8]]
        if number % 8 == 3:
            words += [tiny.WEATHER[(number + step) % 8] for step in range(10)]
        dish = tiny.FOOD[number % 8]
        place = number % len(words)
        if number % 6 != 5:
            words[place:place] = ["cook", dish]
        context = " ".join([str(number), *words])
        answers = {"text": [], "answer_start": []} if number % 6 == 5 else _answer(context, f"cook {dish}", dish)
        rows.append({"question": "what do we cook?", "context": context, "answers": answers})
    return rows


def _answer(context: str, sentence: str, dish: str) -> dict[str, Any]:
    start = context.index(sentence) + len(sentence) - len(dish)
    return {"text": [dish], "answer_start": [start]}


@pytest.mark.long
def test_span_run_beats_the_baselines_and_merges_windows(tmp_path: Path) -> None:
    model = tiny.save_model(tmp_path / "model", "bert", **NO_DROPOUT)
    reached = runs.run(
        tmp_path,
        model,
        cooking(320),
        until="report",
        task="question-answering",
        data={"max_length": 48, "stride": 8},
        method={"learning_rate": 5e-3},
        train={"num_train_epochs": 12, "eval_strategy": "steps", "eval_steps": 80},
    )

    runs.assert_report_is_whole(reached)
    assert reached.plan is not None
    assert reached.plan.metric == "f1"
    sentence, none, as_head, trained = reached.scores
    assert [sentence.name, none.name] == ["sentence nearest to the question", "no answer to any question"]
    assert as_head.name == LINEAR_PROBE
    for metric in ("f1", "exact_match"):
        best = max(sentence.metrics[metric].value, none.metrics[metric].value)
        assert trained.metrics[metric].value > best + 0.3
    asked = {row["fulltune:place"]: row for row in read_original_rows(reached.folder / "data" / "test")}
    windows = Rows(reached.folder / "data" / "test")
    assert trained.rows == len(asked) < len(windows)

    rows = list(asked.values())
    answers = predict.load_predictor(reached.folder).predict(rows)
    scores = squad_scores([answer["answer"] for answer in answers], [row["answers"]["text"] for row in rows])
    assert float(scores["f1"].mean()) == pytest.approx(trained.metrics["f1"].value)
    for answer, row in zip(answers, rows, strict=True):
        assert 0 < answer["probability"] <= 1
        if answer["start"] is not None:
            assert row["context"][answer["start"] :].startswith(answer["answer"])
    assert any(answer["start"] is None for answer in answers)
    folder = reached.folder / "models" / "full"
    places = [row["fulltune:place"] for row in read_original_rows(reached.folder / "data" / "test")]
    short = [i for i, row in enumerate(rows) if places.count(row["fulltune:place"]) == 1 and answers[i]["answer"]]
    assert len(short) > 5
    assert plain_transformers(folder, [rows[i] for i in short]) == [answers[i]["answer"] for i in short]
    assert "AutoModelForQuestionAnswering" in (reached.folder / "report.md").read_text(encoding="utf-8")
    assert "pipeline_tag: question-answering" in (folder / "README.md").read_text(encoding="utf-8")

    one = {name: rows[short[0]][name] for name in ("question", "context")}
    asked = tiny.write_jsonl(tmp_path / "asked.jsonl", [one])
    printed = fulltune("predict", reached.folder, "--file", asked, "--json")
    assert printed.code == 0, printed.err
    assert json.loads(printed.out)["answer"] == answers[short[0]]["answer"]
    refused = fulltune("predict", reached.folder, "what do we cook?")
    assert refused.code == 4
    assert "context, question" in refused.err


def plain_transformers(folder: Path, rows: list[dict[str, Any]]) -> list[str]:
    """Answers that anyone gets from the folder: the most probable first and last token of the context."""
    model = AutoModelForQuestionAnswering.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for row in rows:
        batch = tokenizer(row["question"], row["context"], return_tensors="pt", return_offsets_mapping=True)
        offsets = batch.pop("offset_mapping")[0].tolist()
        inside = torch.tensor([part == 1 for part in batch.sequence_ids(0)])
        with torch.no_grad():
            outputs = model(**batch)
        logits = outputs.start_logits[0, :, None] + outputs.end_logits[0, None, :]
        logits = logits.masked_fill(~(inside[:, None] & inside[None, :]).triu(), -torch.inf)
        first, last = divmod(int(logits.argmax()), len(inside))
        found.append(row["context"][offsets[first][0] : offsets[last][1]].strip())
    return found
