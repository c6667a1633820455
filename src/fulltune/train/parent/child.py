"""One attempt in a process of its own: its lines are passed on, and what it leaves is judged."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import time
from collections.abc import Iterator, Sequence

from fulltune.files import entry_of
from fulltune.records.events import Listener, Message, event_of
from fulltune.records.training import LostMachine, Outcome, OutcomeStatus
from fulltune.system import signals
from fulltune.system.memory import in_last_words, kernel_kills, memory_is_limited
from fulltune.text import parse_seconds
from fulltune.train.checkpoints import last_saved
from fulltune.train.journal import HEARTBEAT, phase_of, steps_of
from fulltune.train.parent import spawn
from fulltune.train.request import Request

_POLL_SECONDS = 0.1


def run(request: Request, listener: Listener, start: spawn.Starter = spawn.in_new_process) -> Outcome:
    """Start an attempt's worker, pass its events on, and tell how it ended, whether it could write that down or not."""
    kills, began = kernel_kills(), time.monotonic()
    child = start(request, request.folder / "log.txt")
    with forwarding_signals(child) as asked:
        hangs = _follow(request, child, listener, asked)
    code, by_kernel = child.wait(), kernel_kills() > kills
    if hangs and not asked and not _written(request):
        where = {"evaluation": " in an evaluation", "saving": " while saving"}.get(phase_of(request.folder) or "", "")
        step, seconds = steps_of(request.folder), round(time.monotonic() - began, 1)
        limit = f"{request.recipe.train.hang_timeout} (train.hang_timeout)"
        reason = f"the training process gave no sign of life for {limit} after step {step:,}{where}, and was ended"
        outcome = _without_words(request, "hung", reason).model_copy(update={"steps": step, "train_seconds": seconds})
    else:
        lost: Sequence[LostMachine] = getattr(child, "lost", ())  # of several machines
        outcome = _outcome(request, code, bool(asked), by_kernel, lost)
    outcome.save(request.folder / "outcome.json")
    return outcome


def _without_words(request: Request, status: OutcomeStatus, reason: str) -> Outcome:
    """The outcome of a process that could not write one."""
    return Outcome(
        status=status,
        reason=reason,
        trial=request.plan.trial,
        attempt=request.attempt,
        phase=phase_of(request.folder),
        log_tail=tuple(_tail(request)) if status in ("crashed", "hung") else (),
    )


def _written(request: Request) -> list[Outcome]:
    """What the processes wrote; `outcome-rankN.json` says why another one than the first failed."""
    files = (request.folder / "outcome.json", *sorted(request.folder.glob("outcome-rank*.json")))
    return [Outcome.load(file) for file in files if file.exists()]


def _tail(request: Request) -> list[str]:
    """The last lines of the log; of several machines each has one."""
    logs = (request.folder / "log.txt", *sorted(request.folder.glob("log-machine*.txt")))
    return [line for log in logs for line in log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]]


