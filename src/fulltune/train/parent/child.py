from __future__ import annotations

import contextlib
import math
import os
import signal
import time
from collections.abc import Iterator, Sequence

from fulltune.files import parse_json_line
from fulltune.records.events import Listener, Message, parse_event
from fulltune.records.training import LostMachine, Outcome, OutcomeStatus
from fulltune.system import signals
from fulltune.system.memory import count_oom_kills, log_shows_out_of_memory, memory_is_limited
from fulltune.text import parse_seconds
from fulltune.train.checkpoints import last_saved_step
from fulltune.train.journal import HEARTBEAT_FILE, read_completed_steps, read_phase
from fulltune.train.parent import spawn
from fulltune.train.request import Request

_POLL_SECONDS = 0.1


def run_worker(request: Request, listener: Listener, start: spawn.Starter = spawn.start_in_new_process) -> Outcome:
    """Run an attempt's worker, forward its events, save its outcome and return it."""
    kills, began = count_oom_kills(), time.monotonic()
    child = start(request, request.folder / "log.txt")
    with forwarding_signals(child) as stop_signals:
        hangs = _follow_worker(request, child, listener, stop_signals)
    code, by_kernel = child.wait(), count_oom_kills() > kills
    if hangs and not stop_signals and not _saved_outcomes(request):
        where = {"evaluation": " in an evaluation", "saving": " while saving"}.get(read_phase(request.folder) or "", "")
        step, seconds = read_completed_steps(request.folder), round(time.monotonic() - began, 1)
        limit = f"{request.recipe.train.hang_timeout} (train.hang_timeout)"
        reason = f"the training process sent no heartbeat for {limit} after step {step:,}{where}, and was killed"
        outcome = _outcome_without_file(request, "hung", reason).model_copy(
            update={"steps": step, "train_seconds": seconds}
        )
    else:
        lost: Sequence[LostMachine] = getattr(child, "lost", ())  # of several machines
        outcome = _determine_outcome(request, code, bool(stop_signals), by_kernel, lost)
    outcome.save(request.folder / "outcome.json")
    return outcome


def _outcome_without_file(request: Request, status: OutcomeStatus, reason: str) -> Outcome:
    """Create the outcome of a worker that could not write its own."""
    return Outcome(
        status=status,
        reason=reason,
        trial=request.plan.trial,
        attempt=request.attempt,
        phase=read_phase(request.folder),
        log_tail=tuple(_last_log_lines(request)) if status in ("crashed", "hung") else (),
    )


def _saved_outcomes(request: Request) -> list[Outcome]:
    """Load the outcomes that ranks saved. Ranks other than 0 save one only if they fail."""
    files = (request.folder / "outcome.json", *sorted(request.folder.glob("outcome-rank*.json")))
    return [Outcome.load(file) for file in files if file.exists()]


def _last_log_lines(request: Request) -> list[str]:
    logs = (request.folder / "log.txt", *sorted(request.folder.glob("log-machine*.txt")))
    return [line for log in logs for line in log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]]


