"""One attempt: model, dry-run step, training, the best weights saved, the outcome written.

Run by the parent as `python -m fulltune.train.worker request.json` in a process group of its own, or called in the
parent's process when the user gave functions of their own.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import resource
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fulltune.errors import FulltuneError, GuardStop, InterruptedRun, SetupError
from fulltune.inference import logits_of, run_rows
from fulltune.records import DataSummary, Moved, Outcome, OutcomeStatus
from fulltune.store import load_split
from fulltune.tasks import LossSettings, Target, Task, task_named
from fulltune.train import checkpoints
from fulltune.train.arguments import training_arguments
from fulltune.train.checks import before_training
from fulltune.train.guards import nothing_learned, stopped_improving
from fulltune.train.hooks import Hooks
from fulltune.train.request import Request

_OUT_OF_MEMORY = re.compile(r"DefaultCPUAllocator|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED")
_log = logging.getLogger(__name__)
Event = dict[str, Any]


class Journal:
    """Things that happen rarely, one JSON line each: `journal.jsonl`."""

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def write(self, event: str, detail: str) -> None:
        if self.path is None:  # not the first process
            return
        line = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "event": event, "detail": detail}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def run(request: Request, hooks: Hooks, listener: Callable[[Event], None] | None = None) -> Outcome:
    """Run an attempt and turn whatever happens into an outcome, which is also written to `outcome.json`."""
    with _signals_put_back():
        started = time.monotonic()
        rank = int(os.environ.get("RANK", "0"))
        journal = Journal(request.folder / "journal.jsonl" if rank == 0 else None)
        try:
            outcome = _train(request, hooks, journal, listener)
        except BaseException as error:
            status, reason = _classify(error)
            if status in ("error", "out_of_memory"):
                traceback.print_exc()
            if status == "disk_full":
                checkpoints.drop_unfinished(request.checkpoints)  # room for the outcome
            outcome = Outcome(status=status, reason=reason, trial=request.plan.trial, attempt=request.attempt)
        finally:
            if rank == 0:
                request.initial_weights.unlink(missing_ok=True)
        outcome = outcome.model_copy(
            update={"train_seconds": round(time.monotonic() - started, 3), "peak_memory_bytes": _peak_memory_bytes()}
        )
        journal.write(outcome.status, outcome.reason)
        if rank == 0:
            outcome.save(request.folder / "outcome.json")
        elif outcome.status != "done":
            # When one process fails the others only see a closed connection: the parent reads what really happened.
            outcome.save(request.folder / f"outcome-rank{rank}.json")
        return outcome


def _classify(error: BaseException) -> tuple[OutcomeStatus, str]:
    """What an exception means for the next attempt."""
    text = " ".join(str(error).split())
    kind = type(error).__name__
    if isinstance(error, GuardStop):
        return "stopped_by_guard", text
    if isinstance(error, (KeyboardInterrupt, InterruptedRun)):
        return "interrupted", text or "interrupted before the first checkpoint"
    if isinstance(error, MemoryError) or kind == "OutOfMemoryError" or _OUT_OF_MEMORY.search(text):
        return "out_of_memory", text[:500]
    no_space = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if no_space or "No space left" in text or "PytorchStreamWriter failed" in text:
        return "disk_full", text[:500]
    if isinstance(error, FulltuneError):
        return "refused", text
    return "error", f"{kind}: {text[:500]}"


def _train(request: Request, hooks: Hooks, journal: Journal, listener: Callable[[Event], None] | None) -> Outcome:
    # Imported here: a request that is refused earlier should not pay for them.
    import torch
    import transformers

    from fulltune.train.callbacks import Recorder, Schedule, Seals, StopWhenAsked
    from fulltune.train.trainer import FullTrainer

    plan, recipe = request.plan, request.recipe
    is_main = journal.path is not None
    recorder = Recorder(request.folder / "metrics.jsonl" if is_main else None, plan.total_steps, listener)
    stop = StopWhenAsked()
    _listen_for_signals(stop)
    recorder.phase("loading the model")
    transformers.logging.disable_progress_bar()
    transformers.set_seed(plan.seed)
    task = task_named(recipe.task)
    data_folder = Path(request.run_folder) / "data"
    summary = DataSummary.load(data_folder / "summary.json")
    target = Target.of(summary)
    model, tokenizer = load_for_training(recipe, task, target)
    rows, eval_rows = load_split(data_folder / "train"), load_split(data_folder / "eval")
    settings = LossSettings(recipe.train.label_smoothing_factor, hooks.weights_of(summary))

    def collate(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return task.collate(features, pad_token_id)

    def compute_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        summed = task.loss(logits_of(outputs), labels, target, settings)
        return summed / (num_items_in_batch if num_items_in_batch is not None else 1)

    pad_token_id = tokenizer.pad_token_id

    def score() -> dict[str, float]:
        kept = run_rows(
            model,
            eval_rows,
            task,
            target,
            pad_token_id,
            batch_size=plan.eval_batch_size,
            precision=plan.precision,
        )
        return task.metrics(kept, target)

    trainer = FullTrainer(
        model=model,
        args=training_arguments(recipe, plan, request.checkpoints),
        train_dataset=rows,
        eval_dataset=eval_rows,
        data_collator=collate,
        processing_class=tokenizer,
        compute_loss_func=hooks.compute_loss or compute_loss,
        lengths=list(rows["length"]),
        global_batch_size=plan.global_batch_size,
        group_by_length=plan.group_by_length,
        layerwise_lr_decay=plan.layerwise_lr_decay,
        score=score,
        count_items=task.count_items,
        callbacks=[
            recorder,
            Schedule(
                plan.metric,
                plan.greater_is_better,
                recipe.train.early_stopping_patience,
                recipe.train.early_stopping_threshold,
                lambda reason: journal.write("early stop", reason),
            ),
            Seals(request.checkpoints, recipe.train.save_total_limit),
            stop,
        ],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    recorder.tokens = lambda: float(trainer.tokens_seen)
    recorder.phase("checking, with one dry-run step at the longest length")
    checks = before_training(trainer, tokenizer, rows, summary, task, target, plan)
    recorder.write({"kind": "checks", "checks": [check.model_dump() for check in checks]})
    failed = [check for check in checks if not check.passed]
    if failed:
        raise GuardStop([f"{check.name}: {check.result}" for check in failed])
    initial = InitialWeights(model, request.initial_weights) if is_main else None
    if request.checkpoint is None or not _is_finished(Path(request.checkpoint), request):
        if request.checkpoint is not None:
            if is_main:
                checkpoints.drop_after(request.checkpoints, checkpoints.step_of(Path(request.checkpoint)))
            journal.write("resume", f"from {Path(request.checkpoint).name}")
        trainer.train(resume_from_checkpoint=request.checkpoint)
        if stop.asked:
            raise InterruptedRun(f"stopped on request after step {trainer.state.global_step}, which is saved")
        state = trainer.state
        optimizer = trainer.optimizer
    else:
        journal.write("resume", f"{Path(request.checkpoint).name} was the last one: nothing is left to train")
        state, optimizer = _load_finished(trainer, request.checkpoint)
    if initial is None:  # the first process saves and reports
        return Outcome(status="done", reason="", trial=plan.trial, attempt=request.attempt)
    moved = initial.moved(model, optimizer, trainer.tensors_with_gradient)
    verdict = nothing_learned(moved)
    if verdict.action == "stop":
        raise GuardStop(verdict.reason)
    best, best_metric = state.best_global_step, state.best_metric
    if not recipe.train.load_best_model_at_end:
        best, best_metric = None, None
    elif best is not None and best != state.global_step:
        problem = checkpoints.flaw(request.checkpoints / f"checkpoint-{best}")
        if problem is None:
            load_weights(model, request.checkpoints / f"checkpoint-{best}")
        else:
            warning = f"the best weights (step {best}) are lost ({problem}); the last ones are kept"
            journal.write("best weights lost", warning)
            recorder.write({"kind": "warning", "text": warning})
            best, best_metric = None, None
    recorder.phase("saving the model")
    save_model(model, tokenizer, request, summary)
    return Outcome(
        status="done",
        reason="early stopping" if state.global_step < plan.total_steps else "all steps done",
        trial=plan.trial,
        attempt=request.attempt,
        steps=state.global_step,
        best_step=best or state.global_step,
        best_metric=best_metric,
        moved=moved,
        checks=tuple(checks),
        tokens_per_second=round(recorder.tokens_per_second, 1),
        model_folder=str(request.model_folder.relative_to(request.run_folder)),
    )


def load_for_training(recipe: Any, task: Task, target: Target) -> tuple[Any, Any]:
    """The pretrained model with the task's head, every parameter trainable, and the tokenizer."""
    from fulltune import methods
    from fulltune.model import load, load_tokenizer

    tokenizer = load_tokenizer(recipe.model, chat_template=recipe.data.chat_template)
    model = load(recipe.model, task.AUTO_CLASS, task.config_changes(target, tokenizer), head_is_new=task.HEAD_IS_NEW)
    return methods.apply(model, recipe.method), tokenizer


