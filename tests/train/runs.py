"""Runs of tiny models inside this process: as the product does them, without the seconds that a new process costs."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from safetensors.torch import load_file

from fulltune import api, pipeline
from fulltune.footprint import trace
from fulltune.pipeline import Run
from fulltune.records.events import Event, Listener, StepLogged
from fulltune.records.training import Outcome
from fulltune.report.run.read import read_run
from fulltune.report.run.verdict import judge_scores
from fulltune.system.run_folder import RunResult
from fulltune.train.hooks import Hooks
from fulltune.train.parent import child
from fulltune.train.request import Request
from fulltune.train.worker import main as worker
from tests import tiny

Rows = Sequence[Mapping[str, Any]]


@contextlib.contextmanager
def in_this_process(attempt: Callable[[Request, Listener], Outcome] | None = None) -> Iterator[None]:
    """Replace the child process by a call of the worker, or by `attempt`."""

    def call(request: Request, listener: Listener) -> Outcome:
        return worker.run_attempt(request, Hooks(), listener)

    def without_start(request: Request, listener: Listener, start: object = None) -> Outcome:
        return (attempt or call)(request, listener)

    with mock.patch.object(child, "run_worker", without_start):
        yield


@contextlib.contextmanager
def without_tracing() -> Iterator[None]:
    """Plan by the rule of thumb: tracing takes two to ten seconds for each tiny model, method and task."""

    def untraced(*given: Any, **named: Any) -> Any:
        raise ValueError("left out by a test")

    with mock.patch.object(trace, "trace_footprint", untraced), mock.patch.object(trace, "_TRACED", {}):
        yield


def job(folder: Path, model: Path, rows: Rows, /, *, options: Mapping[str, Any] | None = None, **blocks: Any) -> Run:
    """A run of these rows in `folder/run`, called again the same one; `options` are those of `api.job`."""
    plain = all(isinstance(value, str) for value in rows[0].values())
    write, name = (tiny.write_csv, "rows.csv") if plain else (tiny.write_jsonl, "rows.jsonl")
    data = write(folder / name, rows)
    recipe = tiny.write_recipe(folder / "recipe.yaml", model, data, **blocks)
    return api.job(recipe, run_folder=folder / "run", **{"listener": lambda event: None, **(options or {})})


def run(
    folder: Path,
    model: Path,
    rows: Rows,
    /,
    *,
    until: pipeline.Until = "train",
    options: Mapping[str, Any] | None = None,
    **blocks: Any,
) -> RunResult:
    """Do such a run up to a stage."""
    with in_this_process():
        return pipeline.run(job(folder, model, rows, options=options, **blocks), until)


def final_weights(folder: Path) -> dict[str, Any]:
    """Name to tensor of the finished model of the run in `folder/run`."""
    return load_file(folder / "run" / "models" / "full" / "model.safetensors")


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Lines of all attempts' `metrics.jsonl`, oldest attempt first."""
    lines = []
    for path in sorted((folder / "run").glob("attempts/*/metrics.jsonl")):
        lines += [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line["kind"] == kind]


def assert_report_is_whole(reached: RunResult) -> None:
    """A good run's report lacks nothing, and its trained model has a difference to each row that needs no training."""
    assert read_run(reached.folder).missing == ()
    assert "What is missing" not in (reached.folder / "report.md").read_text(encoding="utf-8")
    *others, trained = reached.scores
    metric = trained.main_metric
    expected = {row.name: row.metrics[metric].value for row in others if metric in row.metrics}
    assert set(trained.differences) == {name for name, value in expected.items() if math.isfinite(value)}
    for name, found in trained.differences.items():
        assert found.value == pytest.approx(trained.metrics[metric].value - expected[name])
        assert found.low <= found.value <= found.high
    assert judge_scores(reached.scores).kind in ("better", "loss-only", "worse", "unresolved")


def at_step(step: int, action: Callable[[], None]) -> Listener:
    """A listener that acts once, when the line of this step is written; needs `logging_steps: 1`."""
    waiting = [action]

    def listener(event: Event) -> None:
        if isinstance(event, StepLogged) and event.step == step and waiting:
            waiting.pop()()

    return listener


def fail() -> None:
    """A fault that nothing expects."""
    raise RuntimeError("a fault, injected by a test")
