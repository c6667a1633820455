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
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fulltune import zero
from fulltune.errors import FulltuneError, GuardStop, InterruptedRun
from fulltune.inference import logits_of, model_batch, run_rows
from fulltune.records import Check, DataSummary, Outcome, OutcomeStatus
from fulltune.store import load_split
from fulltune.tasks import LossSettings, Target, Task, task_named
from fulltune.train import checkpoints, distributed, extensions, weights
from fulltune.train.arguments import training_arguments
from fulltune.train.checks import before_training, dry_run_in_engine
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

    from fulltune.model import opened
    from fulltune.train import dropout
    from fulltune.train.callbacks import AtBegin, Recorder, Schedule, Seals, StopWhenAsked
    from fulltune.train.trainer import FullTrainer

    plan, recipe = request.plan, request.recipe
    is_main = journal.path is not None
    recorder = Recorder(request.folder / "metrics.jsonl" if is_main else None, plan.total_steps, listener)
    stop = StopWhenAsked()
    _listen_for_signals(stop)
    recorder.phase("loading the model")
    transformers.logging.disable_progress_bar()
    sharing = zero.zero_of(recipe)
    if sharing is not None and is_main:
        extensions.build(plan.device == "cpu", sharing.offload_optimizer, recorder.phase, journal.write)
    # Before the model: with DeepSpeed's stage 3 its weights are shared out while they are read.
    arguments = training_arguments(recipe, plan, request.checkpoints)
    if sharing is not None:
        distributed.start_deepspeed(arguments)
    transformers.set_seed(plan.seed)
    task = task_named(recipe.task)
    data_folder = Path(request.run_folder) / "data"
    summary = DataSummary.load(data_folder / "summary.json")
    target = Target.of(summary)
    model, tokenizer = load_for_training(recipe, task, target)
    if plan.device == "cpu":
        dropout.install(model)
    rows, eval_rows = (opened(load_split(data_folder / split), tokenizer) for split in ("train", "eval"))
    settings = LossSettings(recipe.train.label_smoothing_factor, hooks.weights_of(summary))

    def collate(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return model_batch(model, task, features, pad_token_id)

    def compute_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        summed = task.loss(logits_of(outputs), labels, target, settings)
        return summed / (num_items_in_batch if num_items_in_batch is not None else 1)

    pad_token_id = tokenizer.pad_token_id

    def score() -> dict[str, float]:
        size, several = plan.eval_batch_size, arguments.world_size > 1
        mine, count = eval_rows, len(eval_rows)
        if several:
            mine, count = distributed.my_share(eval_rows, size, arguments.process_index, arguments.world_size)
        # Weights that are shared out are put together by DeepSpeed's engine.
        used: Any = trainer.model_wrapped if trainer.is_deepspeed_enabled else model
        kept = run_rows(
            used, mine, task, target, pad_token_id, batch_size=size, precision=plan.precision, head=trainer.head
        )
        return task.metrics(distributed.put_together(kept, mine, count) if several else kept, target)

    trainer = FullTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=eval_rows,
        data_collator=collate,
        processing_class=tokenizer,
        compute_loss_func=hooks.compute_loss or compute_loss,
        lengths=rows["length"],
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
    own_loss = hooks.compute_loss is not None
    checks = before_training(trainer, tokenizer, rows, summary, task, target, plan, own_loss=own_loss)
    if sharing is None or not all(check.passed for check in checks):
        _refuse_failed(checks, recorder)
    else:

        def try_engine() -> None:
            checks.append(dry_run_in_engine(trainer, rows, plan))
            _refuse_failed(checks, recorder)

        trainer.add_callback(AtBegin(try_engine))
    initial = None
    if is_main or sharing is not None:
        initial = weights.InitialWeights(model, request.initial_weights if is_main else None)
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
        state, optimizer = weights.load_finished(trainer, Path(request.checkpoint), plan.total_steps)
    nothing_to_report = Outcome(status="done", reason="", trial=plan.trial, attempt=request.attempt)
    if initial is None:  # the first process saves and reports
        return nothing_to_report
    moved = initial.moved(model, optimizer, trainer.tensors_with_gradient)
    if sharing is not None:
        moved = distributed.from_first(moved)
    verdict = nothing_learned(moved)
    if verdict.action == "stop":
        raise GuardStop(verdict.reason)
    best, best_metric = state.best_global_step, state.best_metric
    if not recipe.train.load_best_model_at_end:
        best, best_metric = None, None
    elif best is not None and best != state.global_step:
        problem = checkpoints.flaw(request.checkpoints / f"checkpoint-{best}")
        if problem is None:
            weights.load_best(trainer, request.checkpoints / f"checkpoint-{best}")
        else:
            warning = f"the best weights (step {best}) are lost ({problem}); the last ones are kept"
            journal.write("best weights lost", warning)
            recorder.write({"kind": "warning", "text": warning})
            best, best_metric = None, None
    recorder.phase("saving the model")
    whole_state = weights.whole_state(trainer)
    if not is_main:
        return nothing_to_report
    weights.save_model(model, tokenizer, request, summary, whole_state)
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


def _refuse_failed(checks: Sequence[Check], recorder: Any) -> None:
    recorder.write({"kind": "checks", "checks": [check.model_dump() for check in checks]})
    failed = [check for check in checks if not check.passed]
    if failed:
        raise GuardStop([f"{check.name}: {check.result}" for check in failed])


def load_for_training(recipe: Any, task: Task, target: Target) -> tuple[Any, Any]:
    """The pretrained model with the task's head, every parameter trainable, and the tokenizer."""
    from fulltune import methods
    from fulltune.model import load, load_processor

    tokenizer = load_processor(recipe.model, recipe.task, chat_template=recipe.data.chat_template)
    model = load(recipe.model, task.AUTO_CLASS, task.config_changes(target, tokenizer), head_is_new=task.HEAD_IS_NEW)
    if zero.wanted(recipe):
        weights.forget_unused_conversions(model)
    return methods.apply(model, recipe.method), tokenizer


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
