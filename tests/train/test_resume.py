"""A run that was interrupted, broken or killed at any moment ends with the weights of an unbroken one, bit by bit."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from fulltune import files, pipeline
from fulltune.errors import FulltuneError, InterruptedRun
from fulltune.records.events import Event, Message
from fulltune.records.training import Outcome
from fulltune.tasks import text_classification
from fulltune.train import checkpoints, journal
from fulltune.train.request import number_in
from fulltune.train.worker import main as worker
from fulltune.train.worker.evaluation import Evaluator
from tests import tiny, untraced_command
from tests.cases import others_long
from tests.contract.command import fulltune
from tests.train import runs

ROWS = tiny.topic_rows(64)
# 52 train rows in global batches of 8: 7 steps an epoch, the last batch has 4 rows.
STEPS_PER_EPOCH = 7
TRAIN: dict[str, Any] = {
    "num_train_epochs": 3,
    "global_batch_size": 8,
    "micro_batch_size": 4,
    "logging_steps": 1,
    "save_steps": 4,
    "eval_strategy": "steps",
    "eval_steps": 5,
}


def ask_to_stop() -> None:
    signal.raise_signal(signal.SIGTERM)


def go(folder: Path, model: Path, *, listener: Any = None, **blocks: Any) -> Outcome:
    options = {} if listener is None else {"listener": listener}
    reached = runs.run(folder, model, ROWS, options=options, **{"train": TRAIN, **blocks})
    assert reached.outcome is not None
    return reached.outcome


@pytest.fixture(scope="module")
def unbroken(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("unbroken")
    assert go(folder, tiny_encoder).steps == 3 * STEPS_PER_EPOCH
    assert [event["step"] for event in runs.events(folder, "train")] == list(range(1, 22))
    return runs.final_weights(folder)


def assert_same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize(
    ("step", "action", "error"),
    [
        pytest.param(STEPS_PER_EPOCH + 3, runs.fail, FulltuneError, id="fault"),
        pytest.param(2 * STEPS_PER_EPOCH, ask_to_stop, InterruptedRun, id="asked"),
    ],
)
def test_resume_after_a_break_gives_the_unbroken_weights(
    step: int,
    action: Callable[[], None],
    error: type[FulltuneError],
    unbroken: dict[str, torch.Tensor],
    tiny_encoder: Path,
    tmp_path: Path,
) -> None:
    """In the middle of an epoch, and after its last step; dropout is on, each step accumulates two micro batches."""
    with pytest.raises(error):
        go(tmp_path, tiny_encoder, listener=runs.at_step(step, action))
    assert not (tmp_path / "run" / "models").exists()

    assert go(tmp_path, tiny_encoder).attempt == 2

    steps = [event["step"] for event in runs.events(tmp_path, "train")]
    assert len(steps) < step + 3 * STEPS_PER_EPOCH  # the second attempt did not begin anew
    assert_same(runs.final_weights(tmp_path), unbroken)


def test_time_of_a_resumed_run_is_that_of_an_unbroken_one(tiny_encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(InterruptedRun):
        go(tmp_path, tiny_encoder, listener=runs.at_step(10, ask_to_stop))
    outcome = go(tmp_path, tiny_encoder)
    first, second = (tmp_path / "run" / "attempts" / f"{outcome.trial}-{number:02d}" for number in (1, 2))

    def lines(*events: dict[str, Any]) -> str:
        return "".join(json.dumps(event) + "\n" for event in events)

    def phase(name: str, seconds: float) -> dict[str, Any]:
        return {"kind": "phase", "name": name, "seconds": seconds}

    def trained(step: int, seconds: float) -> dict[str, Any]:
        return {"kind": "train", "step": step, "seconds": seconds}

    names = [event["name"] for event in runs.events(tmp_path, "phase")]
    expected = ["loading the model", journal.PROBING, journal.CHECKS, journal.SCORING, journal.TRAINING]
    assert names[:5] == expected
    begun = phase(names[0], 0.0), phase(journal.PROBING, 2.0), phase(journal.CHECKS, 5.0)
    begins = *begun, phase(journal.SCORING, 25.0), phase(journal.TRAINING, 27.0)
    # Asked to stop in step 10 it saves it; step 11 stands for one that was done and not saved.
    (first / "metrics.jsonl").write_text(lines(*begins, trained(9, 30.0), trained(10, 40.0), trained(11, 45.0)))
    outcome.model_copy(update={"train_seconds": 100.0}).save(second / "outcome.json")
    (second / "metrics.jsonl").write_text(lines(*begun, phase(journal.TRAINING, 25.0), trained(21, 90.0)))
    assert journal.trial_seconds(tmp_path / "run", outcome.trial) == (40 - 25) + 100 - (25 - 2)
    # Neither a line of rubbish nor one that was cut off loses the run.
    whole = (first / "metrics.jsonl").read_bytes()
    (first / "metrics.jsonl").write_bytes(b"\0\xff rubbish\n[1]\n" + whole[:-9])
    assert journal.trial_seconds(tmp_path / "run", outcome.trial) == (40 - 25) + 100 - (25 - 2)


def test_resume_twice_with_other_micro_batches_continues_the_same_global_batches(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    """As after running out of memory; dropout off, because its draws depend on the micro batch."""
    model = tiny.save_model(tmp_path / "model", "bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    go(tmp_path / "whole", model)
    with pytest.raises(InterruptedRun):
        go(tmp_path / "broken", model, listener=runs.at_step(9, ask_to_stop))
    plan = next((tmp_path / "broken" / "run" / "plan").glob("*.json"))
    values = json.loads(plan.read_text(encoding="utf-8"))
    values |= {"micro_batch_size": 2, "gradient_accumulation_steps": 4}
    plan.write_text(json.dumps(values), encoding="utf-8")
    go(tmp_path / "broken", model)

    whole, broken = runs.final_weights(tmp_path / "whole"), runs.final_weights(tmp_path / "broken")
    for name in whole:
        torch.testing.assert_close(broken[name], whole[name], rtol=1e-3, atol=1e-5)


def test_resume_with_early_stopping_stops_at_the_same_step_with_the_same_weights(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    # From so high a threshold nothing counts as better: the run stops at the third evaluation, at step 9.
    train = {**TRAIN, "eval_steps": 3, "early_stopping_patience": 2, "early_stopping_threshold": 10.0}
    outcome = go(tmp_path / "whole", tiny_encoder, train=train)
    assert (outcome.steps, outcome.reason) == (9, "early stopping")

    with pytest.raises(InterruptedRun):
        go(tmp_path / "broken", tiny_encoder, train=train, listener=runs.at_step(6, ask_to_stop))
    again = go(tmp_path / "broken", tiny_encoder, train=train)

    assert (again.steps, again.reason, again.best_step) == (9, "early stopping", outcome.best_step)
    assert_same(runs.final_weights(tmp_path / "broken"), runs.final_weights(tmp_path / "whole"))


def flip_a_bit(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def unseal(checkpoint: Path) -> None:
    (checkpoint / files.SEAL).unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_a_bit, "model.safetensors does not match its checksum"),
        (unseal, "the folder is incomplete"),
        (lambda checkpoint: (checkpoint / "rng_state.pth").unlink(), "rng_state.pth is missing"),
    ],
)
def test_torn_checkpoint_is_passed_over_with_a_message(
    damage: Callable[[Path], None], message: str, tmp_path: Path, interrupted: Path
) -> None:
    shutil.copytree(interrupted, tmp_path / "checkpoints")
    newest, before = (tmp_path / "checkpoints" / f"checkpoint-{step}" for step in (10, 8))

    assert checkpoints.newest_undamaged_checkpoint(tmp_path / "checkpoints") == (newest, [])
    damage(newest)

    found, passed_over = checkpoints.newest_undamaged_checkpoint(tmp_path / "checkpoints")
    assert found == before
    assert passed_over == [f"checkpoint-10: {message}; trying the previous checkpoint"]


@pytest.fixture(scope="module")
def interrupted(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of a run that was stopped after step 10."""
    folder = tmp_path_factory.mktemp("interrupted")
    with pytest.raises(InterruptedRun):
        go(folder, tiny_encoder, listener=runs.at_step(9, ask_to_stop))
    return folder / "run" / "checkpoints" / "full-seed42"


