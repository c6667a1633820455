"""The parent's side: start an attempt in a process group of its own, watch it, decide what comes next."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fulltune.errors import Diverged, DoesNotFitError, FulltuneError, GuardStop, InterruptedRun, SetupError
from fulltune.recipe.fields import Recipe
from fulltune.records.plan import Plan
from fulltune.records.training import Outcome, OutcomeStatus
from fulltune.system.out_of_memory import in_last_words, kernel_kills, memory_is_limited
from fulltune.system.run_folder import lost_weights
from fulltune.train import checkpoints
from fulltune.train.hooks import Hooks
from fulltune.train.journal import NEXT, Journal, phase_of
from fulltune.train.parent import spawn as starting
from fulltune.train.parent.memory_fallbacks import Need
from fulltune.train.parent.next_attempt import Change, next_attempt, no_way_out, unknown
from fulltune.train.request import Request
from fulltune.train.worker import distributed

_log = logging.getLogger(__name__)
Event = dict[str, Any]
Listener = Callable[[Event], None]
_POLL_SECONDS = 0.1


def train(
    recipe: Recipe,
    plan: Plan,
    folder: Path,
    hooks: Hooks,
    listener: Listener,
    need: Need = unknown,
    start: starting.Starter = starting.in_new_process,
    dry_run: bool = True,
) -> Outcome:
    """Train one trial, in as many attempts as `next_attempt` allows.

    A changed plan takes the place of the old one in the run folder, so that a later command does not start with what
    ran out; its settings say what was planned first.

    Args:
        recipe: The checked recipe.
        plan: The trial's numbers.
        folder: The run folder, with prepared data.
        hooks: The user's functions; `compute_loss` makes it train in this process.
        listener: Called with each line of `metrics.jsonl` as it appears, and with `{"kind": "attempt", ...}`.
        need: The memory of a changed plan, by the plan stage's arithmetic.
        start: How a worker is started.
        dry_run: False when a trial with the same shapes has passed it: the first attempt leaves it out.

    Returns:
        The outcome of the last attempt, with status `done`.

    Raises:
        InterruptedRun: After Ctrl-C or SIGTERM; the same command continues.
        GuardStop: A guard stopped it, or the process died.
        DoesNotFitError: Memory or disk ran out and no remedy is left.
    """
    done = _outcomes(folder, plan.trial)
    model_folder = done[-1].model_folder if done and done[-1].status == "done" else None
    if model_folder is not None and lost_weights(folder / model_folder) is None:
        _tidy(folder, plan.trial)
        return done[-1]
    (folder / "scores" / f"{plan.trial}.json").unlink(missing_ok=True)  # of a model that is no longer there
    history: list[Outcome] = []
    tried: list[str] = []
    change = Change(plan, resume=True)
    while True:
        number = len(done) + len(history) + 1
        outcome = _attempt(recipe, change, folder, number, hooks, listener, start, dry_run or bool(history))
        history.append(outcome)
        if outcome.status == "done":
            _tidy(folder, plan.trial)
            return outcome
        following = None if hooks.needs_this_process else next_attempt(recipe, change.plan, history, need)
        if following is None:
            raise _error(recipe, change.plan, outcome, tried, folder)
        _keep(following, change.plan, outcome, folder)
        listener({"kind": "attempt", "reason": following.reason})
        tried.append(following.reason)
        change = following


def _keep(change: Change, before: Plan, outcome: Outcome, folder: Path) -> None:
    """Write down what is tried next and why, before it is tried."""
    Journal(_attempt_folder(outcome, folder) / "journal.jsonl").write(NEXT, change.reason)
    if change.plan == before:
        return
    change.plan.save(folder / change.plan.file)
    resolved = [setting.model_dump(mode="json") for setting in change.plan.settings]
    (folder / "resolved.json").write_text(json.dumps(resolved, indent=2) + "\n", encoding="utf-8")


def _attempt_folder(outcome: Outcome, folder: Path) -> Path:
    return folder / "attempts" / f"{outcome.trial}-{outcome.attempt:02d}"


def _tidy(folder: Path, trial: str) -> None:
    """Delete what only serves to continue; with optimizer state each checkpoint is three times the model.

    Only after the outcome was written: killed between the two, a run would have to train again. What trackers wrote
    beside the checkpoints stays.
    """
    checkpoints.drop_after(folder / "checkpoints" / trial, -1)
    with contextlib.suppress(OSError):  # not empty, or gone
        (folder / "checkpoints" / trial).rmdir()
    for attempt in (folder / "attempts").glob(f"{trial}-*"):
        (attempt / "initial.safetensors").unlink(missing_ok=True)


def _attempt(
    recipe: Recipe,
    change: Change,
    folder: Path,
    number: int,
    hooks: Hooks,
    listener: Listener,
    start: starting.Starter,
    dry_run: bool,
) -> Outcome:
    request = Request(
        run_folder=str(folder),
        recipe=recipe,
        plan=change.plan,
        attempt=number,
        checkpoint=None,
        parent_pid=None if hooks.needs_this_process else os.getpid(),
        dry_run=dry_run,
    )
    request.checkpoints.mkdir(parents=True, exist_ok=True)
    request.folder.mkdir(parents=True)
    if change.resume:
        found, passed_over = checkpoints.newest_sound(request.checkpoints)
        for line in passed_over:
            listener({"kind": "warning", "text": line})
        if found is not None:
            request = request.model_copy(update={"checkpoint": str(found)})
            listener({"kind": "resume", "step": checkpoints.step_of(found)})
    if request.checkpoint is None:
        checkpoints.drop_after(request.checkpoints, -1)
    request.save(request.folder / "request.json")
    listener({"kind": "phase", "name": "starting the training process"})
    if hooks.needs_this_process:
        from fulltune.train.worker import main as worker

        return worker.run(request, hooks, listener)
    return _in_child(request, listener, start)


def _in_child(request: Request, listener: Listener, start: starting.Starter = starting.in_new_process) -> Outcome:
    """Run the worker, pass its lines on, read its outcome."""
    log = request.folder / "log.txt"
    kills = kernel_kills()
    child = start(request, log)
    with _forwarding_signals(child) as asked:
        for event in _follow(request.folder / "metrics.jsonl", child):
            listener(event)
    code = child.wait()
    path = request.folder / "outcome.json"
    # `outcome-rankN.json` says why another process than the first one failed.
    found = [Outcome.load(file) for file in (path, *sorted(request.folder.glob("outcome-rank*.json"))) if file.exists()]
    tail = tuple(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
    # torchrun's last words when one of several processes was killed; the others only saw a closed connection.
    killed = code == -signal.SIGKILL or any("Signal 9 (SIGKILL)" in line for line in tail)
    outcome = next((outcome for outcome in found if outcome.status != "error"), None)
    limited = request.plan.memory_limit_bytes is not None or memory_is_limited()
    if outcome is None and found and not killed and not in_last_words(tail, limited):
        outcome = found[0]
    if outcome is not None:
        outcome.save(path)
        return outcome
    status: OutcomeStatus
    if asked:
        status, reason = "interrupted", "interrupted before the first step"
    elif killed and kernel_kills() > kills:
        status, reason = "out_of_memory", "the kernel killed the training process because memory ran out"
    elif in_last_words(tail, limited):
        status, reason = "out_of_memory", f"the training process ended with code {code}: {_last_words(tail)}"
    elif killed:
        status = "killed"
        reason = "the training process was killed (SIGKILL), most often because memory ran out"
    else:
        status, reason = "crashed", f"the training process ended with code {code} and left no outcome"
    outcome = Outcome(
        status=status,
        reason=reason,
        trial=request.plan.trial,
        attempt=request.attempt,
        phase=phase_of(request.folder),
        log_tail=tail if status == "crashed" else (),
    )
    outcome.save(path)
    return outcome


def _last_words(tail: Sequence[str]) -> str:
    return next((line.strip() for line in reversed(tail) if in_last_words([line], limited=True)), "")


@contextlib.contextmanager
def _forwarding_signals(child: distributed.Child) -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM ask the worker to save and stop; the third one ends it at once. Yields the signals seen."""
    asked: list[int] = []

    def forward(number: int, _: object) -> None:
        asked.append(number)
        if len(asked) < 3:
            distributed.ask_to_stop(child)
        else:
            distributed.end(child)

    try:
        before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: the caller keeps its own handlers
        before = {}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if child.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it ended just now
                os.killpg(child.pid, signal.SIGTERM)


