"""fp16 on a CPU, which accelerate leaves to GPUs: its scaler, autocast and the guard beside them, in whole runs.

The scaler and autocast are torch's own for the CPU. What only a card can show: how fast it is, which of its kernels
overflow, and the fused optimizer, which is told of an overflow instead of not being called.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from transformers import Trainer

from fulltune import pipeline
from fulltune.errors import Diverged
from fulltune.plan import resolve
from fulltune.records.events import Event, Message, StepLogged, StepSkipped
from fulltune.train.loop.trainer import FullTrainer
from tests import tiny
from tests.train import faults, runs

SCALE = 2.0**10
TRAIN = {"max_steps": 12, "global_batch_size": 8, "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 12}


@pytest.fixture
def scalers(monkeypatch: pytest.MonkeyPatch) -> list[torch.amp.GradScaler]:
    """Every training computes in fp16; the scalers that are made."""
    made: list[torch.amp.GradScaler] = []
    begin = Accelerator.__init__

    def with_scaler(self: Any, *positional: Any, **keywords: Any) -> None:
        begin(self, *positional, **keywords)
        self.native_amp, self.scaler = True, torch.amp.GradScaler("cpu", init_scale=SCALE)
        made.append(self.scaler)

    monkeypatch.setattr(Accelerator, "__init__", with_scaler)
    monkeypatch.setattr(resolve, "choose_precision", lambda recipe, machine, device, reasons: "fp16")
    # As on a card: ours is for CPUs alone, and takes no notice of a scaler.
    monkeypatch.setattr(FullTrainer, "_clip_grad_norm", Trainer._clip_grad_norm)
    return made


def run(
    folder: Path, fault: faults.Fault = faults.nan_gradient, steps: Sequence[int] = (), **train: Any
) -> list[Event]:
    model = tiny.save_model(folder / "model", "bert")
    seen: list[Event] = []
    rows, options = tiny.topic_rows(120), {"listener": seen.append}
    job = runs.job(folder, model, rows, options=options, train={**TRAIN, **train})
    with runs.in_this_process(), faults.planted(fault, steps.__contains__):
        pipeline.run(job, "train")
    return seen


def logged(seen: list[Event]) -> list[tuple[float | None, float | None]]:
    return [(event.loss, event.grad_norm) for event in seen if isinstance(event, StepLogged)]


def test_losses_and_norms_are_those_of_fp32(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Of unscaled gradients: clipping and the guard see no scale."""
    whole = logged(run(tmp_path / "fp32"))
    scalers = request.getfixturevalue("scalers")
    half = logged(run(tmp_path / "fp16"))
    assert [scaler.get_scale() for scaler in scalers] == [SCALE]
    assert half != whole
    assert half == [pytest.approx(values, rel=0.02) for values in whole]


def test_update_that_the_scaler_leaves_out_is_no_fault(scalers: list[Any], tmp_path: Path) -> None:
    seen = run(tmp_path, faults.infinite_gradient, [4, 7])
    assert not [event for event in seen if isinstance(event, (StepSkipped, Message))]
    assert [number for number, (_, norm) in enumerate(logged(seen), start=1) if norm is None] == [4, 7]
    assert scalers[0].get_scale() == SCALE / 4


def test_step_that_the_guard_leaves_out_passes_the_scaler(scalers: list[Any], tmp_path: Path) -> None:
    """Its gradients are gone when the scaler looks for them."""
    seen = run(tmp_path, faults.infinite_logits, [5])
    assert [event.step for event in seen if isinstance(event, StepSkipped)] == [5]
    assert logged(seen)[-1][1] is not None


def test_gradients_that_no_scale_makes_finite_end_the_run(scalers: list[Any], tmp_path: Path) -> None:
    """From 2^10 down to 1/2 it is the scaler's matter, then the guard's."""
    with pytest.raises(Diverged, match="the gradient norm is nan, and the previous 2 steps were skipped too"):
        run(tmp_path, steps=range(2, 40), max_steps=40, max_rollbacks=0)
    assert [event["step"] for event in runs.events(tmp_path, "skipped")] == [13, 14]
    assert scalers[0].get_scale() < 1
