"""Trials side by side: further processes train their part of a batch; the line then finds the results in its files.

    line ──{"trials": [...]}──▶ helper: settles each as the line would, with the same plan
    line ◀── {"problems": [], "kind": ""} when all are settled, or why it stopped

Small models with short texts leave cores idle: two trials with one core each take less time than one after the other
with two. What is decided stays with the line, in the order it always has.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fulltune import errors, hardware, pipeline, run_folder, train
from fulltune.comparing.line import FOLDER, Line
from fulltune.comparing.trials import is_done, settle
from fulltune.errors import DoesNotFitError, FulltuneError
from fulltune.records import Plan
from fulltune.train.starting import end_with
from fulltune.trials import Trial
from fulltune.units import in_words

_COMMAND = "from fulltune.comparing import beside; beside.serve()"


@contextlib.contextmanager
def helpers(line: Line) -> Iterator[None]:
    """The processes that `compare.side_by_side` asks for beside this one, each with its share of the cores.

    Raises:
        DoesNotFitError: Their memory does not suffice for so many at once.
    """
    count = line.recipe.compare.side_by_side
    plans = [line.room(one.arm).plan for one in line.trained_arms]
    if count > 1 and (devices := {one.device for one in plans}) != {"cpu"}:
        line.say(f"compare.side_by_side is for CPUs: on {', '.join(sorted(devices))} one trial at a time")
        count = 1
    if count == 1:
        yield
        return
    _check(line, count, plans)
    line.side_by_side = count
    with _cores(max(1, hardware.num_cores() // count)), contextlib.ExitStack() as stack:
        line.helpers = [stack.enter_context(_helper(line)) for _ in range(count - 1)]
        yield


def _check(line: Line, count: int, plans: Sequence[Plan]) -> None:
    needs = [one.memory.peak for one in plans if one.memory is not None]
    if needs and count * max(needs) > line.machine.memory_available_bytes:
        raise DoesNotFitError(
            f"compare.side_by_side: {count} trials of {in_words(max(needs))} at once do not fit into the "
            f"{in_words(line.machine.memory_available_bytes)} of free memory; give a smaller number"
        )


@contextlib.contextmanager
def _cores(number: int) -> Iterator[None]:
    """Let this process and those that it starts use so many cores."""
    import torch

    name = "OMP_NUM_THREADS"
    before, threads = os.environ.get(name), torch.get_num_threads()
    number = min(number, threads)
    os.environ[name] = str(number)
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextlib.contextmanager
def _helper(line: Line) -> Iterator[subprocess.Popen[str]]:
    log = line.folder / FOLDER / "helper.txt"
    log.parent.mkdir(exist_ok=True)
    with log.open("a", encoding="utf-8") as out:
        process = subprocess.Popen(
            [sys.executable, "-c", _COMMAND, str(line.folder), line.machine.model_dump_json()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=out,
            text=True,
            start_new_session=True,  # Ctrl-C is the line's to pass on
            env=os.environ | {"PYTHONSAFEPATH": "1"},
        )
    try:
        yield process
    finally:
        assert process.stdin is not None, "a pipe"
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        if process in line.busy:  # an error or Ctrl-C came first: what it trains is saved, to go on later
            process.terminate()
        process.wait()


def side_by_side(line: Line, trials: Sequence[Trial]) -> None:
    """Settle those of these trials that are not, several at a time where there are helpers.

    Without helpers, with one trial, or with little time left nothing is done: the line trains each when its turn comes.

    Raises:
        FulltuneError: One of its kinds, of a trial, but not that it diverged: that is its result.
    """
    todo = [one for one in trials if not is_done(line, one)]
    if not line.helpers or len(todo) < 2 or line.seconds_left < max(_seconds(line, one) for one in todo):
        return
    parts = _shares(line, todo, 1 + len(line.helpers))
    line.say(f"{len(todo)} trials, {len(parts)} side by side: {', '.join(one.name for one in todo)}")
    line.busy = [helper for helper, _ in zip(line.helpers, parts[1:], strict=False)]
    for helper, part in zip(line.busy, parts[1:], strict=True):
        assert helper.stdin is not None, "a pipe"
        with contextlib.suppress(BrokenPipeError):  # it is seen below that it ended
            helper.stdin.write(json.dumps([one.model_dump(mode="json") for one in part]) + "\n")
            helper.stdin.flush()
    for trial in parts[0]:
        settle(line, trial)
    with line.clocked("side by side"):
        while line.busy:
            _wait(line, line.busy[0])


def _shares(line: Line, trials: Sequence[Trial], most: int) -> list[list[Trial]]:
    """A part for each process, so that all take about as long: the longest first, each to whoever has least."""
    parts: list[list[Trial]] = [[] for _ in range(min(most, len(trials)))]
    for trial in sorted(trials, key=lambda one: _seconds(line, one), reverse=True):
        min(parts, key=lambda part: sum(_seconds(line, one) for one in part)).append(trial)
    return parts


def _seconds(line: Line, trial: Trial) -> float:
    need = line.room(trial.arm).plan.time
    return trial.share * (need.total_seconds if need else 1.0)


def _wait(line: Line, helper: subprocess.Popen[str]) -> None:
    assert helper.stdout is not None, "a pipe"
    answer = helper.stdout.readline()
    line.busy.remove(helper)
    if not answer:  # its trials are the line's
        line.helpers.remove(helper)
        line.say(f"a process that trained beside ended (see {FOLDER}/helper.txt); going on without it")
        return
    found = json.loads(answer)
    if found["problems"]:
        raise getattr(errors, found["kind"])(found["problems"])


# ---- the helper ------------------------------------------------------------------------------------------------


def serve() -> None:
    """Settle trials for the line, until it closes stdin."""
    folder, machine = Path(sys.argv[1]), hardware.Machine.model_validate_json(sys.argv[2])
    if sys.platform == "linux":
        end_with(os.getppid())
    answers = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no answer
    run_folder.hide_progress_bars()
    job = pipeline.Run(run_folder.recipe_of(folder), folder)
    with train.nursery() as start:
        line = Line(job, pipeline.prepare(job), "", start=start, keeps_time=False)
        line.machine = machine  # free memory, too: plans are to be the same in all processes
        for asked in sys.stdin:
            os.write(answers, json.dumps(_settled(line, json.loads(asked))).encode() + b"\n")


def _settled(line: Line, trials: Sequence[dict[str, Any]]) -> dict[str, Any]:
    try:
        for trial in trials:
            settle(line, Trial.model_validate(trial))
    except FulltuneError as error:
        return {"kind": type(error).__name__, "problems": error.problems}
    return {"kind": "", "problems": []}
