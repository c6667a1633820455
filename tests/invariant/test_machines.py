"""Two commands as two machines: one rendezvous, one run; machines that differ, stop, or are lost."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from fulltune.records.run import Environment
from fulltune.records.training import Outcome
from fulltune.system.hardware import num_cores
from tests.invariant import placed
from tests.invariant.placed import FAMILIES, Curve, Place
from tests.invariant.two_machines import Job, two_machines
from tests.train import runs

pytestmark = [pytest.mark.long, pytest.mark.skipif(num_cores() < 2, reason="needs a CPU core per process")]

ENCODER, DDP = FAMILIES["encoder"], Place("ddp:2")
STEPS = 50


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Curve:
    """The same run in one process."""
    folder = tmp_path_factory.mktemp("one") / "run"
    with runs.in_this_process():
        placed.train(folder, ENCODER, Place("single"), max_steps=STEPS, precision="fp32")
    return placed.read(folder)


def assert_whole(job: Job, one: Curve) -> None:
    """Both commands ended well, with the curve of one process."""
    assert job.wait_for() == [0, 0], f"{job.said(0)}\n{job.said(1)}"
    found = placed.differences(one, placed.read(job.folder))
    assert (found.loss < 1e-4, found.score < 1e-3) == (True, True), found


def reasons(job: Job) -> list[tuple[str, str]]:
    """How the attempts ended."""
    outcomes = [Outcome.load(path) for path in sorted(job.folder.glob("run/attempts/*/outcome.json"))]
    return [(one.status, one.reason) for one in outcomes]


def test_run_goes_on_when_an_agent_or_a_machine_is_lost(one: Curve, tmp_path: Path) -> None:
    draw = random.Random(0)
    with two_machines(tmp_path, ENCODER, DDP, max_steps=STEPS) as job:
        job.at_step(7, draw)
        job.agent(1).kill()
        job.at_first_step_of(2)
        job.kill_machine(1)
        job.start(1)  # as Slurm or Kubernetes would
        assert_whole(job, one)
    (first, _), (second, lost), (last, _) = reasons(job)
    assert first in ("killed", "lost"), "by what was seen first: the killed torchrun, or what it did to the others"
    assert (second, last) == ("lost", "done")
    assert "machine 1" in lost


def test_stopped_on_one_machine_all_save_and_the_same_commands_go_on(one: Curve, tmp_path: Path) -> None:
    """To the end of what one process does."""
    with two_machines(tmp_path, ENCODER, Place("fsdp2:2"), max_steps=STEPS) as job:
        job.at_step(6)
        job.ask_to_stop(1)
        assert job.wait_for() == [75, 75], f"{job.said(0)}\n{job.said(1)}"
        done = max(job.steps())
        for rank in (0, 1):
            job.start(rank)
        assert_whole(job, one)
    assert sorted(job.steps()) == list(range(1, STEPS + 1)), "no step was done twice"
    assert f"step {done}" in job.said(0)
    used = Environment.load(tmp_path / "run" / "environment.json")
    assert [name.partition(" (")[0] for name in used.machines] == ["machine 0", "machine 1"]
    for attempt in (tmp_path / "run" / "attempts").iterdir():
        assert (attempt / "log-machine1.txt").exists()
        for machine in (0, 1):
            assert list(attempt.glob(f"ranks/machine-{machine}/*/attempt_0/0/stderr.log"))


def test_machines_that_differ_are_refused_on_all_before_step_1(tmp_path: Path) -> None:
    job = Job(tmp_path, ENCODER, DDP)
    job.write()
    other = tmp_path / "other.yaml"
    other.write_text((tmp_path / "recipe.yaml").read_text().replace("max_steps: 50", "max_steps: 49"))
    try:
        job.start(0)
        job.start(1, recipe=other)
        assert job.wait_for() == [2, 2]
    finally:
        job.end()
    for rank in (0, 1):
        assert "uses a different recipe: train.max_steps is 49 (machine 0: 50)" in job.said(rank)
    assert not (tmp_path / "run").exists()