def _determine_outcome(
    request: Request,
    code: int,
    is_stop_requested: bool = False,
    killed_by_kernel: bool = False,
    lost: Sequence[LostMachine] = (),
) -> Outcome:
    """Return a saved outcome, or derive one from the exit code, the log and lost machines."""
    written = _saved_outcomes(request)
    tail = _last_log_lines(request)
    # torchrun logs the signal if one of several ranks was killed; the others only saw a closed connection.
    killed = code == -signal.SIGKILL or any("Signal 9 (SIGKILL)" in line for line in tail)
    limited = request.plan.memory_limit_bytes is not None or memory_is_limited()
    about_memory = [line.strip() for line in tail if log_shows_out_of_memory([line], limited)]
    outcome = next((other for other in written if other.status != "error"), None)
    if outcome is None and written and not killed and not about_memory:
        outcome = written[0]
    lost = sorted(lost, key=lambda machine: _LOST.index(machine.kind))
    is_stop_requested = is_stop_requested or any(machine.kind == "interrupted" for machine in lost)
    if outcome is not None and outcome.status == "interrupted" and lost and not is_stop_requested:
        # A torchrun that loses the others sends SIGTERM, at which its ranks save and stop.
        why = "torchrun ended on one machine and stopped the others"
        reason = f"{why} after step {outcome.steps:,}, which is saved"
        return outcome.model_copy(update={"status": "lost", "reason": reason})
    if outcome is not None and outcome.status not in ("error", "refused"):
        return outcome
    if lost and not is_stop_requested and lost[0].kind != "failed":
        return _outcome_without_file(request, *_explain_lost_machine(lost[0]))
    if outcome is not None and not (is_stop_requested and lost):
        return outcome
    if is_stop_requested:
        done, saved = read_completed_steps(request.folder), last_saved_step(request.checkpoints)
        checkpoint = f"; step {saved:,} is saved" if saved else "; there is no checkpoint yet"
        when = f"after step {done:,}{checkpoint}" if done else f"before step {saved + 1:,}{checkpoint if saved else ''}"
        return _outcome_without_file(request, "interrupted", f"interrupted {when}")
    if killed and killed_by_kernel:
        reason = "the kernel killed the training process because memory ran out"
        return _outcome_without_file(request, "out_of_memory", reason)
    if about_memory:
        reason = f"the training process ended with code {code}: {about_memory[-1]}"
        return _outcome_without_file(request, "out_of_memory", reason)
    if killed:
        return _outcome_without_file(request, "killed", "the training process was killed (SIGKILL)")
    elsewhere = "".join(f"; machine {machine.rank} ({machine.host}): {machine.reason}" for machine in lost)
    reason = f"the training process ended with code {code} and wrote no outcome{elsewhere}"
    return _outcome_without_file(request, "crashed", reason)


_LOST = ("machine", "out_of_memory", "killed", "interrupted", "failed")
"""Reasons for losing a machine; earlier ones can cause later ones."""


def _explain_lost_machine(machine: LostMachine) -> tuple[OutcomeStatus, str]:
    name = f"machine {machine.rank} ({machine.host})"
    meanings: dict[str, tuple[OutcomeStatus, str]] = {
        "out_of_memory": ("out_of_memory", f"the kernel killed a training process on {name} because memory ran out"),
        "killed": ("killed", f"the training processes on {name} were killed (SIGKILL)"),
    }
    return meanings.get(machine.kind, ("lost", f"{name} was lost: it {machine.reason}"))


@contextlib.contextmanager
def forwarding_signals(child: spawn.WorkerProcess) -> Iterator[list[int]]:
    """Forward stop signals to the worker, kill it at the third, and yield the list of received signals."""
    received: list[int] = []

    def forward_or_kill(signal_number: int, _: object) -> None:
        received.append(signal_number)
        if len(received) < 3:
            spawn.ask_workers_to_stop(child)
        else:
            spawn.kill_workers(child)

    with signals.temporary_handlers(forward_or_kill):
        try:
            yield received
        finally:
            if child.poll() is None:
                with contextlib.suppress(ProcessLookupError):  # it ended just now
                    os.killpg(child.pid, signal.SIGTERM)


def _follow_worker(
    request: Request, child: spawn.WorkerProcess, listener: Listener, stop_signals: Sequence[int]
) -> bool:
    """Forward events until the worker ends; return True if it was killed because its heartbeat stopped."""
    path, position, answered = request.folder / "metrics.jsonl", 0, False
    heartbeat, last_beat, since = request.folder / HEARTBEAT_FILE, 0, time.monotonic()
    timeout = request.recipe.train.hang_timeout
    limit = math.inf if timeout is None else parse_seconds(timeout)
    while True:
        if stop_signals and not answered:
            answered = True
            when = "before its first step, as soon as the model is loaded and checked"
            if read_completed_steps(request.folder) or request.plan.num_processes > 1:  # ranks agree after a step
                when = "after the current step, which is saved"
            third = "a second signal has no effect, but a third one kills the run without saving"
            listener(Message(text=f"stop requested: training ends {when}; {third}", level="warning"))
        ended = child.poll() is not None
        if path.exists():
            with path.open("rb") as file:
                file.seek(position)
                while (line := file.readline()).endswith(b"\n"):
                    position += len(line)
                    if (event := parse_event(parse_json_line(line) or {})) is not None:
                        listener(event)
        if ended:
            return False
        beat = 0
        with contextlib.suppress(FileNotFoundError):  # the worker removes it as it ends
            beat = heartbeat.stat().st_mtime_ns
        if beat != last_beat:
            last_beat, since = beat, time.monotonic()
        if last_beat and time.monotonic() - since > limit:
            spawn.kill_workers(child)
            return True
        time.sleep(_POLL_SECONDS)
