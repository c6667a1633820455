"""`predict` where there is a card: on it, with the batch size and precision of the run's plan."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fulltune import predict
from fulltune.errors import DoesNotFitError
from fulltune.predict import Predictor, load_predictor
from tests import plans
from tests.contract.test_predict import made
from tests.gpu_paths.cards import Cards, h100, t4
from tests.gpu_paths.computed import formats
from tests.near import near

on_a_card = pytest.mark.stand_in(
    "cards by a patched torch.cuda, the model on the CPU", card="that the model reaches it; its kernels' numbers"
)
ROWS = [{"text": "the sun shines"}, {"text": "rain"}, {"text": "we cook soup, and the sun shines"}]


@pytest.fixture
def an_h100() -> Iterator[Cards]:
    with Cards([h100()]).plugged_in() as cards:
        yield cards


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Where models were moved to; they stay where they are."""
    devices = list[str]()
    monkeypatch.setattr(
        transformers.PreTrainedModel, "to", lambda model, device: devices.append(str(device)) or model, raising=True
    )
    return devices


def run_with_plan(folder: Path, kind: str = "single_label", plan: str = "full", **planned: Any) -> Path:
    (folder / "plan").mkdir(parents=True)
    plans.plan(**planned).save(folder / "plan" / f"{plan}.json")
    made(folder / "models" / "full", kind)
    return folder


def settings(predictor: Predictor) -> tuple[int, str]:
    return predictor.batch_size, predictor.precision


@on_a_card
@pytest.mark.parametrize("plan", ["full", "full-seed42"])
def test_model_of_a_run_answers_on_the_card_as_planned(
    plan: str, an_h100: Cards, moved: list[str], tmp_path: Path
) -> None:
    """A comparison has a plan for each seed."""
    run = run_with_plan(tmp_path, plan=plan, eval_batch_size=2, precision="bf16")
    predictor = load_predictor(run)
    assert (moved, settings(predictor)) == (["cuda"], (2, "bf16"))
    with formats() as found:
        answers = predictor.predict(ROWS)
    assert found["inference/run.py: reduce_batch"] == {torch.bfloat16}
    assert len(answers) == len(ROWS)


@on_a_card
@pytest.mark.parametrize(("planned", "precision"), [("bf16", "fp32"), ("fp16", "fp16"), ("fp32", "fp32")])
def test_card_that_only_emulates_bf16_computes_in_fp32(
    planned: str, precision: str, moved: list[str], tmp_path: Path
) -> None:
    with Cards([t4()]).plugged_in():
        predictor = load_predictor(run_with_plan(tmp_path, precision=planned))
    assert (moved, settings(predictor)) == (["cuda"], (16, precision))


@on_a_card
@pytest.mark.parametrize(("kind", "size"), [("single_label", 32), ("prompt_completion", 8)])
def test_model_folder_without_a_run_has_usual_batches(
    kind: str, size: int, an_h100: Cards, moved: list[str], tmp_path: Path
) -> None:
    predictor = load_predictor(made(tmp_path / "model", kind))
    assert (moved, settings(predictor)) == (["cuda"], (size, "fp32"))


@pytest.mark.stand_in("no card", card="-")
@pytest.mark.parametrize(("kind", "size"), [("single_label", 32), ("prompt_completion", 8)])
def test_without_a_card_the_plan_changes_nothing(kind: str, size: int, moved: list[str], tmp_path: Path) -> None:
    run = run_with_plan(tmp_path, kind, eval_batch_size=2, precision="bf16")
    predictor = load_predictor(run)
    assert (moved, settings(predictor)) == (["cpu"], (size, "fp32"))


@pytest.mark.stand_in("torch.OutOfMemoryError raised by hand", card="that the driver raises it")
@pytest.mark.parametrize("kind", ["single_label", "prompt_completion"])
def test_batches_that_do_not_fit_are_halved_once_for_all_rows(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    predictor = load_predictor(made(tmp_path / "model", kind))
    name = "generate_answers" if kind == "prompt_completion" else "run_rows"
    rows = [{"text": "rain", "prompt": "rain"}] * 130  # three windows of prompts
    plain, run = predictor.predict(rows, 1), getattr(predict, name)
    most = 2

    def on_a_small_card(*given: Any) -> Any:
        if given[-1].batch_size > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return run(*given)

    monkeypatch.setattr(predict, name, on_a_small_card)
    predictor.batch_size = 8
    with caplog.at_level(logging.WARNING):
        assert predictor.predict(rows, 1) == near(plain)
    assert predictor.batch_size == 2
    assert [record.message.split(" of ")[-1] for record in caplog.records] == ["4 rows", "2 rows"]
    most = 0
    with pytest.raises(DoesNotFitError, match="CUDA_VISIBLE_DEVICES= to use the CPU"):
        predictor.predict(rows, 1)


@on_a_card
def test_model_that_does_not_fit_says_how_to_use_the_cpu(
    an_h100: Cards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(model: Any, device: str) -> Any:
        an_h100[0].take(2 * an_h100[0].total_memory)

    monkeypatch.setattr(transformers.PreTrainedModel, "to", full)
    with pytest.raises(DoesNotFitError, match="CUDA_VISIBLE_DEVICES= to use the CPU"):
        load_predictor(made(tmp_path / "model", "single_label"))
