"""Evaluation while training: eval rows go through the current weights, a few numbers of each are kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fulltune.inference.run import run_rows
from fulltune.train.worker import distributed
from fulltune.train.worker.context import AttemptContext


def score(attempt: AttemptContext, rows: Any) -> Mapping[str, float]:
    """The eval metrics of the current weights; several processes share the rows."""
    arguments = attempt.trainer.args
    if arguments.world_size == 1:
        return attempt.task.metrics(reduce_rows(attempt, rows), attempt.target)
    size, rank = attempt.plan.eval_batch_size, arguments.process_index
    mine, count = distributed.my_share(rows, size, rank, arguments.world_size)
    reduced = distributed.put_together(reduce_rows(attempt, mine), mine, count)
    return attempt.task.metrics(reduced, attempt.target)


def reduce_rows(attempt: AttemptContext, rows: Any) -> Any:
    """These rows through the current model: name to values[rows, ...]."""
    trainer, plan = attempt.trainer, attempt.plan
    tokenizer: Any = trainer.processing_class
    # Weights that are shared out are put together by DeepSpeed's engine.
    model: Any = trainer.model_wrapped if trainer.is_deepspeed_enabled else trainer.model
    with attempt.journal.during("evaluation"):
        return run_rows(
            model,
            rows,
            attempt.task,
            attempt.target,
            tokenizer.pad_token_id,
            batch_size=plan.eval_batch_size,
            precision=plan.precision,
            head=trainer.head,
        )
