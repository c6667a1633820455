from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fulltune.errors import Diverged, DoesNotFitError, FulltuneError, GuardStop, InterruptedRun, RecipeError, SetupError
from fulltune.recipe.fields import Recipe
from fulltune.records.events import Listener, Message, PhaseBegan
from fulltune.records.plan import Plan
from fulltune.records.training import Outcome
from fulltune.system import parallel_layout
from fulltune.system.machines import missing_rank_message
from fulltune.system.run_folder import missing_weight_file, save_plan
from fulltune.train import checkpoints
from fulltune.train.hooks import Hooks
from fulltune.train.journal import NEXT_ATTEMPT_EVENT, Journal
from fulltune.train.parent import child
from fulltune.train.parent.next_attempt import (
    EstimateMemory,
    NextAttempt,
    killed_too_often_message,
    out_of_memory_messages,
    plan_next_attempt,
    plan_rollback,
)
from fulltune.train.parent.spawn import Starter, start_in_new_process
from fulltune.train.request import Request, attempt_folders, number_in


@dataclass(frozen=True)
class PlannedTrial:
    recipe: Recipe
    plan: Plan
    folder: Path
    hooks: Hooks
    listener: Listener
    estimate_memory: EstimateMemory = lambda plan: None


def train_in_attempts(
    trial: PlannedTrial, start: Starter = start_in_new_process, dry_run: bool = True, max_rollbacks: int | None = None
) -> Outcome:
    """Train a trial in as many attempts as allowed; return the final outcome or raise its error. With `dry_run` False,
    the first attempt skips the dry run. `max_rollbacks` defaults to the recipe's."""
    recipe, plan, folder, hooks, listener = trial.recipe, trial.plan, trial.folder, trial.hooks, trial.listener
    done = earlier_outcomes(folder, plan.trial)
    model_folder = done[-1].model_folder if done and done[-1].status == "done" else None
    if model_folder is not None and missing_weight_file(folder / model_folder) is None:
        _delete_resume_files(folder, plan)
        return done[-1]
    if recipe.train.num_machines > 1 and start is start_in_new_process:
        raise RecipeError(missing_rank_message(recipe))
    (folder / "scores" / f"{plan.trial}.json").unlink(missing_ok=True)  # scores of a lost model
    history, tried = list[Outcome](), list[str]()
    change = NextAttempt(plan, resume=True)
    allowed_rollbacks = recipe.train.max_rollbacks if max_rollbacks is None else max_rollbacks
    while True:
        request = Request(
            run_folder=str(folder),
            recipe=recipe,
            plan=change.plan,
            attempt=len(done) + len(history) + 1,
            checkpoint=None,
            parent_pid=None if hooks.needs_this_process else os.getpid(),
            dry_run=dry_run or bool(history),
        )
        request = _prepare_folders(request, change.resume, listener)
        if hooks.needs_this_process:
            from fulltune.train.worker import main as worker

            outcome = worker.run_attempt(request, hooks, listener)
        else:
            outcome = child.run_worker(request, listener, start)
        history.append(outcome)
        if outcome.status == "done":
            _delete_resume_files(folder, plan)
            return outcome
        healthy = checkpoints.newest_healthy_checkpoint(request.checkpoints, outcome.first_bad_step or 0)
        step = 0 if healthy is None else number_in(healthy)
        following = plan_rollback(change.plan, allowed_rollbacks, outcome, step)
        if following is not None:
            checkpoints.delete_checkpoints_after(request.checkpoints, step or -1)
        elif not hooks.needs_this_process:
            following = plan_next_attempt(recipe, change.plan, history, trial.estimate_memory)
        if following is None:
            raise _final_error(request, outcome, tried)
        Journal(request.folder / "journal.jsonl").write(NEXT_ATTEMPT_EVENT, following.reason)
        if following.plan != request.plan:
            save_plan(folder, recipe, following.plan)
        listener(Message(text=following.reason, level="next attempt"))
        tried.append(following.reason)
        if hooks.needs_this_process:
            gc.collect()  # frees the last attempt's trainer and model
        change = following


def _prepare_folders(request: Request, resume: bool, listener: Listener) -> Request:
    """Create the attempt's folders; return the request, if `resume` with the newest sound checkpoint."""
    request.checkpoints.mkdir(parents=True, exist_ok=True)
    sound, damaged = checkpoints.newest_undamaged_checkpoint(request.checkpoints) if resume else (None, [])
    if sound is not None and (problem := parallel_layout.why_resume_impossible(sound, request.recipe)):
        raise SetupError(problem)
    request.folder.mkdir(parents=True)
    if resume:
        for line in damaged:
            listener(Message(text=line, level="warning"))
        if sound is not None:
            request = request.model_copy(update={"checkpoint": str(sound)})
            text = f"continuing from the checkpoint of step {request.first_step}"
            listener(Message(text=text, level="resumed"))
    if request.checkpoint is None:
        checkpoints.delete_checkpoints_after(request.checkpoints, -1)
    request.save(request.folder / "request.json")
    listener(PhaseBegan(name="starting the training process"))
    return request


def _delete_resume_files(folder: Path, plan: Plan) -> None:
    """Delete files that only resuming needs, once the outcome is saved."""
    checkpoints.delete_checkpoints_after(folder / "checkpoints" / plan.trial, -1)
    with contextlib.suppress(OSError):  # not empty, or gone
        (folder / "checkpoints" / plan.trial).rmdir()
    if plan.stream is not None:
        checkpoints.delete_state(plan.state_folder(folder))
    for attempt in attempt_folders(folder, plan.trial):
        for file in attempt.glob("*.safetensors"):  # left by a killed process
            file.unlink()


def earlier_outcomes(folder: Path, trial: str) -> list[Outcome]:
    outcomes = []
    for attempt in attempt_folders(folder, trial):
        path, reason = attempt / "outcome.json", "killed together with its parent"
        killed = Outcome(status="killed", reason=reason, trial=trial, attempt=number_in(attempt))
        outcomes.append(Outcome.load(path) if path.exists() else killed)
    return outcomes


def _final_error(request: Request, outcome: Outcome, tried: Sequence[str]) -> FulltuneError:
    """Return the error that ends the command after its last attempt."""
    reason, log = outcome.reason, f"log: {request.folder / 'log.txt'}"
    match outcome.status:
        case "interrupted":
            return InterruptedRun(f"{reason}; run the same command to resume")
        case "lost":
            return InterruptedRun(f"{reason}; run the same command on all machines to resume")
        case "out_of_memory":
            return DoesNotFitError(out_of_memory_messages(request.recipe, request.plan, outcome, tried))
        case "disk_full":
            remedy = "free some space, then run the same command again"
            return DoesNotFitError(f"{request.run_folder}: the disk is full: {reason}; {remedy}")
        case "does_not_fit":
            return DoesNotFitError(reason)
        case "killed":
            return GuardStop(f"{killed_too_often_message(outcome)}; {log}")
        case "crashed" | "hung":
            return GuardStop([f"{reason}; {log}", *outcome.log_tail])
        case "stopped_by_guard":
            return GuardStop(reason)
        case "diverged" | "spiked":
            streamed = ["a streamed run keeps no earlier weights to return to"] if request.plan.stream else []
            return Diverged([reason, *streamed, *(f"tried: {change}" for change in tried)])
        case "refused":
            return SetupError(reason)
    return FulltuneError(f"{reason}; {log}")