def _outcome(
    request: Request,
    code: int,
    asked: bool = False,
    killed_by_kernel: bool = False,
    lost: Sequence[LostMachine] = (),
) -> Outcome:
    """What the worker wrote, or what its exit code and its last words say."""
    written = _written(request)
    tail = _tail(request)
    # torchrun's last words when one of several processes was killed; the others only saw a closed connection.
    killed = code == -signal.SIGKILL or any("Signal 9 (SIGKILL)" in line for line in tail)
    limited = request.plan.memory_limit_bytes is not None or memory_is_limited()
    about_memory = [line.strip() for line in tail if in_last_words([line], limited)]
    told = next((outcome for outcome in written if outcome.status != "error"), None)
    if told is None and written and not killed and not about_memory:
        told = written[0]
    lost = sorted(lost, key=lambda one: _LOST.index(one.kind))
    asked = asked or any(one.kind == "interrupted" for one in lost)
    if told is not None and told.status == "interrupted" and lost and not asked:
        # A torchrun that loses the others ends its processes by SIGTERM, which for them is a request to save and stop.
        why = "torchrun ended on a machine, and stopped the processes of all"
        return told.model_copy(update={"status": "lost", "reason": f"{why} after step {told.steps:,}, which is saved"})
    if told is not None and told.status not in ("error", "refused"):
        return told
    if lost and not asked and lost[0].kind != "failed":
        return _without_words(request, *_of_lost(lost[0]))
    if told is not None and not (asked and lost):
        return told
    if asked:
        done, saved = steps_of(request.folder), last_saved(request.checkpoints)
        kept = f"; step {saved:,} is saved" if saved else "; there is no checkpoint yet"
        when = f"after step {done:,}{kept}" if done else f"before step {saved + 1:,}{kept if saved else ''}"
        return _without_words(request, "interrupted", f"interrupted {when}")
    if killed and killed_by_kernel:
        reason = "the kernel killed the training process because memory ran out"
        return _without_words(request, "out_of_memory", reason)
    if about_memory:
        reason = f"the training process ended with code {code}: {about_memory[-1]}"
        return _without_words(request, "out_of_memory", reason)
    if killed:
        return _without_words(request, "killed", "the training process was killed (SIGKILL)")
    elsewhere = "".join(f"; machine {one.rank} ({one.host}): {one.reason}" for one in lost)
    reason = f"the training process ended with code {code} and left no outcome{elsewhere}"
    return _without_words(request, "crashed", reason)


_LOST = ("machine", "out_of_memory", "killed", "interrupted", "failed")
"""What explains the others comes first."""


def _of_lost(part: LostMachine) -> tuple[OutcomeStatus, str]:
    """What it means that a machine's part ended without a word."""
    name = f"machine {part.rank} ({part.host})"
    meanings: dict[str, tuple[OutcomeStatus, str]] = {
        "out_of_memory": ("out_of_memory", f"the kernel killed a training process of {name} because memory ran out"),
        "killed": ("killed", f"the training processes of {name} were killed (SIGKILL)"),
    }
    return meanings.get(part.kind, ("lost", f"{name} was lost: it {part.reason}"))


@contextlib.contextmanager
def forwarding_signals(child: spawn.Child) -> Iterator[list[int]]:
    """Signals ask the worker to save and stop; the third one ends it at once. Yields the signals seen."""
    asked: list[int] = []

    def forward(number: int, _: object) -> None:
        asked.append(number)
        if len(asked) < 3:
            spawn.ask_to_stop(child)
        else:
            spawn.end(child)

    with signals.answered(forward):
        try:
            yield asked
        finally:
            if child.poll() is None:
                with contextlib.suppress(ProcessLookupError):  # it ended just now
                    os.killpg(child.pid, signal.SIGTERM)


def _follow(request: Request, child: spawn.Child, listener: Listener, asked: Sequence[int]) -> bool:
    """Pass on the events of a growing `metrics.jsonl` until the child has ended and all is read; True: it was ended,
    because its heartbeat, once there was one, had stopped by a clock that stands still while the machine sleeps."""
    path, position, answered = request.folder / "metrics.jsonl", 0, False
    beat, seen, since = request.folder / HEARTBEAT, 0, time.monotonic()
    timeout = request.recipe.train.hang_timeout
    limit = math.inf if timeout is None else parse_seconds(timeout)
    while True:
        if asked and not answered:
            answered = True
            when = "before its first step, as soon as the model is loaded and checked"
            if steps_of(request.folder) or request.plan.num_processes > 1:  # several agree at the end of a step
                when = "after the step at hand, which it saves"
            third = "a second signal changes nothing, a third ends it at once, without saving"
            listener(Message(text=f"asked to stop: the training ends {when}; {third}", level="warning"))
        ended = child.poll() is not None
        if path.exists():
            with path.open("rb") as file:
                file.seek(position)
                while (line := file.readline()).endswith(b"\n"):
                    position += len(line)
                    if (event := event_of(entry_of(line) or {})) is not None:
                        listener(event)
        if ended:
            return False
        written = beat.stat().st_mtime_ns if beat.exists() else 0
        if written != seen:
            seen, since = written, time.monotonic()
        if seen and time.monotonic() - since > limit:
            spawn.end(child)
            return True
        time.sleep(_POLL_SECONDS)
