"""The dry run does what a real step does, and leaves no trace."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from fulltune.errors import DoesNotFitError
from fulltune.plan import budget
from fulltune.records.plan import Plan
from fulltune.records.training import Check, Outcome
from fulltune.train.loop.inputs import AttemptInputs
from fulltune.train.loop.trainer import FullTrainer
from fulltune.train.worker import attempt as attempt_module
from fulltune.train.worker import evaluation
from fulltune.train.worker.dry_run import dry_run
from tests import tiny
from tests.train import runs

ROWS = tiny.topic_rows(48)
SHORT = {"max_steps": 1, "global_batch_size": 8}
ATTEMPT = Path("run", "attempts", "full-seed42-01")


def state_of(trainer: Any) -> dict[str, Any]:
    """All that training would notice."""
    model = trainer.model
    return {
        "weights": {name: value.clone() for name, value in model.named_parameters()},
        "buffers": {name: value.clone() for name, value in model.named_buffers()},
        "gradients": [name for name, value in model.named_parameters() if value.grad is not None],
        "hooks": [
            name for name, value in model.named_parameters() if getattr(value, "_post_accumulate_grad_hooks", None)
        ],
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].tolist(),
        "python": random.getstate(),
        "optimizer": trainer.optimizer,
        "forward": model.forward.__func__,
        "attributes": sorted(name for name in model.__dict__ if "accelerate" in name or "forward" in name),
        "tokens": trainer.tokens_seen,
        "step": trainer.state.global_step,
        "files": sorted(str(path) for path in Path(trainer.args.output_dir).rglob("*")),
    }


def same(before: Any, after: Any) -> bool:
    if isinstance(before, dict):
        return before.keys() == after.keys() and all(same(before[key], after[key]) for key in before)
    if isinstance(before, torch.Tensor):
        # As bits: 0.0 == -0.0, and NaN is not NaN.
        return torch.equal(*(value.detach().reshape(-1).view(torch.uint8) for value in (before, after)))
    return bool(before == after)


Watch = Callable[[Callable[[], list[Check]], Any, Plan], list[Check]]


def watched_by(watch: Watch) -> Any:
    """Inside, `watch` is called with the dry run, the trainer and the plan, and runs it."""

    def called(inputs: AttemptInputs, trainer: FullTrainer, evaluate: Any, answer: Any) -> list[Check]:
        return watch(lambda: dry_run(inputs, trainer, evaluate, answer), trainer, inputs.plan)

    return mock.patch.object(attempt_module, "dry_run", called)


@pytest.mark.parametrize(
    ("model", "train"),
    [
        ({}, {}),
        ({}, {"micro_batch_size": 2}),
        ({}, {"activation_checkpointing": True}),
        ({}, {"optim": "adafactor"}),
        ({"weights_dtype": "bf16"}, {"precision": "bf16", "optim": "adamw_8bit"}),
        ({"weights_dtype": "bf16"}, {"precision": "bf16", "bf16_rounding": "kahan"}),
    ],
    ids=str,
)
def test_dry_run_leaves_everything_as_it_was(
    model: dict[str, Any], train: dict[str, Any], tiny_encoder: Path, tmp_path: Path
) -> None:
    compared = []

    def watch(run: Callable[[], list[Check]], trainer: Any, plan: Plan) -> list[Check]:
        before = state_of(trainer)
        found = run()
        after = state_of(trainer)
        compared.extend(key for key in before if not same(before[key], after[key]))
        assert all(check.passed for check in found)
        return found

    block = {"name": str(tiny_encoder), **model}
    with watched_by(watch):
        runs.run(tmp_path, tiny_encoder, ROWS, model=block, train={**SHORT, **train})

    assert compared == []


def test_training_goes_on_as_if_there_had_been_no_dry_run(tiny_encoder: Path, tmp_path: Path) -> None:
    train = {"max_steps": 4, "logging_steps": 1, "precision": "bf16"}
    losses = []
    for name in ("with", "without"):
        without = mock.patch.object(attempt_module, "dry_run", return_value=[])
        with contextlib.nullcontext() if name == "with" else without:
            runs.run(tmp_path / name, tiny_encoder, ROWS, train=train)
        losses.append([event["loss"] for event in runs.events(tmp_path / name, "train")])

    assert len(losses[0]) == 4
    assert losses[0] == losses[1]


# ---- its peak is that of a real step ---------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["second pass", "evaluation"])
def test_memory_that_runs_out_does_so_before_step_1(where: str, tiny_encoder: Path, tmp_path: Path) -> None:
    failure = RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory")
    calls = [0]
    real = FullTrainer.compute_loss

    def compute_loss(self: Any, *given: Any, **keywords: Any) -> Any:
        calls[0] += 1
        if calls[0] == 2 and where == "second pass":
            raise failure
        return real(self, *given, **keywords)

    def reduced(*_: Any, **__: Any) -> Any:
        raise failure

    broken = mock.patch.object(evaluation, "run_rows", reduced if where == "evaluation" else evaluation.run_rows)
    one = {"micro_batch_size": 1, "activation_checkpointing": True, "optim": "adafactor", **SHORT}
    with mock.patch.object(FullTrainer, "compute_loss", compute_loss), broken, pytest.raises(DoesNotFitError):
        runs.run(tmp_path, tiny_encoder, ROWS, train=one, evaluate={"batch_size": 1})

    assert Outcome.load(tmp_path / ATTEMPT / "outcome.json").status == "out_of_memory"
    assert runs.events(tmp_path, "train") == []


# ---- what it finds ---------------------------------------------------------------------------------------------


def test_forecast_and_memory_are_in_the_outcome_and_among_the_events(tiny_encoder: Path, tmp_path: Path) -> None:
    train = {"max_steps": 5, "global_batch_size": 8, "micro_batch_size": 4, "save_steps": 2}
    reached = runs.run(tmp_path, tiny_encoder, ROWS, train=train)

    outcome = reached.outcome
    assert outcome is not None
    assert outcome.forecast is not None
    assert outcome.forecast.source == "dry-run step"
    assert outcome.forecast.tokens >= 5 * 8
    assert min(outcome.forecast.train_seconds, outcome.forecast.eval_seconds, outcome.forecast.save_seconds) > 0
    assert outcome.dry_run_loss is not None
    # 0 where the tests before left as much room in this process.
    assert 0 <= outcome.dry_run_growth_bytes <= outcome.memory_growth_bytes
    assert outcome.memory_growth_bytes < outcome.peak_memory_bytes
    # The initial weights, and at least one checkpoint with two moments: four times the model.
    weights = sum(value.nbytes for value in runs.final_weights(tmp_path).values())
    assert outcome.disk_bytes >= 4 * weights
    # After steps 2, 4 and 5 there are as many as were planned, and nothing that was not.
    assert reached.plan is not None
    assert reached.plan.disk is not None
    tensors = reached.plan.disk.checkpoint_bytes - budget.SMALL_FILES_BYTES
    assert reached.plan.disk.num_checkpoints * tensors + weights <= outcome.disk_bytes <= reached.plan.disk.total
    (event,) = runs.events(tmp_path, "forecast")
    assert event["time"]["train_seconds"] == pytest.approx(outcome.forecast.train_seconds)
    assert event["peak_memory_bytes"] == outcome.dry_run_growth_bytes
    # No trace of the file that was written to see how long saving takes.
    assert not list((tmp_path / "run").rglob("write-trial"))
