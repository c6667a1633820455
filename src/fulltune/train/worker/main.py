from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
import traceback
from pathlib import Path

import psutil

from fulltune.errors import Diverged, DoesNotFitError, FulltuneError, GuardStop, InterruptedRun, Spiked
from fulltune.records.data import DataSummary
from fulltune.records.events import Listener
from fulltune.records.training import Outcome, OutcomeStatus
from fulltune.system import signals
from fulltune.system.hardware import is_disk_full
from fulltune.system.memory import is_out_of_memory, process_peak_bytes
from fulltune.train import checkpoints
from fulltune.train.hooks import Hooks
from fulltune.train.journal import Journal, read_completed_steps
from fulltune.train.request import Request
from fulltune.train.usage import ResourceUsage, memory_limit

_MEANINGS: dict[type[BaseException], OutcomeStatus] = {
    Spiked: "spiked",
    Diverged: "diverged",
    GuardStop: "stopped_by_guard",
    KeyboardInterrupt: "interrupted",
    InterruptedRun: "interrupted",
    DoesNotFitError: "does_not_fit",
    FulltuneError: "refused",
}


def run_attempt(request: Request, hooks: Hooks, listener: Listener | None = None) -> Outcome:
    """Run an attempt and return its outcome even if it fails. Rank 0 also writes `outcome.json`."""
    with contextlib.ExitStack() as cleanup:  # in the user's own process Ctrl-C must work again after training
        started = time.monotonic()
        rank = int(os.environ.get("RANK", "0"))
        path = request.folder / "journal.jsonl" if rank == 0 else None
        journal = Journal(path)
        usage = ResourceUsage()
        try:
            hooks = hooks.with_named(request.recipe)
            # Imported here, so that an error while torch and transformers load becomes an outcome as well.
            from fulltune.train.loop.callbacks import Recorder, StopOnRequest
            from fulltune.train.loop.inputs import AttemptInputs
            from fulltune.train.worker import attempt

            stop = StopOnRequest()

            def ask_to_stop(*_: object) -> None:
                stop.is_requested = True

            cleanup.enter_context(signals.temporary_handlers(ask_to_stop))
            limit, device = request.plan.memory_limit_bytes, request.plan.device
            with memory_limit(limit, device, lambda line: journal.write("warning", line)):
                recorder = Recorder(None if path is None else request.folder / "metrics.jsonl", listener)
                summary = DataSummary.of_run(Path(request.run_folder))
                inputs = AttemptInputs(request, hooks, journal, recorder, stop, usage, summary)
                with inputs.cleanup:
                    ended = {"status": "done", "reason": "", **attempt.train_attempt(inputs)}
        except BaseException as error:
            status, reason = outcome_of_error(error, request.folder)
            if status in ("error", "out_of_memory"):
                with contextlib.suppress(OSError):  # the disk of the log may be full
                    traceback.print_exc()
            if status == "disk_full":
                checkpoints.delete_unfinished_checkpoints(request.checkpoints)  # room for the outcome
            since = error.since if isinstance(error, Spiked) else None
            steps = read_completed_steps(request.folder)
            ended = {
                "status": status,
                "reason": reason,
                "phase": journal.phase,
                "first_bad_step": since,
                "steps": steps,
            }
        finally:
            request.initial_weights(rank).unlink(missing_ok=True)
            request.trained_weights(rank).unlink(missing_ok=True)
        measured = {"peak_memory_bytes": process_peak_bytes(), **usage.as_outcome_fields()}
        seconds = round(time.monotonic() - started, 3)
        outcome = Outcome(trial=request.plan.trial, attempt=request.attempt, train_seconds=seconds, **ended, **measured)
        journal.write(outcome.status, outcome.reason)
        if rank == 0:
            outcome.save(request.folder / "outcome.json")
        elif outcome.status != "done":
            # If one rank fails, the others only see a closed connection: the parent reads the cause.
            outcome.save(request.folder / f"outcome-rank{rank}.json")
        return outcome


def outcome_of_error(error: BaseException, folder: Path) -> tuple[OutcomeStatus, str]:
    """Return the status and reason for the error that ended the attempt in `folder`."""
    if failures := getattr(error, "failures", None):  # torch's `CheckpointException`, with each rank's error
        return outcome_of_error(next(iter(failures.values()))[0], folder)
    text = " ".join(str(error).split())
    name = type(error).__name__
    if is_out_of_memory(error):
        return "out_of_memory", text[:500] or name
    if is_disk_full(error, folder):
        return "disk_full", text[:500]
    for kind, status in _MEANINGS.items():
        if isinstance(error, kind):
            return status, text or ("interrupted before the first checkpoint" if status == "interrupted" else name)
    return "error", f"{name}: {text[:500]}"


def _exit_with_parent(parent_pid: int) -> None:
    """Start a thread that ends this process with its parent, because an orphan would train beside the next attempt."""
    started_by = os.getppid()

    def exit_when_orphaned() -> None:
        while os.getppid() == started_by and psutil.pid_exists(parent_pid):
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=exit_when_orphaned, daemon=True).start()


def main(file: str, parent: str | None = None) -> int:
    """Run the request in `file`, but exit if process `parent` (default: the request's) ends. Return 0 if training is
    done, else 1."""
    request = Request.load(Path(file))
    parent_pid = request.parent_pid if parent is None else int(parent)
    if parent_pid is not None:
        _exit_with_parent(parent_pid)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    outcome = run_attempt(request, Hooks())
    return 0 if outcome.status == "done" else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
