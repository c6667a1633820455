"""The invariance table: 50 steps of the same global batches, however they are cut and whoever computes them.

Each cell is a run; its figure is the largest difference of a step's loss from the run that takes each global batch
whole. `pytest tests/invariant/test_table.py -rP` prints the figures.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest

from fulltune import pipeline
from fulltune.records.data import DataSummary
from fulltune.system.hardware import num_cores
from tests import tiny
from tests.cases import others_long
from tests.invariant.test_same_curve import CASES, losses
from tests.train import runs

pytestmark = pytest.mark.usefixtures("forked_ranks")
MOST = 1e-4
STEPS = 50
FAMILIES = {"encoder, classes": "single_label", "decoder, answers": "answers"}
# In neither family do the train rows fill the last global batch of an epoch.
TRAIN: dict[str, Any] = {
    **{"max_steps": STEPS, "global_batch_size": 8, "logging_steps": 1, "warmup_steps": 0},
    **{"eval_strategy": "steps", "eval_steps": 25},
}
WHOLE = {"micro_batch_size": 8}
CELLS: dict[str, dict[str, Any]] = {
    "4 x 2": {"micro_batch_size": 4},
    "2 processes, 2 x 2 each": {"micro_batch_size": 2, "num_processes": 2},
}
"""Rows per pass x passes, and how."""


def trained(folder: Path, family: str, train: dict[str, Any], method: str = "full") -> Path:
    """A run of this family in `folder`: in this process, unless there are two."""
    kind, changes, rows, given = CASES[FAMILIES[family]]
    rate = {"kind": method, "learning_rate": 3e-3 if method == "full" else 3e-2}
    blocks = {**given, "method": {**given.get("method", {}), **rate}}
    model = tiny.save_model(folder / "model", kind, **changes)
    train = {**TRAIN, **train}
    with contextlib.nullcontext() if "num_processes" in train else runs.in_this_process():
        pipeline.run(runs.job(folder, model, rows(), train=train, **blocks), "train")
    return folder


@pytest.fixture(scope="module", params=FAMILIES)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A family, and its run with whole global batches."""
    folder = trained(tmp_path_factory.mktemp("whole"), request.param, WHOLE)
    curve = losses(folder)
    assert len(set(curve)) == STEPS
    assert min(curve) < 0.9 * curve[0]  # it learns, so that equal curves mean something
    assert DataSummary.load(folder / "run" / "data" / "summary.json").splits["train"].rows % 8 > 1
    return request.param, folder


@pytest.mark.parametrize("cell", others_long(CELLS, "4 x 2"))
def test_losses_over_50_steps_are_those_of_whole_global_batches(
    whole: tuple[str, Path], cell: str, tmp_path: Path
) -> None:
    family, reference = whole
    if CELLS[cell].get("num_processes", 1) > num_cores():
        pytest.skip("needs a CPU core per process")

    folder = trained(tmp_path, family, CELLS[cell])

    differences = [abs(one - two) for one, two in zip(losses(reference), losses(folder), strict=True)]
    print(f"{family:18} {cell:30} {max(differences):.1e}")
    assert len(differences) == STEPS
    assert max(differences) <= MOST
    # The eval rows are shared out over processes; their scores are those of one process.
    scores = [[event["metrics"] for event in runs.events(where, "eval")] for where in (reference, folder)]
    assert scores[1] == [pytest.approx(metrics, abs=MOST) for metrics in scores[0]]
    left = sorted(path.name for path in (folder / "run").glob("attempts/*/*"))
    assert left == ["journal.jsonl", *(["log.txt"] if "num_processes" in CELLS[cell] else []), *_ALWAYS]
    assert list((folder / "run" / "checkpoints").glob("*/*")) == []


_ALWAYS = ["metrics.jsonl", "outcome.json", "phase", "request.json"]
