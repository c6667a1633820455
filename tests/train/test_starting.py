"""Workers that are forked from a process with the libraries loaded: same results, and faults of their own."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from fulltune.errors import InterruptedRun
from fulltune.records.events import Event, Listener, Message, StepLogged
from fulltune.records.plan import Plan
from fulltune.records.training import Outcome
from fulltune.train.hooks import Hooks
from fulltune.train.parent import fork_server as forking
from fulltune.train.parent.fork_server import fork_server
from fulltune.train.parent.retry import PlannedTrial, train_in_attempts
from fulltune.train.parent.spawn import Starter, start_in_new_process
from fulltune.train.request import Request
from fulltune.train.worker import main as worker
from tests import tiny
from tests.train import runs

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is forked"),
]
TRAIN = {"max_steps": 4, "logging_steps": 1, "load_best_model_at_end": False}
LONG = {**TRAIN, "max_steps": 2000}


def silent(event: Event) -> None:
    """Listen to nothing."""


def trained(
    folder: Path, model: Path, start: Starter, listener: Listener = silent, train_block: Mapping[str, Any] = TRAIN
) -> Outcome:
    """Such a run, its worker started by `start`."""
    folder.mkdir(exist_ok=True)
    job = runs.job(folder, model, tiny.topic_rows(60), train=train_block)
    reached = runs.run(folder, model, tiny.topic_rows(60), train=train_block, until="plan")
    assert isinstance(reached.plan, Plan)
    return train_in_attempts(PlannedTrial(job.recipe, reached.plan, folder / "run", Hooks(), listener), start)


@pytest.fixture(scope="module")
def start() -> Iterator[Starter]:
    """That of one server, which begins anew where it was killed."""
    with fork_server() as found:
        yield found


def test_forked_workers_end_with_the_weights_of_a_new_process(
    start: Starter, tiny_encoder: Path, tmp_path: Path
) -> None:
    trained(tmp_path / "new", tiny_encoder, start_in_new_process)
    for name in ("one", "two"):
        assert trained(tmp_path / name, tiny_encoder, start).status == "done"

    wanted = runs.final_weights(tmp_path / "new")
    for name in ("one", "two"):
        weights = runs.final_weights(tmp_path / name)
        assert all(torch.equal(weights[key], wanted[key]) for key in wanted)
    log = (tmp_path / "two" / "run" / "attempts" / "full-seed42-01" / "log.txt").read_text(encoding="utf-8")
    assert "weights initialised at random" in log


def test_forked_worker_saves_when_asked_to_stop_and_the_next_one_goes_on(
    start: Starter, tiny_encoder: Path, tmp_path: Path
) -> None:
    stop = runs.at_step(1, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(InterruptedRun, match="stopped on request after step"):
        trained(tmp_path / "run", tiny_encoder, start, stop, LONG)
    texts: list[str] = []

    def stop_again(event: Event) -> None:
        if isinstance(event, StepLogged) and "train" not in texts:
            signal.raise_signal(signal.SIGINT)
        texts.append(event.text if isinstance(event, Message) else event.kind)

    with pytest.raises(InterruptedRun, match="stopped on request after step"):
        trained(tmp_path / "run", tiny_encoder, start, stop_again, LONG)
    assert texts[0].startswith("continuing from the checkpoint of step")


def test_forked_worker_that_is_killed_alone_or_with_the_fork_server_counts_as_killed(
    start: Starter, tiny_encoder: Path, tmp_path: Path
) -> None:
    children = []

    def noted(request: Request, log: Path) -> Any:
        children.append(start(request, log))
        return children[-1]

    def kill_worker() -> None:
        os.kill(children[-1].pid, signal.SIGKILL)

    def kill_server() -> None:
        parent = int(Path(f"/proc/{children[-1].pid}/stat").read_text(encoding="utf-8").split()[3])
        assert parent != os.getpid()
        os.kill(parent, signal.SIGKILL)

    for name, kill in (("worker", kill_worker), ("server", kill_server)):
        last = trained(tmp_path / name, tiny_encoder, noted, runs.at_step(1, kill), {**TRAIN, "max_steps": 200})
        outcomes = [Outcome.load(path) for path in sorted((tmp_path / name).glob("run/attempts/*/outcome.json"))]
        assert [one.status for one in outcomes] == ["killed", "done"]  # after a kill it tries again
        assert last == outcomes[-1]


def test_forked_worker_has_the_variables_of_its_own_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OF_THE_FIRST", "1")
    names = ("OF_THE_FIRST", "OF_THIS")

    def print_variables(request: str) -> int:
        os.write(1, str([os.environ.get(name) for name in names]).encode())
        return 0

    monkeypatch.setattr(worker, "main", print_variables)
    request = {"request": "request.json", "log": str(tmp_path / "log.txt"), "variables": {"OF_THIS": "2"}}
    parent = os.getpid()
    if (pid := os.fork()) == 0:
        forking._run_as_worker(request, parent)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert (tmp_path / "log.txt").read_text(encoding="utf-8") == "[None, '2']"


def test_leaving_while_a_worker_trains_ends_it(tiny_encoder: Path, tmp_path: Path) -> None:
    request = planned(tmp_path / "run", tiny_encoder)
    with fork_server() as start:
        child = start(request, request.folder / "log.txt")
        assert child.poll() is None
    deadline = time.monotonic() + 60
    while Path(f"/proc/{child.pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{child.pid}").exists()


def planned(folder: Path, model: Path) -> Request:
    """An attempt of a long run that was not started."""
    folder.mkdir()
    reached = runs.run(folder, model, tiny.topic_rows(60), train=LONG, until="plan")
    job = runs.job(folder, model, tiny.topic_rows(60), train=LONG)
    assert reached.plan is not None
    request = Request(
        run_folder=str(folder / "run"), recipe=job.recipe, plan=reached.plan, attempt=1, checkpoint=None,
        parent_pid=os.getpid(),
    )  # fmt: skip
    request.checkpoints.mkdir(parents=True)
    request.folder.mkdir(parents=True)
    request.save(request.folder / "request.json")
    return request
