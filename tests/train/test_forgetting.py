"""How far training moves a model away on generic text: measured in every run, from step 0 on."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fulltune.errors import DataError, InterruptedRun
from fulltune.forgetting.generic_text import drift_per_text, load_generic_texts, why_texts_are_weak
from fulltune.inference.run import GenericText
from tests import tiny
from tests.train import runs
from tests.train.test_resume import ask_to_stop

ROWS = tiny.topic_rows(64)
TRAIN: dict[str, Any] = {
    "global_batch_size": 8,
    "num_train_epochs": 3,
    "logging_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 5,
}


def measured(folder: Path, name: str = "drift") -> dict[int, float]:
    return {event["step"]: event["metrics"][name] for event in runs.events(folder, "eval") if name in event["metrics"]}


@pytest.fixture(scope="module")
def unbroken(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    runs.run(folder, tiny_encoder, ROWS, train=TRAIN, until="report")
    return folder


def test_drift_begins_at_nothing_and_grows(unbroken: Path) -> None:
    points, errors = measured(unbroken), measured(unbroken, "drift_error")
    assert list(points) == [0, 5, 10, 15, 20, 21]
    assert points[0] == pytest.approx(0.0, abs=1e-9)
    assert errors[0] == pytest.approx(0.0, abs=1e-9)
    assert points[21] > points[5] > 10 * abs(points[0])
    assert 0 < errors[21] < points[21]


def test_continued_run_measures_against_the_same_beginning(unbroken: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    stop = {"listener": runs.at_step(12, ask_to_stop)}
    with pytest.raises(InterruptedRun):
        runs.run(tmp_path, tiny_encoder, ROWS, train=TRAIN, options=stop)
    runs.run(tmp_path, tiny_encoder, ROWS, train=TRAIN)
    assert measured(tmp_path) == measured(unbroken)


@pytest.mark.parametrize("suffix", [".tsv", ".ndjson", ".conll", ".feather", ".arrow", ".JSONL"])
def test_table_is_no_plain_text(suffix: str, tmp_path: Path) -> None:
    table = tmp_path / f"texts{suffix}"
    table.write_text("a\tb\nc\td\n", encoding="utf-8")
    with pytest.raises(DataError, match="expected plain text"):
        load_generic_texts(str(table))


def test_drift_of_a_language_model_is_the_rise_of_its_loss(tiny_decoder: Path, tmp_path: Path) -> None:
    """By hand, from the model before and the finished one."""
    reached = runs.run(tmp_path, tiny_decoder, tiny.pair_rows(), task="causal-lm", train=TRAIN)
    assert reached.plan is not None
    assert reached.outcome is not None
    last = reached.outcome.steps
    finished = tmp_path / "run" / str(reached.outcome.model_folder)
    assert reached.outcome.best_step == last
    texts, _ = load_generic_texts(None, reached.plan.generic.texts_per_evaluation)
    assert len(texts) == 8
    before, after = (losses(folder, texts) for folder in (tiny_decoder, finished))
    assert measured(tmp_path)[last] == pytest.approx(float((after - before).mean()), rel=1e-3)
    assert measured(tmp_path, "drift_error")[last] == pytest.approx(
        float((after - before).std(ddof=1)) / math.sqrt(8), rel=1e-3
    )


def losses(folder: Path, texts: list[str]) -> np.ndarray:
    """Nats a token of each text, by the model's own loss."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for text in texts:
        ids = tokenizer(text, truncation=True, max_length=64, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            found.append(float(model(input_ids=ids, labels=ids).loss))
    return np.array(found)


def test_reading_generic_text_in_batches_gives_what_single_texts_give(tiny_encoder: Path) -> None:
    from transformers import AutoModel

    model, tokenizer = AutoModel.from_pretrained(tiny_encoder), AutoTokenizer.from_pretrained(tiny_encoder)
    model.train()
    texts, _ = load_generic_texts(None, 20)
    whole = GenericText.tokenise(texts, tokenizer, False, "fp32", 32).measure(model)
    assert model.training
    single = [GenericText.tokenise([text], tokenizer, False, "fp32", 32).measure(model)[0] for text in texts]
    assert np.abs(whole - np.stack(single)).max() < 1e-5
    assert np.abs(np.linalg.norm(whole, axis=1) - 1).max() < 1e-6
    assert drift_per_text(whole, whole).max() < 1e-6
    assert drift_per_text(whole, whole[::-1]).mean() > 1e-4


def test_nothing_is_measured_where_it_is_turned_off_or_cannot_be(tiny_encoder: Path, tmp_path: Path) -> None:
    off = runs.run(tmp_path / "off", tiny_encoder, ROWS, train=TRAIN, preserve={"drift": False})
    head = runs.run(tmp_path / "head", tiny_encoder, ROWS, train=TRAIN, method={"kind": "head"})
    for reached in (off, head):
        assert reached.plan is not None
        assert reached.plan.generic.texts_per_evaluation == 0
        assert measured(reached.folder.parent) == {}
    reasons = {one.name: one.reason for one in (head.plan.settings if head.plan else ())}
    assert reasons["preserve.drift"] == "only the head is trained"


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "cannot be read"), ("one line only\n", "contains 1 line; expected at least 2 distinct")],
)
def test_probe_that_holds_nothing_is_refused_before_training(
    content: str | None, said: str, tiny_encoder: Path, tmp_path: Path
) -> None:
    probe = tmp_path / "generic.txt"
    if content is not None:
        probe.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=rf"preserve\.probe: .*generic\.txt: {said}"):
        runs.run(tmp_path, tiny_encoder, ROWS, train=TRAIN, preserve={"probe": "generic.txt"})
    assert not (tmp_path / "run" / "attempts").exists()


@pytest.mark.parametrize(
    ("loss", "writes", "tokens", "part"),
    [
        (4.0, True, [5, 6], None),
        (6.5, True, [5, 6], "the pretrained model's loss is 6.50 nats per token (chance: 6.91)"),
        (6.5, False, [5, 6], None),
        (4.0, True, [1, 6], "50% of their tokens are unknown"),
    ],
)
def test_texts_that_say_little(loss: float, writes: bool, tokens: list[int], part: str | None) -> None:
    text = GenericText((tokens,), 0, writes, "fp32")
    reason = why_texts_are_weak(text, np.array([loss]), 1000, unknown_id=1)
    assert part in reason if part is not None and reason is not None else reason == part