def test_resume_from_the_checkpoint_before_a_torn_one_gives_the_unbroken_weights(
    unbroken: dict[str, torch.Tensor], tiny_encoder: Path, tmp_path: Path
) -> None:
    with pytest.raises(InterruptedRun):
        go(tmp_path, tiny_encoder, listener=runs.at_step(9, ask_to_stop))
    flip_a_bit(tmp_path / "run" / "checkpoints" / "full-seed42" / "checkpoint-10")
    events: list[Event] = []

    go(tmp_path, tiny_encoder, listener=events.append)

    assert Message(text="continuing from the checkpoint of step 8", level="resumed") in events
    assert any("checkpoint-10" in event.text for event in events if isinstance(event, Message))
    assert_same(runs.final_weights(tmp_path), unbroken)


def test_rotation_keeps_the_best_and_the_newest(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20, 25):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(bytes([step]))
        best = 10 if step == 15 else 5
        (folder / checkpoints.STATE).write_text(json.dumps({"best_global_step": best}), encoding="utf-8")
        if step != 25:
            files.write_checksums(folder)

    checkpoints.delete_old_checkpoints(tmp_path, 2, best_step=5)

    # The unfinished one neither counts nor goes: it is being written. A run that goes back to 15 has 10 for its best.
    assert {number_in(path) for path in tmp_path.iterdir()} == {5, 10, 15, 20, 25}


