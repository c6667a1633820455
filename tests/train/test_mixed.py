"""A real run with other rows mixed in: it trains on the share that was asked for, shows it, and goes on after a break
as if there had been none."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from fulltune.errors import InterruptedRun
from fulltune.inference.store import MIXED, Rows
from tests import tiny
from tests.train import runs

ROWS = tiny.topic_rows(64)
# 52 train rows and 22 of 10 mixed ones: 74 an epoch, in global batches of 8 ten steps.
OTHERS = [{"text": f"the {word} is here", "label": "weather"} for word in "abcdefghij"]
WEIGHT, STEPS = 0.3, 20
TRAIN: dict[str, Any] = {"num_train_epochs": 2, "micro_batch_size": 4, "logging_steps": 1, "save_steps": 4}


def go(folder: Path, model: Path, *, listener: Any = lambda event: None, until: Any = "train", **train: Any) -> Any:
    others = tiny.write_csv(folder / "others.csv", OTHERS)
    data = {"train": [str(folder / "rows.csv"), {"path": str(others), "weight": WEIGHT}]}
    blocks = {"data": data, "train": {**TRAIN, **train}}
    return runs.run(folder, model, ROWS, until=until, options={"listener": listener}, **blocks)


@pytest.fixture(scope="module")
def unbroken(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("unbroken")
    return folder, go(folder, tiny_encoder, until="report")


def test_run_trains_on_the_share_that_was_asked_for(unbroken: tuple[Path, Any]) -> None:
    folder, reached = unbroken
    summary, plan, outcome = reached.summary, reached.plan, reached.outcome
    assert summary.rows_per_epoch == 74
    assert (plan.total_steps, outcome.steps) == (STEPS, STEPS)
    assert summary.mixed[0].rows_per_epoch / summary.rows_per_epoch == pytest.approx(WEIGHT, rel=0.01)
    # Two epochs take all task rows twice, and of the ten others 44: four rounds, and four of them once more.
    task, others = (Rows(folder / "run" / "data" / name)["length"] for name in ("train", MIXED))
    own, mixed = outcome.tokens_by_source
    assert own == 2 * task.sum()
    assert 4 * others.sum() < mixed < 5 * others.sum()


def test_report_says_what_was_mixed_in(unbroken: tuple[Path, Any]) -> None:
    folder, reached = unbroken
    text = " ".join((folder / "run" / "report.md").read_text(encoding="utf-8").split())
    own, mixed = reached.outcome.tokens_by_source
    assert "others.csv: weight 0.3, 22 of the 74 rows per epoch" in text
    assert "each row is read 4.4 times" in text
    assert f"{100 * mixed / (own + mixed):.1f}% of the trained tokens" in text
    runs.assert_report_is_whole(reached)
    card = (folder / "run" / "models" / "full" / "README.md").read_text(encoding="utf-8")
    assert "others.csv: weight 0.3" in card


def test_resume_in_the_middle_of_an_epoch_gives_the_unbroken_weights(
    unbroken: tuple[Path, Any], tiny_encoder: Path, tmp_path: Path
) -> None:
    step = STEPS // 2 + 3
    with pytest.raises(InterruptedRun):
        go(tmp_path, tiny_encoder, listener=runs.at_step(step, lambda: signal.raise_signal(signal.SIGTERM)))
    reached = unbroken[1]
    resumed = go(tmp_path, tiny_encoder)

    assert (resumed.outcome.attempt, resumed.outcome.steps) == (2, STEPS)
    assert resumed.outcome.tokens_by_source == reached.outcome.tokens_by_source
    one, other = runs.final_weights(tmp_path), runs.final_weights(unbroken[0])
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_conversations_with_raw_text_mixed_in_are_trained(tiny_decoder: Path, tmp_path: Path) -> None:
    """ChunkedLogits of raw text end without an end token, which the check of the answers must not take amiss."""
    texts = [{"text": f"text number {number} goes on " * 30} for number in range(10)]
    others = tiny.write_jsonl(tmp_path / "texts.jsonl", texts)
    reached = runs.run(
        tmp_path,
        tiny_decoder,
        tiny.chat_rows(60),
        task="causal-lm",
        data={"train": [str(tmp_path / "rows.jsonl"), {"path": str(others), "weight": 0.2}]},
        train={"num_train_epochs": 1},
    )
    assert reached.summary.mixed[0].kind == "raw text"
    checks = {check.name: check for check in reached.outcome.checks}
    assert checks["answers end with a trained end token"].result.startswith("48 of 48 rows")
    assert checks["rows with trained tokens"].result.startswith(f"{48 + reached.summary.mixed[0].counts.rows} of ")
    assert reached.outcome.status == "done"
