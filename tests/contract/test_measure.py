"""`fulltune plan --measure`: real steps, a table, and a plan that has the fastest settings."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fulltune.records.events import Listener
from fulltune.records.plan import Plan, TimeNeed
from fulltune.records.training import Measurements, Outcome
from fulltune.train.hooks import Hooks
from fulltune.train.request import Request
from fulltune.train.worker import main as worker
from tests import tiny
from tests.contract.command import fulltune
from tests.train import runs

pytestmark = pytest.mark.slow


@pytest.fixture
def recipe(tmp_path: Path, tiny_encoder: Path) -> Path:
    tiny.write_csv(tmp_path / "train.csv", tiny.topic_rows(48))
    train = {"precision": "auto", "max_steps": 4, "global_batch_size": 8, "activation_checkpointing": False}
    return tiny.write_recipe(tmp_path / "recipe.yaml", tiny_encoder, "train.csv", train=train)


def answered(seconds: Callable[[Plan], float | None]) -> Callable[[Request, Listener], Outcome]:
    """Instead of probes: this many seconds of training, or memory that runs out."""

    def probe(request: Request, listener: Listener) -> Outcome:
        found = seconds(request.plan)
        ended = {"trial": request.plan.trial, "attempt": request.attempt}
        if found is None:
            return Outcome(status="out_of_memory", reason="can't allocate 8 bytes", **ended)
        time = TimeNeed(
            train_seconds=found, eval_seconds=0, save_seconds=0, tokens=9, tokens_per_second=9, source="dry-run step"
        )
        return Outcome(
            status="done", reason="probed", forecast=time, dry_run_growth_bytes=2**20, dry_run_loss=0.5, **ended
        )

    return probe


@pytest.mark.long
def test_measured_levers_are_shown_and_the_plan_carries_the_reason(recipe: Path, tmp_path: Path) -> None:
    with runs.in_this_process():
        result = fulltune("plan", recipe, "--measure", "--run-folder", tmp_path / "run")

    assert result.code == 0, result.err
    for line in (
        "fp32, no speedups",
        "+ bf16 computations",
        "+ 8-bit AdamW",
        "micro batch",
        "tokens/s",
    ):
        assert line in result.out
    rows = Measurements.load(tmp_path / "run" / "plan" / "measured.json").rows
    ran = [row for row in rows if not row.problem]
    assert [row.kind for row in rows] == ["lever"] * 3 + ["micro batch"] * 2 + ["compile"]
    assert all(row.peak_memory_bytes > 0 and row.tokens_per_second > 0 and row.loss is not None for row in ran)
    # Another optimizer does not change the loss before the first update.
    assert rows[1].loss == rows[2].loss
    plan = Plan.load(tmp_path / "run" / "plan" / "full.json")
    (taken,) = (row for row in rows if row.is_best)
    assert {name: getattr(plan, name) for name in taken.changes} == taken.changes
    reasons = {setting.name: setting.reason for setting in plan.settings}
    assert reasons["train.precision"].startswith("measured: the fastest of ")
    assert reasons["train.activation_checkpointing"] == "from the recipe"
    # A probe leaves no weights, no checkpoint, no model and no attempt.
    assert not list((tmp_path / "run").rglob("*.safetensors"))
    assert not (tmp_path / "run" / "attempts").exists()
    assert not (tmp_path / "run" / "models").exists()


@pytest.mark.long
def test_run_that_follows_trains_with_what_was_measured(recipe: Path, tmp_path: Path) -> None:
    def seconds(plan: Plan) -> float:
        return 3.0 if plan.micro_batch_size == 4 else 5.0

    with runs.in_this_process(answered(seconds)):
        planned = json.loads(fulltune("plan", recipe, "--measure", "--json", "--run-folder", tmp_path / "run").out)
    with runs.in_this_process():
        result = fulltune("train", recipe, "--run-folder", tmp_path / "run")

    assert result.code == 0, result.err
    assert [row["name"] for row in planned["measured"]["rows"] if row["is_best"]] == ["micro batch 4"]
    request = json.loads((tmp_path / "run" / "attempts" / "full-seed42-01" / "request.json").read_text("utf-8"))
    chosen = ("micro_batch_size", "gradient_accumulation_steps")
    assert [request["plan"][name] for name in chosen] == [4, 2]


def test_nothing_that_fits_ends_with_exit_code_3_and_all_that_was_tried(recipe: Path, tmp_path: Path) -> None:
    with runs.in_this_process(answered(lambda plan: None)):
        result = fulltune("plan", recipe, "--measure", "--run-folder", tmp_path / "run")

    assert result.code == 3
    assert "measured: fp32, no speedups: memory ran out: can't allocate 8 bytes" in result.err
    assert "measured: micro batch 4: memory ran out: can't allocate 8 bytes" in result.err


@pytest.mark.parametrize(
    ("options", "named"),
    [(["--for", "1x A100-80GB"], "--for"), (["--rows", "9", "--tokens", "9"], "--rows and --tokens")],
)
def test_measuring_elsewhere_or_without_rows_is_refused(recipe: Path, options: list[str], named: str) -> None:
    result = fulltune("plan", recipe, "--measure", *options)

    assert result.code == 2
    assert result.problems == [f"--measure: runs real steps on this machine with the recipe's rows; remove {named}"]


def test_run_that_has_begun_to_train_is_not_measured(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert fulltune("plan", recipe, "--run-folder", run).code == 0
    (run / "attempts" / "full-seed42-01").mkdir(parents=True)

    result = fulltune("plan", recipe, "--measure", "--run-folder", run)

    assert result.code == 2
    assert f"{run}: training with these settings has begun; measure in a new run (--fresh)" in result.err


def test_probe_stops_after_the_dry_run(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert fulltune("plan", recipe, "--run-folder", run).code == 0
    request = Request(
        run_folder=str(run),
        recipe=json.loads((run / "recipe.json").read_text("utf-8"))["recipe"],
        plan=Plan.load(run / "plan" / "full.json"),
        attempt=1,
        checkpoint=None,
        parent_pid=None,
        probe=True,
    )
    request.folder.mkdir(parents=True)

    outcome = worker.run_attempt(request, Hooks())

    assert (outcome.status, outcome.reason, outcome.steps) == ("done", "probed", 0)
    assert outcome.tokens_per_second > 0
    assert outcome.dry_run_loss is not None
    assert outcome.checks[-1].name == "dry-run step"
    kept = {path.name for path in request.folder.iterdir()}
    assert {"metrics.jsonl", "outcome.json"} <= kept
    assert not list(run.rglob("*.safetensors"))
    assert not (run / "checkpoints").exists()