def ask_in_evaluation(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the evaluation after a step be in its midst when the run is asked to stop."""
    plain = Evaluator.predict_rows

    def asked(scorer: Evaluator, rows: Any) -> Any:
        if scorer.trainer.is_in_train and scorer.trainer.state.global_step == step:
            ask_to_stop()
        return plain(scorer, rows)

    monkeypatch.setattr(Evaluator, "predict_rows", asked)


@pytest.mark.parametrize("step", others_long((0, 5), 5))
def test_evaluation_is_completed_when_asked_to_stop_and_counts_as_in_an_unbroken_run(
    step: int, unbroken: dict[str, torch.Tensor], tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The metric may choose the best step by it, be it the last one; only that before step 1 is made again."""
    whole = go(tmp_path / "whole", tiny_encoder)
    ask_in_evaluation(step, monkeypatch)
    where = f"after step {step}, which is saved" if step else "before step 1"
    with pytest.raises(InterruptedRun, match=f"stopped on request {where}"):
        go(tmp_path, tiny_encoder)
    monkeypatch.undo()

    again = go(tmp_path, tiny_encoder)

    assert (again.best_step, again.best_metric, again.steps) == (whole.best_step, whole.best_metric, whole.steps)
    assert_same(runs.final_weights(tmp_path), unbroken)
    assert [event["step"] for event in runs.events(tmp_path, "train")] == list(range(1, 3 * STEPS_PER_EPOCH + 1))
    scored = [event["step"] for event in runs.events(tmp_path, "eval")]
    assert scored == [*([] if step else [0]), 0, 5, 10, 15, 20, 21]


def test_finished_run_without_outcome_is_completed_without_training(tiny_encoder: Path, tmp_path: Path) -> None:
    """Killed between saving the model and writing the outcome."""
    train = {**TRAIN, "num_train_epochs": 1}
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(KeyboardInterrupt),
        runs.in_this_process(functools.partial(_killed_before_its_outcome, patch=patch)),
    ):
        pipeline.run(runs.job(tmp_path, tiny_encoder, ROWS, train=train), "train")
    assert not list((tmp_path / "run" / "attempts").glob("*/outcome.json"))
    weights = runs.final_weights(tmp_path)
    before = len(runs.events(tmp_path, "train"))

    outcome = go(tmp_path, tiny_encoder, train=train)

    assert len(runs.events(tmp_path, "train")) == before == STEPS_PER_EPOCH
    assert outcome.steps == STEPS_PER_EPOCH
    assert outcome.parameter_changes is not None
    assert outcome.parameter_changes.num_values_changed > 0
    assert_same(runs.final_weights(tmp_path), weights)
    assert not (tmp_path / "run" / "checkpoints" / "full-seed42").exists()


def _killed_before_its_outcome(request: Any, listener: Any, patch: pytest.MonkeyPatch) -> Outcome:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    patch.setattr(worker.Journal, "write", killed)
    return worker.run_attempt(request, worker.Hooks(), listener)


def test_finished_run_called_again_trains_nothing_and_leaves_no_checkpoints(tiny_encoder: Path, tmp_path: Path) -> None:
    first = go(tmp_path, tiny_encoder)
    left = tmp_path / "run" / "checkpoints" / "full-seed42"
    assert not left.exists()
    left.mkdir(parents=True)  # killed between the outcome and the tidying up

    assert go(tmp_path, tiny_encoder) == first
    assert not left.exists()


def test_best_checkpoint_that_was_damaged_is_not_taken_and_the_run_says_so(
    tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    falling = iter((0.0, 0.9, 0.5, 0.1))
    monkeypatch.setattr(text_classification, "metrics", lambda kept, target: {"accuracy": next(falling)})
    train = {**TRAIN, "eval_steps": 3, "max_steps": 9, "num_train_epochs": None}

    def damage() -> None:
        flip_a_bit(tmp_path / "run" / "checkpoints" / "full-seed42" / "checkpoint-3")

    outcome = go(tmp_path, tiny_encoder, train=train, listener=runs.at_step(9, damage))

    assert (outcome.best_step, outcome.best_metric) == (9, 0.1)
    warnings = [event["text"] for event in runs.events(tmp_path, "message") if event["level"] == "warning"]
    assert len(warnings) == 1
    assert warnings[0].startswith("the best checkpoint (step 3) cannot be used")


@pytest.mark.long
def test_killed_processes_same_command_ends_with_the_unbroken_weights(
    unbroken: dict[str, torch.Tensor], tiny_encoder: Path, tmp_path: Path
) -> None:
    """Real processes and SIGKILL, then the command here; `bench/kill_resume.py` does it often with real weights."""
    data = tiny.write_csv(tmp_path / "rows.csv", ROWS)
    recipe = tiny.write_recipe(tmp_path / "recipe.yaml", tiny_encoder, data, train=TRAIN)
    words = ["train", str(recipe), "--run-folder", str(tmp_path / "run")]
    command = [sys.executable, "-P", untraced_command.__file__, *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # as here: sums depend on the number of threads
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    deadline = time.monotonic() + 300
    while len(runs.events(tmp_path, "train")) < 6:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    request = json.loads(next((tmp_path / "run").glob("attempts/*/request.json")).read_text(encoding="utf-8"))
    assert request["parent_pid"] == process.pid
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="utf-8").split()
    process.kill()
    for child in children:
        os.kill(int(child), signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "run" / "models").exists()

    with runs.in_this_process():
        again = fulltune(*words)

    assert again.code == 0, again.err
    assert_same(runs.final_weights(tmp_path), unbroken)