def _follow(path: Path, child: distributed.Child) -> Iterator[Event]:
    """Lines of a growing file, until the child has ended and everything is read."""
    position = 0
    while True:
        ended = child.poll() is not None
        if path.exists():
            with path.open("rb") as file:
                file.seek(position)
                while (line := file.readline()).endswith(b"\n"):
                    position += len(line)
                    yield json.loads(line)
        if ended:
            return
        time.sleep(_POLL_SECONDS)


def _outcomes(folder: Path, trial: str) -> list[Outcome]:
    """Outcomes of the trial's earlier attempts; an attempt without one was killed together with its parent."""
    found = []
    numbered = {int(path.name.rpartition("-")[2]): path for path in (folder / "attempts").glob(f"{trial}-[0-9]*")}
    for number, attempt in sorted(numbered.items()):  # by number: 100 comes after 99
        path = attempt / "outcome.json"
        killed = Outcome(status="killed", reason="killed together with its parent", trial=trial, attempt=number)
        found.append(Outcome.load(path) if path.exists() else killed)
    return found


def _error(recipe: Recipe, plan: Plan, outcome: Outcome, tried: Sequence[str], folder: Path) -> FulltuneError:
    """The error that carries a failed outcome's exit code."""
    log = _attempt_folder(outcome, folder) / "log.txt"
    match outcome.status:
        case "interrupted":
            return InterruptedRun(f"{outcome.reason}; the same command continues it")
        case "out_of_memory":
            return DoesNotFitError(no_way_out(recipe, plan, outcome, tried))
        case "disk_full":
            return DoesNotFitError(
                f"{folder}: the disk is full: {outcome.reason}; free some space, then run the same command again"
            )
        case "diverged":
            return Diverged(outcome.reason)
        case "stopped_by_guard":
            return GuardStop(outcome.reason)
        case "does_not_fit":
            return DoesNotFitError(outcome.reason)
        case "refused":
            return SetupError(outcome.reason)
        case "killed" | "crashed":
            return GuardStop([f"{outcome.reason}; log: {log}", *outcome.log_tail])
        case _:
            return FulltuneError(f"{outcome.reason}; log: {log}")
