"""Activations in the host's memory: on a CPU they are copied within it, so that only the numbers can be compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd.graph import save_on_cpu
from transformers import modeling_utils

from fulltune import pipeline
from fulltune.records.events import Listener
from fulltune.records.training import Outcome
from fulltune.train.hooks import Hooks
from fulltune.train.request import Request
from fulltune.train.worker import main as worker
from tests import tiny
from tests.train import runs

TRAIN = {
    "max_steps": 6,
    "activation_checkpointing": True,
    "extra": {"activation_checkpointing_kwargs": {"use_reentrant": False}},
}


def test_offloaded_activations_leave_every_number_as_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, rows = tiny.save_model(tmp_path / "model", "llama"), tiny.pair_rows(60)
    blocks: dict[str, Any] = {"task": "causal-lm", "data": {"prompt": "prompt", "completion": "completion"}}
    blocks["train"] = TRAIN
    runs.run(tmp_path / "kept", model, rows, **blocks)

    moved: list[int] = []

    class Counted(save_on_cpu):
        def __init__(self, **keywords: Any) -> None:
            moved.append(1)
            super().__init__(**keywords)

    monkeypatch.setattr(modeling_utils, "save_on_cpu", Counted)
    # transformers asks for pinned memory whatever the device, and torch takes the CPU for one that has some.
    monkeypatch.setattr(torch.cpu, "is_available", lambda: False)

    def attempt(request: Request, listener: Listener) -> Outcome:
        plan = request.plan.model_copy(update={"activation_offloading": True})
        return worker.run(request.model_copy(update={"plan": plan}), Hooks(), listener)

    with runs.in_this_process(attempt):
        pipeline.run(runs.job(tmp_path / "moved", model, rows, **blocks), "train")
    assert len(moved) >= 2 * (6 + 2), "of two blocks, in each step and in the dry run"
    one, other = (runs.final_weights(tmp_path / name) for name in ("kept", "moved"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
