"""One attempt in a process of its own: its lines are passed on, and what it leaves is judged."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from fulltune.records.events import Event, Listener, event_of
from fulltune.records.training import Outcome, OutcomeStatus
from fulltune.system.out_of_memory import in_last_words, kernel_kills, memory_is_limited
from fulltune.train.journal import phase_of
from fulltune.train.parent import spawn
from fulltune.train.request import Request

_POLL_SECONDS = 0.1


def run(request: Request, listener: Listener, start: spawn.Starter = spawn.in_new_process) -> Outcome:
    """Start the worker, pass its lines on, and tell how it ended, whether it could write that down or not.

    Args:
        request: The attempt; its folder exists.
        listener: Called with each line of `metrics.jsonl` as it appears.
        start: How the worker is started.
    """
    kills = kernel_kills()
    child = start(request, request.folder / "log.txt")
    with _forwarding_signals(child) as asked:
        for event in _follow(request.folder / "metrics.jsonl", child):
            listener(event)
    outcome = _outcome(request, child.wait(), asked=bool(asked), killed_by_kernel=kernel_kills() > kills)
    outcome.save(request.folder / "outcome.json")
    return outcome


def _outcome(request: Request, code: int, *, asked: bool, killed_by_kernel: bool) -> Outcome:
    """What the worker wrote, or what its exit code and its last words say."""
    # `outcome-rankN.json` says why another process than the first one failed.
    files = (request.folder / "outcome.json", *sorted(request.folder.glob("outcome-rank*.json")))
    written = [Outcome.load(file) for file in files if file.exists()]
    tail = (request.folder / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
    # torchrun's last words when one of several processes was killed; the others only saw a closed connection.
    killed = code == -signal.SIGKILL or any("Signal 9 (SIGKILL)" in line for line in tail)
    limited = request.plan.memory_limit_bytes is not None or memory_is_limited()
    about_memory = [line.strip() for line in tail if in_last_words([line], limited)]
    told = next((outcome for outcome in written if outcome.status != "error"), None)
    if told is None and written and not killed and not about_memory:
        told = written[0]
    if told is not None:
        return told
    status: OutcomeStatus
    if asked:
        status, reason = "interrupted", "interrupted before the first step"
    elif killed and killed_by_kernel:
        status, reason = "out_of_memory", "the kernel killed the training process because memory ran out"
    elif about_memory:
        status, reason = "out_of_memory", f"the training process ended with code {code}: {about_memory[-1]}"
    elif killed:
        status, reason = "killed", "the training process was killed (SIGKILL), most often because memory ran out"
    else:
        status, reason = "crashed", f"the training process ended with code {code} and left no outcome"
    return Outcome(
        status=status,
        reason=reason,
        trial=request.plan.trial,
        attempt=request.attempt,
        phase=phase_of(request.folder),
        log_tail=tuple(tail) if status == "crashed" else (),
    )


@contextlib.contextmanager
def _forwarding_signals(child: spawn.Child) -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM ask the worker to save and stop; the third one ends it at once. Yields the signals seen."""
    asked: list[int] = []

    def forward(number: int, _: object) -> None:
        asked.append(number)
        if len(asked) < 3:
            spawn.ask_to_stop(child)
        else:
            spawn.end(child)

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


def _follow(path: Path, child: spawn.Child) -> Iterator[Event]:
    """Lines of a growing file, until the child has ended and everything is read."""
    position = 0
    while True:
        ended = child.poll() is not None
        if path.exists():
            with path.open("rb") as file:
                file.seek(position)
                while (line := file.readline()).endswith(b"\n"):
                    position += len(line)
                    if (event := event_of(json.loads(line))) is not None:
                        yield event
        if ended:
            return
        time.sleep(_POLL_SECONDS)