class InitialWeights:
    """The weights before step 1, on disk: a copy in memory would cost as much as the model."""

    def __init__(self, model: Any, path: Path) -> None:
        from safetensors.torch import save_file

        self.path = path
        save_file({name: parameter.detach().cpu().contiguous() for name, parameter in model.named_parameters()}, path)

    def moved(self, model: Any, optimizer: Any, with_gradient: frozenset[str]) -> Moved:
        """Compare with the present weights.

        A value counts as having received a gradient when AdamW's second moment is positive, so that embedding rows of
        unused tokens are left out; with optimizers that have none, all values of a tensor with a gradient count.
        """
        from safetensors import safe_open

        optimizer = getattr(optimizer, "optimizer", optimizer)
        tensors = moved_tensors = values = moved_values = 0
        unmoved = []
        with safe_open(self.path, framework="pt") as before:
            for name, parameter in model.named_parameters():
                second = optimizer.state.get(parameter, {}).get("exp_avg_sq") if optimizer is not None else None
                if second is None and name not in with_gradient:
                    continue
                changed = parameter.detach().cpu() != before.get_tensor(name)
                touched = changed.new_ones(changed.shape) if second is None else second.cpu() > 0
                count = int((changed & touched).sum())
                if not touched.any():
                    continue
                tensors += 1
                values += int(touched.sum())
                moved_values += count
                moved_tensors += count > 0
                if not count:
                    unmoved.append(name)
        return Moved(
            num_tensors_with_gradient=tensors,
            num_tensors_moved=moved_tensors,
            num_values_with_gradient=values,
            num_values_moved=moved_values,
            unmoved_tensors=tuple(unmoved[:20]),
        )

    def delete(self) -> None:
        self.path.unlink(missing_ok=True)


