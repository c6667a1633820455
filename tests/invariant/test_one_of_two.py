"""What happens to one of two processes happens to the run: memory that runs out in one has both go on with less, and
both begin again where one is killed."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from fulltune import pipeline
from fulltune.records.events import JournalEntry
from fulltune.records.training import Outcome
from fulltune.system.hardware import num_cores
from fulltune.train.journal import NEXT_ATTEMPT_EVENT
from tests import tiny
from tests.forked_ranks import Forks
from tests.invariant import placed
from tests.invariant.placed import FAMILIES, Place
from tests.invariant.test_same_curve import NO_DROPOUT, RANDOM, losses
from tests.train import runs

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(num_cores() < 2, reason="needs a CPU core per process"),
]
TRAIN: dict[str, Any] = {
    **{"max_steps": 12, "global_batch_size": 8, "micro_batch_size": 4, "logging_steps": 1, "warmup_steps": 0},
    "save_steps": 2,
}
FAULT = '''
"""In process 1, once: memory runs out in the third step of the training."""
import importlib.abc, importlib.util, os, sys
from pathlib import Path

DONE, STEPS = Path({mark!r}), []


def out_of_memory(theirs):
    def training_step(self, *given, **named):
        if self.state.global_step == 3 and not DONE.exists():
            import torch

            DONE.touch()
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return theirs(self, *given, **named)

    return training_step


class Loader(importlib.abc.Loader):
    def __init__(self, inner):
        self.inner = inner

    def create_module(self, spec):
        return self.inner.create_module(spec)

    def exec_module(self, module):
        self.inner.exec_module(module)
        module.Guarded.training_step = out_of_memory(module.Guarded.training_step)


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "fulltune.train.loop.guarded_step":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        spec.loader = Loader(spec.loader)
        return spec


if os.environ.get("RANK") == "1":
    sys.meta_path.insert(0, Finder())
'''


def journal(folder: Path) -> list[JournalEntry]:
    lines = [line for one in (folder / "run").glob("attempts/*/journal.jsonl") for line in one.read_text().splitlines()]
    return [JournalEntry.model_validate_json(line) for line in lines]


def test_memory_that_runs_out_in_one_process_halves_the_micro_batch_of_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows = tiny.save_model(tmp_path / "model", "bert", **NO_DROPOUT), tiny.topic_rows(50)
    blocks: dict[str, Any] = {"method": {"kind": "full", **RANDOM}}
    runs.run(tmp_path / "whole", model, rows, train=TRAIN, **blocks)
    broken, fault = tmp_path / "broken", tmp_path / "fault"
    fault.mkdir()
    (fault / "sitecustomize.py").write_text(FAULT.format(mark=str(tmp_path / "done")), encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(fault), prepend=os.pathsep)

    train = {**TRAIN, "num_processes": 2, "placement": "fsdp2"}
    pipeline.run(runs.job(broken, model, rows, train=train, **blocks), "train")

    assert (tmp_path / "done").exists()
    outcomes = [Outcome.load(one) for one in sorted((broken / "run").glob("attempts/*/outcome.json"))]
    assert [(one.status, one.phase) for one in outcomes] == [("out_of_memory", "step"), ("done", None)]
    plan = json.loads((broken / "run" / "plan" / "full.json").read_text(encoding="utf-8"))
    found = [plan[name] for name in ("micro_batch_size", "gradient_accumulation_steps", "num_processes", "placement")]
    assert found == [2, 2, 2, "fsdp2"]
    reasons = [event.detail for event in journal(broken) if event.event == NEXT_ATTEMPT_EVENT]
    assert len(reasons) == 1
    assert "memory ran out in a training step" in reasons[0]
    curve = {event["step"]: event["loss"] for event in runs.events(broken, "train")}
    assert list(curve.values()) == pytest.approx(losses(tmp_path / "whole"), abs=1e-5)


def test_process_that_is_killed_before_and_after_a_checkpoint_changes_nothing(forks: Forks, tmp_path: Path) -> None:
    """With dropout: the states of the random numbers are put back too. Nothing is taken for memory that ran out.

    Only the run that is killed is started by torchrun: forked ranks compute the same.
    """
    steps: dict[str, Any] = {"max_steps": 16, "eval_steps": 8, "dropout": True}
    family, place = FAMILIES["encoder"], Place("fsdp2:2")
    with forks.instead_of_torchrun():
        placed.train(tmp_path / "unbroken", family, place, **steps)

    placed.kill_one(tmp_path / "killed", family, place, random.Random(0), 5, 13, **steps)

    found = placed.read(tmp_path / "killed")
    assert found.attempts == 3
    assert placed.differences(placed.read(tmp_path / "unbroken"), found).none
