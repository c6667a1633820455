"""A log to findings, as a table of curves; logs of other Trainers; what is no log."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fulltune.doctor import Log, diagnose, read_log
from fulltune.errors import SetupError
from fulltune.records.training import ParameterChanges
from fulltune.stats.curves import Curves
from tests.contract.command import fulltune
from tests.plans import outcome, plan

NAN = float("nan")


def points(values: Sequence[float], every: int = 10) -> tuple[tuple[int, float], ...]:
    return tuple((every * (place + 1), value) for place, value in enumerate(values))


def log(
    losses: Sequence[float],
    evals: Sequence[float] = (),
    metric: Sequence[float] = (),
    before: float | None = None,
    **more: Any,
) -> Log:
    """A log of so many steps; its evaluations are spread over them."""
    steps = 10 * len(losses)
    every = steps // max(1, len(evals))
    curves = Curves(
        train_loss=points(losses),
        eval_loss=points(evals, every),
        metric=points(metric, every),
        metric_name="accuracy" if metric else "loss",
        greater_is_better=bool(metric),
        eval_rows=1000,
        epochs_per_step=4 / steps,
        before=before,
    )
    return Log(**{"where": Path("run"), "curves": curves, "steps": steps, "rate": 1e-4, **more})


FALLING = [2.0 * 0.88**number for number in range(32)]
SLOW = [2.0 - 0.02 * number for number in range(32)]
HARDLY_MOVED = ParameterChanges(
    num_tensors_with_gradient=2, num_tensors_changed=2, num_values_with_gradient=100, num_values_changed=14
)
GOOD = ([0.9, 0.7, 0.62, 0.6], [0.6, 0.7, 0.8, 0.82])


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (log(FALLING, *GOOD), ["sound"]),
        (log([1.0] * 9 + [NAN] * 3), ["diverged"]),
        (log([4.0] * 10 + [1.5] * 20 + [4.5] * 20), ["diverged"]),
        (log([1.1] + [9.0] * 30), ["diverged"]),
        (log([2.3, 2.31, 2.29] * 12), ["plateau"]),
        (log(FALLING, [1.0, 0.7, 0.9, 1.4], [0.7, 0.8, 0.75, 0.7]), ["over-fitted"]),
        (log(SLOW, [1.9, 1.7, 1.5, 1.3], [0.3, 0.5, 0.6, 0.7]), ["under-fitted"]),
        (log(FALLING, *GOOD, skipped=(40, 44)), ["bad steps"]),
        (log(FALLING, *GOOD, plan=plan(rollbacks=(30,)), outcome=outcome("done")), ["bad steps"]),
        (log([2.3, 2.31, 2.29] * 12, *GOOD, before=0.9), ["got worse"]),  # and no higher rate is advised
        (log(FALLING, *GOOD, before=0.8), ["sound"]),
        (log(FALLING, *GOOD, grad_norm=points([NAN, 1.0] * 16)), ["sound"]),  # fp16's scaler at work
        (log(FALLING, *GOOD, grad_norm=points([1.0] * 27 + [NAN] * 5)), ["diverged"]),
        (log(FALLING, *GOOD, plan=plan()), ["unfinished"]),
        (log(FALLING[:8], [1.5, 1.0, 1.2, 1.3], [0.4, 0.5, 0.5, 0.6]), ["over-confident"]),
        (log(FALLING, *GOOD, plan=plan(), outcome=outcome("disk_full")), ["disk full"]),
        (log(FALLING, *GOOD, plan=plan(), outcome=outcome("spiked")), ["diverged"]),
        (log([1.1] + [9.0] * 30, plan=plan(), outcome=outcome("diverged")), ["diverged"]),
        (log(FALLING, *GOOD, outcome=outcome("done", parameter_changes=HARDLY_MOVED)), ["lost updates"]),
    ],
)
def test_findings_of_curves(given: Log, names: list[str]) -> None:
    found = diagnose(given)
    assert [name for name, _, _ in found] == names
    assert all(evidence for _, evidence, _ in found)
    assert all(advice for name, _, advice in found if name not in ("sound", "disk full"))


# ---- reading ---------------------------------------------------------------------------------------------------


def state(**more: Any) -> dict[str, Any]:
    history: list[dict[str, Any]] = []
    for number, loss in enumerate(FALLING, start=1):
        line = {"loss": loss, "grad_norm": 1.0, "learning_rate": 5e-5, "epoch": number / 8, "step": 10 * number}
        history.append(line)
    for number, (loss, accuracy) in enumerate(zip([1.0, 0.7, 0.9, 1.4], [0.7, 0.8, 0.75, 0.7], strict=True), start=1):
        history.append(
            {"eval_loss": loss, "eval_accuracy": accuracy, "eval_runtime": 1.0, "epoch": number, "step": 80 * number}
        )
    return {"log_history": history, "max_steps": 320, "best_global_step": 160, **more}


@pytest.mark.parametrize("where", ["trainer_state.json", "checkpoint-320/trainer_state.json"])
def test_state_of_a_trainer_is_read(where: str, tmp_path: Path) -> None:
    path = tmp_path / where
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(state()))
    for place in (tmp_path, path):
        found = read_log(place)
        curves = found.curves
        assert (curves.metric_name, curves.greater_is_better, curves.kept_step) == ("accuracy", True, 160)
        assert (found.steps, curves.epochs_per_step * found.steps) == (320, 4.0)
        assert [name for name, _, _ in diagnose(found)] == ["over-fitted"]


def test_newest_state_is_read(tmp_path: Path) -> None:
    for step, content in ((100, json.dumps(state())), (1000, json.dumps(state(best_global_step=7)))):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(content)
    assert read_log(tmp_path).curves.kept_step == 7


@pytest.mark.parametrize(("name", "value"), [("loss", None), ("loss", "NaN"), ("grad_norm", NAN)])
def test_value_that_is_no_number_any_more_is_seen(name: str, value: Any, tmp_path: Path) -> None:
    spoilt = state()
    for line in spoilt["log_history"][20:32]:
        line[name] = value
    (tmp_path / "trainer_state.json").write_text(json.dumps(spoilt))
    [found] = [evidence for name, evidence, _ in diagnose(read_log(tmp_path)) if name == "diverged"]
    assert "not finite in 12 logged values, first at step 210" in found
    assert read_log(tmp_path).steps == 320


def test_little_is_said_to_be_little() -> None:
    assert [name for name, _, _ in diagnose(log([1.0, 0.9]))] == ["too little to tell"]
    assert "so few evaluations cannot show overfitting" in diagnose(log(FALLING))[0][1]


def test_events_of_tensorboard_are_read(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    from torch.utils.tensorboard import SummaryWriter

    # An earlier launch: its folder is not the newest.
    earlier = SummaryWriter(str(tmp_path / "runs" / "earlier"))
    earlier.add_scalar("train/loss", 9.0, 5000)
    earlier.close()
    for file in (tmp_path / "runs" / "earlier").iterdir():
        os.utime(file, (1, 1))
    writer = SummaryWriter(str(tmp_path / "runs" / "later"))
    for line in state()["log_history"]:
        for name, value in line.items():
            if name != "step":
                tag = f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"
                writer.add_scalar(tag, value, line["step"])
    writer.close()
    found = read_log(tmp_path)
    assert (found.steps, found.curves.metric_name) == (320, "accuracy")
    assert [name for name, _, _ in diagnose(found)] == ["over-fitted"]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("notes.txt", "hello", "no log in a known format; expected a run folder"),
        ("trainer_state.json", '{"log_history": 3}', "is not the state of a Trainer"),
        ("trainer_state.json", '{"log_history": [{"eval_loss": 1, "step": 3}]}', "expected a train loss"),
    ],
)
def test_what_is_no_log_is_said(file: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / file).write_text(content)
    with pytest.raises(SetupError, match=message):
        read_log(tmp_path)
    with pytest.raises(SetupError, match="no such file or folder"):
        read_log(tmp_path / "nothing")


def test_doctor_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "trainer_state.json").write_text(json.dumps(state()))
    said = fulltune("doctor", tmp_path)
    assert said.code == 0
    assert "over-fitted" in said.out
    assert "320 steps, 4 evaluations" in " ".join(said.out.split())
    assert json.loads(fulltune("doctor", tmp_path, "--json").out)[0]["name"] == "over-fitted"
    assert fulltune("doctor", tmp_path / "nothing").code == 2
