"""A child process that trains: judged by what it leaves, ended when it hangs or does not stop; its variables."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fulltune import files
from fulltune.records.events import Event
from fulltune.records.training import Outcome
from fulltune.train.journal import HEARTBEAT_FILE, Journal, read_completed_steps
from fulltune.train.parent import child, spawn
from fulltune.train.request import Request
from tests import tiny
from tests.plans import outcome, plan
from tests.train import runs

Start = Callable[..., Request]


@pytest.fixture
def start(tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Makes the request of an attempt whose process is a shell script, with the attempt's folder as `$here`."""

    def started(script: str, processes: int = 1, **train: Any) -> Request:
        recipe = runs.job(tmp_path, tiny_encoder, tiny.topic_rows(64), train=train).recipe
        planned = plan(num_processes=processes)
        request = Request(
            run_folder=str(tmp_path), recipe=recipe, plan=planned, attempt=1, checkpoint=None, parent_pid=None
        )
        request.folder.mkdir(parents=True)
        program = tmp_path / "python"
        program.write_text(f"#!/bin/sh\nhere={request.folder}\n{script}\n", encoding="utf-8")
        program.chmod(0o755)
        monkeypatch.setattr(spawn.sys, "executable", str(program))
        return request

    return started


@pytest.mark.parametrize(
    ("left", "end", "status"),
    [
        ({"": "done"}, "exit 0", "done"),
        # The first process only saw that another one was gone.
        ({"": "error", "-rank1": "out_of_memory"}, "exit 1", "out_of_memory"),
        ({"": "error"}, "echo 'traceback : Signal 9 (SIGKILL) received by PID 7'; exit 1", "killed"),
        ({}, "kill -9 $$", "killed"),
        ({}, "echo '  what():  std::bad_alloc'; exit 134", "out_of_memory"),
        ({"": "error"}, "echo 'memory allocation of 80 bytes failed'; exit 1", "out_of_memory"),
        ({}, "echo broken; exit 3", "crashed"),
    ],
)
def test_child_process_is_judged_by_what_it_leaves(
    left: dict[str, str], end: str, status: str, start: Start, tmp_path: Path
) -> None:
    for rank, status_of_rank in left.items():
        outcome(status_of_rank).save(tmp_path / f"ready{rank}.json")
    # Written by the "child": the parent must not read outcomes before it has ended.
    copies = "".join(f"cp {tmp_path}/ready{rank}.json $here/outcome{rank}.json\n" for rank in left)
    request = start(copies + end)

    outcome_of_child = child.run_worker(request, lambda event: None)

    assert outcome_of_child.status == status
    assert Outcome.load(request.folder / "outcome.json") == outcome_of_child
    assert ("broken" in outcome_of_child.log_tail) == (status == "crashed")


def test_child_that_gives_no_sign_of_life_is_ended_with_its_last_step(start: Start) -> None:
    beats = "for n in 1 2 3 4; do printf $n > $here/heartbeat; sleep 0.5; done"
    request = start(f"printf evaluation > $here/phase\n{beats}\nsleep 600", hang_timeout="1s")

    result = child.run_worker(request, lambda event: None)

    assert (result.status, result.steps, result.phase) == ("hung", 4, "evaluation")
    assert result.reason == (
        "the training process sent no heartbeat for 1s (train.hang_timeout) after step 4 in an evaluation, and was "
        "killed"
    )
    assert Outcome.load(request.folder / "outcome.json") == result


def test_heartbeat_that_ends_while_it_is_looked_at_leaves_a_finished_training_finished(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome("done").save(tmp_path / "ready.json")
    exists = Path.exists

    def exists_for_a_moment(path: Path, **given: Any) -> bool:
        was_there = exists(path, **given)
        if path.name == HEARTBEAT_FILE:
            path.unlink(missing_ok=True)
        return was_there

    monkeypatch.setattr(Path, "exists", exists_for_a_moment)
    request = start(f"printf 3 > $here/heartbeat; sleep 0.5; cp {tmp_path}/ready.json $here/outcome.json")
    assert child.run_worker(request, lambda event: None).status == "done"

    (request.folder / HEARTBEAT_FILE).write_text("3", encoding="ascii")
    assert read_completed_steps(request.folder) == 3


def test_heartbeat_is_never_seen_half_written(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.write_heartbeat(1)
    (tmp_path / "opened").hardlink_to(tmp_path / HEARTBEAT_FILE)
    journal.write_heartbeat(2)
    assert [(tmp_path / name).read_text(encoding="ascii") for name in ("opened", HEARTBEAT_FILE)] == ["1", "2"]


def test_one_of_several_processes_that_was_killed_is_told_from_an_error(start: Start) -> None:
    cause = "Root Cause (first observed failure):\n  rank      : 1 (local_rank: 1)\n  exitcode  : -9 (pid: 5)"
    signal_line = "  traceback : Signal 9 (SIGKILL) received by PID 5"
    request = start(f"printf '{cause}\n{signal_line}\n'\nexit 1", processes=2)

    result = child.run_worker(request, lambda event: None)

    assert result.status == "killed"
    assert result.reason == "the training process was killed (SIGKILL)"


@pytest.mark.parametrize(
    ("beat", "saved", "when_interrupted"),
    [
        ("printf 7 > $here/heartbeat", (2, 4), "after step 7; step 4 is saved"),
        ("printf 7 > $here/heartbeat", (), "after step 7; there is no checkpoint yet"),
        ("", (), "before step 1"),
    ],
)
def test_child_that_does_not_stop_when_asked_is_ended_at_the_third_signal(
    beat: str, saved: tuple[int, ...], when_interrupted: str, start: Start
) -> None:
    up = """printf '{"kind": "cut\\n{"kind": "message", "text": "up"}\\n' > $here/metrics.jsonl"""
    request = start(f"trap '' TERM\n{beat}\n{up}\nsleep 600")
    for step in (*saved, 6):
        checkpoint = request.checkpoints / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        if step in saved:
            files.write_checksums(checkpoint)
    texts = []

    def impatient(event: Event) -> None:
        texts.append(event.text)
        for number in [signal.SIGHUP] if event.text == "up" else [signal.SIGTERM, signal.SIGINT]:
            signal.raise_signal(number)

    result = child.run_worker(request, impatient)

    when = "after the current step, which is saved" if beat else "before its first step, as soon as the model is loaded"
    assert texts[0] == "up"
    assert texts[1].startswith(f"stop requested: training ends {when}")
    assert texts[1].endswith("a second signal has no effect, but a third one kills the run without saving")
    assert len(texts) == 2
    assert (result.status, result.reason) == ("interrupted", f"interrupted {when_interrupted}")
