from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow.compute
import torch
import transformers
from accelerate.utils import send_to_device

from fulltune.classic.arguments import issue_notice
from fulltune.errors import GuardStop
from fulltune.train.loop.guarded_step import gradients_are_finite
from fulltune.train.worker.dry_run import restored_buffers, restored_random_state

_log = logging.getLogger(__name__)


NUM_MEASURED_ROWS = 2000


def dry_run(trainer: transformers.Trainer) -> float | None:
    """Run forward, backward and optimizer on the longest rows at learning rate 0. Return the loss, or None if the rows
    are unknown.

    Restores random state, buffers and optimizer, but not a collator's or dataset's own random generator.
    """
    rows = _positions_for_dry_run(trainer)
    if not rows:
        return None
    model = trainer.model_wrapped if trainer.args.n_gpu > 1 else trainer.model
    assert model is not None, "the training begins"
    was_training, size = model.training, f"{len(rows)} rows"
    try:
        with restored_buffers(model), restored_random_state():
            collate = trainer._get_collator_with_removed_columns(trainer.data_collator)
            dataset: Any = trainer.train_dataset
            batch = collate([dataset[i] for i in rows])
            size += _describe_length(batch)
            loss = _forward_and_backward(trainer, model, batch)
            _step_at_rate_zero(trainer)
    except (RuntimeError, MemoryError) as error:
        error.add_note(
            f"fulltune: the dry-run step before training failed on the longest batch ({size}); "
            "set trainer.dry_run = False to skip the step"
        )
        raise
    finally:
        model.zero_grad(set_to_none=True)
        model.train(was_training)
    if not math.isfinite(loss):
        raise GuardStop(f"dry-run step: the loss is {loss} on the longest batch ({size}), before any update")
    _log.info("dry-run step passed: %s, loss %.4g", size, loss)
    return loss


def _positions_for_dry_run(trainer: transformers.Trainer) -> list[int]:
    """Return positions of the longest train rows; if they are unknown, warn and return an empty list."""
    dataset: Any = trainer.train_dataset
    if type(trainer).get_train_dataloader is not transformers.Trainer.get_train_dataloader:
        issue_notice("no dry-run step before training: the script builds the batches itself (get_train_dataloader)")
        return []
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        issue_notice("no dry-run step before training: the length of the train dataset is unknown")
        return []
    names = getattr(trainer.processing_class, "model_input_names", None) or ["input_ids"]
    with restored_random_state():
        return longest_rows(dataset, trainer._train_batch_size, names[0])


def longest_rows(dataset: Sequence[object], count: int, column: str) -> list[int]:
    """Return the positions of the `count` rows with the longest `column`, or of the first rows if unknown."""
    positions: Sequence[int] = range(len(dataset))
    lengths = _column_lengths(dataset, column)
    if lengths is None:
        measured = min(len(dataset), NUM_MEASURED_ROWS)
        positions = [number * len(dataset) // measured for number in range(measured)]  # evenly spaced
        if positions and row_length(dataset[positions[0]], column) is None:
            return list(range(min(count, len(dataset))))
        lengths = [row_length(dataset[i], column) or 0 for i in positions]
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")[:count]
    return [int(positions[i]) for i in order]


def _column_lengths(dataset: Any, column: str) -> list[int] | None:
    """Return the lengths of a list column in a `datasets.Dataset` without reading values, or None for other data."""
    feature = (getattr(dataset, "features", None) or {}).get(column)
    if not hasattr(dataset, "with_format") or not hasattr(feature, "feature") or dataset.format["type"] == "custom":
        return None
    tables = dataset.select_columns([column]).with_format("arrow").iter(10_000)
    return [length or 0 for table in tables for length in pyarrow.compute.list_value_length(table[column]).to_pylist()]


def row_length(row: object, column: str) -> int | None:
    """Return the length of a column's value in a row, or None if it has no length."""
    value = row.get(column) if isinstance(row, Mapping) else None
    try:
        return None if value is None else len(value)
    except TypeError:
        return None


def _describe_length(batch: object) -> str:
    tokens = batch.get("input_ids") if isinstance(batch, Mapping) else None
    return f" of {tokens.shape[1]} tokens" if torch.is_tensor(tokens) and tokens.ndim > 1 else ""


def _forward_and_backward(trainer: transformers.Trainer, model: torch.nn.Module, batch: dict[str, Any]) -> float:
    """Compute the loss and gradients of a batch with the Trainer's own methods, and return the loss."""
    _, num_items = trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)
    inputs = send_to_device(shallow_copy(batch), trainer.args.device)
    model.train()
    with trainer.compute_loss_context_manager():
        loss: Any = trainer.compute_loss(model, inputs, num_items_in_batch=num_items)
    loss = loss.mean()
    loss.backward()
    return float(loss.detach())


def _step_at_rate_zero(trainer: transformers.Trainer) -> None:
    """Run the optimizer once at learning rate 0 to allocate its memory, then clear its state."""
    optimizer: Any = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD) or optimizer.state:
        return
    if not gradients_are_finite(p for group in optimizer.param_groups for p in group["params"]):
        return  # the guard stops it at step 1
    settings = [(group["lr"], group.get("weight_decay")) for group in optimizer.param_groups]
    try:
        for group in optimizer.param_groups:
            group.update(lr=0.0, weight_decay=0.0)
        # Scheduler and scaler patch `optimizer.step` to count its calls, so it is not called here.
        type(optimizer).step(optimizer)
    finally:
        for group, (rate, decay) in zip(optimizer.param_groups, settings, strict=True):
            group.update(lr=rate, weight_decay=decay)
        optimizer.state.clear()


def shallow_copy(inputs: dict[str, Any]) -> dict[str, Any]:
    # `compute_loss` may remove the labels.
    return dict(inputs) if isinstance(inputs, Mapping) else inputs