def load_weights(model: Any, checkpoint: Path) -> None:
    """Put a checkpoint's weights into the model."""
    from safetensors.torch import load_file

    for shard in sorted(checkpoint.glob("model*.safetensors")):
        result = model.load_state_dict(load_file(shard), strict=False)
        # Names may be missing (tied weights are saved once, shards hold a part each); an unknown one may not appear.
        if result.unexpected_keys:
            raise SetupError(
                f"{shard}: holds tensors that the model does not know, such as {result.unexpected_keys[0]}"
            )
    model.tie_weights()


def save_model(model: Any, tokenizer: Any, request: Request, summary: DataSummary) -> None:
    """Write a plain Hugging Face folder; an older one is replaced only when the new one is whole."""
    folder = request.model_folder
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    notes = {
        "task": summary.task,
        "problem_type": summary.problem_type,
        "columns": summary.columns,
        "labels": list(summary.labels),
        "joint": summary.joint,
        "max_length": summary.max_length,
    }
    (part / "fulltune.json").write_text(json.dumps(notes, indent=2) + "\n", encoding="utf-8")
    if folder.exists():
        shutil.rmtree(folder)
    part.rename(folder)


def _is_finished(checkpoint: Path, request: Request) -> bool:
    """True when the run that wrote this checkpoint had no step left, or had stopped early."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    plan, train = request.plan, request.recipe.train
    if state["global_step"] >= plan.total_steps:
        return True
    values = [entry[f"eval_{plan.metric}"] for entry in state["log_history"] if f"eval_{plan.metric}" in entry]
    return train.early_stopping_patience is not None and stopped_improving(
        values, plan.greater_is_better, train.early_stopping_patience, train.early_stopping_threshold
    )


def _load_finished(trainer: Any, checkpoint: str) -> tuple[Any, Any]:
    """Weights, state and optimizer of a checkpoint after which nothing is left to train."""
    import torch
    from transformers import TrainerState

    load_weights(trainer.model, Path(checkpoint))
    optimizer = trainer.create_optimizer()
    optimizer.load_state_dict(torch.load(Path(checkpoint) / "optimizer.pt", weights_only=True, map_location="cpu"))
    # Which tensors received a gradient was seen by the attempt before; only optimizers without second moments ask.
    trainer.tensors_with_gradient = frozenset(name for name, _ in trainer.model.named_parameters())
    return TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json")), optimizer


def _listen_for_signals(stop: Any) -> None:
    """The first SIGTERM or SIGINT asks for a stop after this step."""
    if threading.current_thread() is not threading.main_thread():
        return

    def ask(*_: object) -> None:
        stop.asked = True

    signal.signal(signal.SIGTERM, ask)
    signal.signal(signal.SIGINT, ask)


@contextlib.contextmanager
def _signals_put_back() -> Iterator[None]:
    """In the user's own process Ctrl-C must work again after training."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)


def _end_with_parent(parent_pid: int) -> None:
    """A worker whose parent was killed must not go on training unseen."""

    def watch() -> None:
        while True:
            time.sleep(1)
            try:
                os.kill(parent_pid, 0)
            except ProcessLookupError:
                os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _peak_memory_bytes() -> int:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return int(torch.cuda.max_memory_reserved())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def main() -> int:
    """Entry of the child process."""
    request = Request.load(Path(sys.argv[1]))
    if request.parent_pid is not None:
        _end_with_parent(request.parent_pid)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    outcome = run(request, Hooks())
    return 0 if outcome.status == "done" else 1


if __name__ == "__main__":
    sys.exit(main())
