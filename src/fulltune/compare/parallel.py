"""Trials side by side: helper processes train their part of a batch, and the comparison finds the results in its files.

    comparison ──{"trials": [...], "side_by_side": 2}──▶ helper: trains each as the comparison would, by the same plan
    comparison ◀── {"problems": [], "kind": "", "said": [...]} when all are done, or why it stopped

Small models with short texts leave cores idle: two trials with one core each take less time than one after the other
with two (docs/log.md: 9.5 full runs in place of 11.5). What is decided, and in which order, stays with the comparison.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fulltune import errors
from fulltune.compare.context import FOLDER, Context
from fulltune.compare.trials import is_done, run_trial
from fulltune.errors import FulltuneError, InterruptedRun
from fulltune.plan.budget import LIBRARIES_BYTES
from fulltune.records.comparison import Trial
from fulltune.records.data import DataSummary
from fulltune.records.events import AttemptFailed, Event, Warned
from fulltune.run_context import Run
from fulltune.system import hardware, run_folder, signals
from fulltune.text import first_few, format_bytes
from fulltune.train.parent.fork_server import fork_server
from fulltune.train.parent.spawn import end_with

_MOST_NAMED = 4
_INTERRUPTED = "interrupted; the same command continues it"
_COMMAND = "from fulltune.compare import parallel; parallel.serve()"


Together = Callable[[Sequence[Trial]], None]
"""Trains several trials at a time; or does nothing, so that each is trained when its turn comes."""


def alone(trials: Sequence[Trial]) -> None:
    """Nothing at a time."""


@contextlib.contextmanager
def helpers(context: Context) -> Iterator[Together]:
    """What `compare.side_by_side` asks for: trials at a time, each with its share of the cores."""
    context.side_by_side = _possible(context)
    if context.side_by_side == 1:
        yield alone
        return
    cores = max(1, hardware.num_cores() // context.side_by_side)
    with _cores(cores), _terminated_in_order(), contextlib.ExitStack() as stack:
        yield Helpers(context, stack).run


def _possible(context: Context) -> int:
    """How many trials at a time; where it is fewer than asked for it says why."""
    count = context.recipe.compare.side_by_side
    plans = [context.setup(one.arm).plan for one in context.trained_arms]
    if count > 1 and (devices := {one.device for one in plans}) != {"cpu"}:
        context.say(f"compare.side_by_side is for CPUs: on {', '.join(sorted(devices))} one trial at a time")
        return 1
    # A worker, and the process that gives it its trials and scores rows.
    need = max(one.memory.peak if one.memory else 0 for one in plans) + 2 * LIBRARIES_BYTES
    fit = max(1, context.machine.memory_available_bytes // need)
    if fit < count:
        free = format_bytes(context.machine.memory_available_bytes)
        context.say(
            f"compare.side_by_side: {fit} at a time instead of {count}: each takes {format_bytes(need)} of {free}"
        )
    return min(count, fit)


@contextlib.contextmanager
def _terminated_in_order() -> Iterator[None]:
    """A signal ends this process by way of `helpers`, whose trials are saved, also while it only waits for them."""

    def stop(number: int, frame: object) -> None:
        raise InterruptedRun(_INTERRUPTED)

    before = dict[int, Any]()
    with contextlib.suppress(ValueError):  # not in the main thread: the caller keeps its own handler
        before = signals.answer(stop, signals.ENDING)
    try:
        yield
    finally:
        signals.put_back(before)


@contextlib.contextmanager
def _cores(number: int) -> Iterator[None]:
    """Let this process and those that it starts use so many cores."""
    import torch

    name = "OMP_NUM_THREADS"
    before, threads = os.environ.get(name), torch.get_num_threads()
    os.environ[name] = str(min(number, threads))
    torch.set_num_threads(min(number, threads))
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


@dataclass
class Helpers:
    """Processes that train beside this one."""

    context: Context
    stack: contextlib.ExitStack
    processes: list[subprocess.Popen[str]] = field(default_factory=list)
    busy: list[subprocess.Popen[str]] = field(default_factory=list)
    """Those of them that were given trials."""
    started: bool = False

    def run(self, trials: Sequence[Trial]) -> None:
        """Train those of these trials that are not done; with one, or with little time left, nothing is done.

        Raises:
            FulltuneError: One of its kinds, of a trial, but not that it diverged: that is its result.
        """
        context = self.context
        todo = [one for one in trials if not is_done(context, one)]
        if len(todo) < 2:
            return
        parts = _shares(context, todo, 1 + len(self.processes) if self.started else context.side_by_side)
        # The plan's times are with all cores.
        longest = max(sum(_seconds(context, one) for one in part) for part in parts)
        if len(parts) == 1 or context.seconds_left < len(parts) * longest:
            return
        if not self.started:  # not before: a comparison that is finished needs none
            self._start()
        named = first_few([one.name for one in todo], _MOST_NAMED)
        context.say(f"{len(todo)} trials, {len(parts)} side by side: {named}")
        self.busy = self.processes[: len(parts) - 1]
        for helper, part in zip(self.busy, parts[1:], strict=True):
            asked = {"trials": [one.model_dump(mode="json") for one in part], "side_by_side": context.side_by_side}
            assert helper.stdin is not None, "a pipe"
            with contextlib.suppress(BrokenPipeError):  # it is seen below that it ended
                helper.stdin.write(json.dumps(asked) + "\n")
                helper.stdin.flush()
        for trial in parts[0]:
            run_trial(context, trial)
        with context.clocked("side by side"):
            while self.busy:
                self._wait(self.busy[0])

    def _start(self) -> None:
        self.started = True
        # Callbacks run last to first: all are asked to stop before one is waited for.
        self.stack.callback(lambda: [helper.wait() for helper in self.processes])
        for _ in range(self.context.side_by_side - 1):
            helper = _process(self.context)
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
        if not answer:  # its trials are trained here
            helper.wait()
            self.processes.remove(helper)
            self.context.say(f"a helper process ended (see {FOLDER}/helper.txt); going on without it")
            return
        found = json.loads(answer)
        for text in found["said"]:
            self.context.say(text)
        if found["problems"]:
            raise getattr(errors, found["kind"])(found["problems"])


def _process(context: Context) -> subprocess.Popen[str]:
    log = context.folder / FOLDER / "helper.txt"
    log.parent.mkdir(exist_ok=True)
    given = (str(context.folder), context.machine.model_dump_json(), str(os.getpid()))
    with log.open("a", encoding="utf-8") as out:
        return subprocess.Popen(
            [sys.executable, "-c", _COMMAND, *given],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=out,
            text=True,
            start_new_session=True,  # Ctrl-C is passed on by this process
            env=os.environ | {"PYTHONSAFEPATH": "1"},
        )


def _shares(context: Context, trials: Sequence[Trial], most: int) -> list[list[Trial]]:
    """A part for each process, so that all take about as long: the longest first, each to whoever has least."""
    parts: list[list[Trial]] = [[] for _ in range(min(most, len(trials)))]
    for trial in sorted(trials, key=lambda one: _seconds(context, one), reverse=True):
        min(parts, key=lambda part: sum(_seconds(context, one) for one in part)).append(trial)
    return parts


def _seconds(context: Context, trial: Trial) -> float:
    setup = context.setup(trial.arm)
    need = (setup.free_plan if trial.searches else setup.plan).time
    return trial.share * (need.total_seconds if need else 1.0)


# ---- the helper ------------------------------------------------------------------------------------------------


def serve() -> None:
    """Train trials for a comparison in another process, until it closes stdin."""
    folder, machine, parent = Path(sys.argv[1]), hardware.Machine.model_validate_json(sys.argv[2]), int(sys.argv[3])
    if sys.platform == "linux":
        end_with(parent)
    answers = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no answer
    run_folder.hide_progress_bars()
    said: list[str] = []

    def listen(event: Event) -> None:
        match event:  # a trial that diverged is told by whoever reads its result
            case Warned(text=text) | AttemptFailed(reason=text):
                said.append(text)

    job = Run(run_folder.recipe_of(folder), folder, listener=listen)
    summary = DataSummary.of_run(folder)
    with fork_server() as start:
        context = Context(job, summary, "", start=start, keeps_time=False)
        context.machine = machine  # free memory, too: plans are to be the same in all processes
        for asked in sys.stdin:
            given = json.loads(asked)
            context.side_by_side = given["side_by_side"]
            answer = _answer(context, given["trials"]) | {"said": said}
            os.write(answers, json.dumps(answer).encode() + b"\n")
            said.clear()


def _answer(context: Context, trials: Sequence[dict[str, Any]]) -> dict[str, Any]:
    try:
        for trial in trials:
            if select.select([0], [], [], 0)[0]:  # closed: one batch at a time is given
                raise InterruptedRun(_INTERRUPTED)
            run_trial(context, Trial.model_validate(trial))
    except FulltuneError as error:
        return {"kind": type(error).__name__, "problems": error.problems}
    return {"kind": "", "problems": []}
