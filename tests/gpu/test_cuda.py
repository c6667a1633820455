"""Runs on a GPU; without one they skip themselves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fulltune import predict
from fulltune.records.events import Listener
from fulltune.records.plan import Plan
from tests import tiny
from tests.train import runs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_run_on_cuda_learns_and_its_model_answers_there(precision: str, kind: str, tmp_path: Path) -> None:
    model = tiny.save_model(tmp_path / "model", kind)
    reached = runs.run(
        tmp_path,
        model,
        tiny.topic_rows(160),
        until="report",
        method={"learning_rate": 5e-3},
        train={"device": "cuda", "precision": precision, "num_train_epochs": 6, "eval_strategy": "epoch"},
    )

    assert reached.outcome is not None
    assert reached.outcome.parameter_changes is not None
    assert (
        reached.outcome.parameter_changes.num_tensors_changed
        == reached.outcome.parameter_changes.num_tensors_with_gradient
    )
    assert reached.outcome.peak_memory_bytes > 0
    assert reached.scores[-1].metrics["accuracy"].value > 0.9
    predictor = predict.load_predictor(reached.folder)
    assert predictor.model.device.type == "cuda"
    answers = predictor.predict([{"text": "the soup in the town number 1"}])
    assert answers[0]["label"] == "food"
    assert sum(answers[0]["probabilities"].values()) == pytest.approx(1)


def test_auto_takes_the_gpu(tmp_path: Path) -> None:
    model = tiny.save_model(tmp_path / "model", "bert")
    runs.run(tmp_path, model, tiny.topic_rows(), until="plan", train={"device": "auto", "precision": "auto"})

    plan = Plan.load(tmp_path / "run" / "plan" / "full.json")
    assert plan.device == "cuda"
    assert plan.precision in ("bf16", "fp16")


def test_resume_on_cuda_continues_the_run(tmp_path: Path) -> None:
    from fulltune.errors import FulltuneError

    model = tiny.save_model(tmp_path / "model", "bert")
    train = {"device": "cuda", "precision": "bf16", "num_train_epochs": 2, "logging_steps": 1, "save_steps": 2}
    with pytest.raises(FulltuneError):
        runs.run(
            tmp_path,
            model,
            tiny.topic_rows(),
            train=train,
            options={"listener": runs.at_step(5, runs.fail)},
        )
    outcome = runs.run(tmp_path, model, tiny.topic_rows(), train=train).outcome

    assert outcome is not None
    assert outcome.attempt == 2
    steps = [event["step"] for event in runs.events(tmp_path, "train")]
    assert steps[:5] == [1, 2, 3, 4, 5]
    assert steps[5] == 5  # from the checkpoint of step 4


def test_out_of_memory_on_cuda_is_recognised_and_the_micro_batch_halved(tmp_path: Path) -> None:
    from fulltune.train.hooks import Hooks
    from fulltune.train.request import Request
    from fulltune.train.worker import main as worker

    model = tiny.save_model(tmp_path / "model", "bert")
    sizes: list[int] = []

    def attempt(request: Request, listener: Listener) -> worker.Outcome:
        sizes.append(request.plan.micro_batch_size)

        def exhaust() -> None:
            torch.empty(2**50, device="cuda")

        inject = runs.at_step(2, exhaust) if len(sizes) == 1 else lambda event: None
        return worker.run_attempt(request, Hooks(), lambda event: inject(event))

    job = runs.job(tmp_path, model, tiny.topic_rows(), train={"device": "cuda", "logging_steps": 1, "max_steps": 4})
    from fulltune import pipeline

    with runs.in_this_process(attempt):
        pipeline.run(job, "train")

    assert sizes == [8, 4]
