"""Trials side by side: further processes train their part of a batch; the line then finds the results in its files.

    line ──{"trials": [...], "side_by_side": 2}──▶ helper: settles each as the line would, with the same plan
    line ◀── {"problems": [], "kind": "", "said": [...]} when all are settled, or why it stopped

Small models with short texts leave cores idle: two trials with one core each take less time than one after the other
with two. What is decided stays with the line, in the order it always has.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fulltune import errors
from fulltune.compare.context import FOLDER, Line
from fulltune.compare.trials import is_done, settle
from fulltune.context import Run
from fulltune.errors import FulltuneError, InterruptedRun
from fulltune.plan.budget import LIBRARIES_BYTES
from fulltune.records.comparison import Trial
from fulltune.records.data import DataSummary
from fulltune.records.events import AttemptFailed, Event, Said, Warned
from fulltune.system import hardware, run_folder
from fulltune.text import in_words
from fulltune.train.parent.fork_server import fork_server
from fulltune.train.parent.spawn import end_with

_MOST_NAMED = 4
_COMMAND = "from fulltune.compare import parallel; parallel.serve()"


Together = Callable[[Sequence[Trial]], None]
"""Settles trials, several at a time; or does nothing, so that the line trains each when its turn comes."""


def alone(trials: Sequence[Trial]) -> None:
    """Nothing at a time."""


@contextlib.contextmanager
def helpers(line: Line) -> Iterator[Together]:
    """What `compare.side_by_side` asks for: trials at a time, each with its share of the cores."""
    line.side_by_side = _possible(line)
    if line.side_by_side == 1:
        yield alone
        return
    cores = max(1, hardware.num_cores() // line.side_by_side)
    with _cores(cores), _terminated_in_order(), contextlib.ExitStack() as stack:
        yield Helpers(line, stack).settle


def _possible(line: Line) -> int:
    """How many trials at a time; where it is fewer than asked for it says why."""
    count = line.recipe.compare.side_by_side
    plans = [line.room(one.arm).plan for one in line.trained_arms]
    if count > 1 and (devices := {one.device for one in plans}) != {"cpu"}:
        line.say(f"compare.side_by_side is for CPUs: on {', '.join(sorted(devices))} one trial at a time")
        return 1
    # A worker, and the process that gives it its trials and scores rows.
    need = max(one.memory.peak if one.memory else 0 for one in plans) + 2 * LIBRARIES_BYTES
    fit = max(1, line.machine.memory_available_bytes // need)
    if fit < count:
        free = in_words(line.machine.memory_available_bytes)
        line.say(f"compare.side_by_side: {fit} at a time instead of {count}: each takes {in_words(need)} of {free}")
    return min(count, fit)


@contextlib.contextmanager
def _terminated_in_order() -> Iterator[None]:
    """SIGTERM ends this process by way of `helpers`, whose trials are saved, also while it only waits for them."""

    def stop(number: int, frame: object) -> None:
        raise InterruptedRun("interrupted; the same command continues it")

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not in the main thread: the caller keeps its own handler
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


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


@dataclass
class Helpers:
    """Processes that train beside the line."""

    line: Line
    stack: contextlib.ExitStack
    processes: list[subprocess.Popen[str]] = field(default_factory=list)
    busy: list[subprocess.Popen[str]] = field(default_factory=list)
    """Those of them that were given trials."""
    started: bool = False

    def settle(self, trials: Sequence[Trial]) -> None:
        """Settle these trials, those of them that are not; with one, or with little time left, nothing is done.

        Raises:
            FulltuneError: One of its kinds, of a trial, but not that it diverged: that is its result.
        """
        line, todo = self.line, [one for one in trials if not is_done(self.line, one)]
        if len(todo) < 2:
            return
        parts = _shares(line, todo, 1 + len(self.processes) if self.started else line.side_by_side)
        # The plan's times are with all cores.
        longest = max(sum(_seconds(line, one) for one in part) for part in parts)
        if len(parts) == 1 or line.seconds_left < len(parts) * longest:
            return
        if not self.started:  # not before: a comparison that is finished needs none
            self._start()
        named = [one.name for one in todo[:_MOST_NAMED]] + ["..."] * (len(todo) > _MOST_NAMED)
        line.say(f"{len(todo)} trials, {len(parts)} side by side: {', '.join(named)}")
        self.busy = self.processes[: len(parts) - 1]
        for helper, part in zip(self.busy, parts[1:], strict=True):
            assert helper.stdin is not None, "a pipe"
            with contextlib.suppress(BrokenPipeError):  # it is seen below that it ended
                asked = {"trials": [one.model_dump(mode="json") for one in part], "side_by_side": line.side_by_side}
                helper.stdin.write(json.dumps(asked) + "\n")
                helper.stdin.flush()
        for trial in parts[0]:
            settle(line, trial)
        with line.clocked("side by side"):
            while self.busy:
                self._wait(self.busy[0])

    def _start(self) -> None:
        self.started = True
        # Callbacks run last to first: all are asked to stop before one is waited for.
        self.stack.callback(lambda: [helper.wait() for helper in self.processes])
        for _ in range(self.line.side_by_side - 1):
            helper = _process(self.line)
            self.processes.append(helper)
            self.stack.callback(self._end, helper)

    def _end(self, helper: subprocess.Popen[str]) -> None:
        assert helper.stdin is not None, "a pipe"
        with contextlib.suppress(BrokenPipeError):
            helper.stdin.close()
        if helper in self.busy:  # an error or Ctrl-C came first: what it trains is saved, to go on later
            helper.terminate()

    def _wait(self, helper: subprocess.Popen[str]) -> None:
        assert helper.stdout is not None, "a pipe"
        answer = helper.stdout.readline()
        self.busy.remove(helper)
        if not answer:  # its trials are the line's
            helper.wait()
            self.processes.remove(helper)
            self.line.say(f"a process that trained beside ended (see {FOLDER}/helper.txt); going on without it")
            return
        found = json.loads(answer)
        for text in found["said"]:
            self.line.say(text)
        if found["problems"]:
            raise getattr(errors, found["kind"])(found["problems"])


def _process(line: Line) -> subprocess.Popen[str]:
    log = line.folder / FOLDER / "helper.txt"
    log.parent.mkdir(exist_ok=True)
    given = (str(line.folder), line.machine.model_dump_json(), str(os.getpid()))
    with log.open("a", encoding="utf-8") as out:
        return subprocess.Popen(
            [sys.executable, "-c", _COMMAND, *given],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=out,
            text=True,
            start_new_session=True,  # Ctrl-C is the line's to pass on
            env=os.environ | {"PYTHONSAFEPATH": "1"},
        )


def _shares(line: Line, trials: Sequence[Trial], most: int) -> list[list[Trial]]:
    """A part for each process, so that all take about as long: the longest first, each to whoever has least."""
    parts: list[list[Trial]] = [[] for _ in range(min(most, len(trials)))]
    for trial in sorted(trials, key=lambda one: _seconds(line, one), reverse=True):
        min(parts, key=lambda part: sum(_seconds(line, one) for one in part)).append(trial)
    return parts


def _seconds(line: Line, trial: Trial) -> float:
    need = line.room(trial.arm).plan.time
    return trial.share * (need.total_seconds if need else 1.0)


# ---- the helper ------------------------------------------------------------------------------------------------


def serve() -> None:
    """Settle trials for the line, until it closes stdin."""
    folder, machine, parent = Path(sys.argv[1]), hardware.Machine.model_validate_json(sys.argv[2]), int(sys.argv[3])
    if sys.platform == "linux":
        end_with(parent)
    answers = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no answer
    run_folder.hide_progress_bars()
    said: list[str] = []
    job = Run(run_folder.recipe_of(folder), folder, listener=lambda event: said.extend(_told(event)))
    summary = DataSummary.load(folder / "data" / "summary.json")
    with fork_server() as start:
        line = Line(job, summary, "", start=start, keeps_time=False)
        line.machine = machine  # free memory, too: plans are to be the same in all processes
        for asked in sys.stdin:
            given = json.loads(asked)
            line.side_by_side = given["side_by_side"]
            answer = _settled(line, given["trials"]) | {"said": said}
            os.write(answers, json.dumps(answer).encode() + b"\n")
            said.clear()


def _told(event: Event) -> list[str]:
    """What the line's user should know of a helper's trial."""
    match event:
        case Said(text=text) | Warned(text=text) | AttemptFailed(reason=text):
            return [text]
        case _:
            return []


def _settled(line: Line, trials: Sequence[dict[str, Any]]) -> dict[str, Any]:
    try:
        for trial in trials:
            if select.select([0], [], [], 0)[0]:  # closed: one batch at a time is given
                raise InterruptedRun("interrupted; the same command continues it")
            settle(line, Trial.model_validate(trial))
    except FulltuneError as error:
        return {"kind": type(error).__name__, "problems": error.problems}
    return {"kind": "", "problems": []}
