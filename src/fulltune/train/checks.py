"""What is verified just before step 1, on the real model and the real rows."""

from __future__ import annotations

import math
import time
from typing import Any

from fulltune.inference import by_length
from fulltune.records import Check, DataSummary, Plan
from fulltune.tasks import Target, Task
from fulltune.tasks.causal_lm import IGNORED, end_token


def before_training(
    trainer: Any, tokenizer: Any, rows: Any, summary: DataSummary, task: Task, target: Target, plan: Plan
) -> list[Check]:
    """Run all checks; the caller refuses to train when one did not pass."""
    checks = [_parameters(trainer.model), _world_size(trainer, plan), _truncation(summary)]
    if summary.task == "causal-lm":
        checks += [_trained_tokens(rows), _end_tokens(trainer.model, tokenizer, rows, task, summary)]
    if all(check.passed for check in checks):
        checks.append(dry_run(trainer, rows, plan))
    return checks


def _parameters(model: Any) -> Check:
    parameters = list(model.parameters())
    trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in parameters)
    kinds = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in parameters})
    return Check(
        name="trainable parameters",
        result=f"{trainable:,} of {total:,} ({', '.join(kinds)})",
        passed=trainable == total,
    )


def _world_size(trainer: Any, plan: Plan) -> Check:
    found = trainer.args.world_size
    return Check(
        name="processes", result=f"{found}, asked for {plan.num_processes}", passed=found == plan.num_processes
    )


def _truncation(summary: DataSummary) -> Check:
    train = summary.splits["train"]
    return Check(
        name="truncated rows",
        result=f"{train.truncated_rows} of {train.rows} at {summary.max_length} tokens",
        passed=True,
    )


def _trained_tokens(rows: Any) -> Check:
    without = 0
    for batch in rows.select_columns(["labels"]).iter(1000):
        without += sum(max(labels) == IGNORED for labels in batch["labels"])
    return Check(name="rows with trained tokens", result=f"{len(rows) - without} of {len(rows)}", passed=without == 0)


def _end_tokens(model: Any, tokenizer: Any, rows: Any, task: Task, summary: DataSummary) -> Check:
    """Every whole answer must end with a trained end token that survives padding and stops generation."""
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    last = [
        end_token({"labels": labels})
        for batch in rows.select_columns(["labels"]).iter(1000)
        for labels in batch["labels"]
    ]
    ends = {token for token in last if token is not None and token in special}
    without = sum(token not in special for token in last)
    cut = summary.splits["train"].truncated_rows
    if ends:
        _stop_generation_at(model, ends)
    pair = [dict(rows[i]) for i in (by_length(rows)[0], by_length(rows)[-1])]
    padded = task.collate(pair, tokenizer.pad_token_id)
    survives = end_token({"labels": padded["labels"][1].tolist()}) == end_token(pair[1])
    names = ", ".join(repr(tokenizer.decode([token])) for token in sorted(ends)) or "none"
    return Check(
        name="answers end with a trained end token",
        result=f"{len(last) - without} of {len(last)} rows ({names}; {cut} truncated)",
        passed=without <= cut and survives,
    )


def _stop_generation_at(model: Any, ends: set[int]) -> None:
    """A chat model's turn often ends with another token than the tokenizer's end token: generation must know both."""
    present = model.generation_config.eos_token_id
    present = {present} if isinstance(present, int) else set(present or ())
    if not ends <= present:
        model.generation_config.eos_token_id = sorted(present | ends)


def dry_run(trainer: Any, rows: Any, plan: Plan) -> Check:
    """One step at the longest length, with a learning rate of 0: what does not fit fails now, not in an hour."""
    import torch

    model, device = trainer.model, trainer.args.device
    longest = by_length(rows)[: plan.micro_batch_size]
    batch = {name: tensor.to(device) for name, tensor in trainer.data_collator([rows[i] for i in longest]).items()}
    started = time.monotonic()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        model.train()
        if plan.activation_checkpointing:
            model.activation_checkpointing_enable()
        labels = batch.pop("labels")
        with trainer.accelerator.autocast():
            outputs = model(**batch)
        loss = trainer.compute_loss_func(outputs, labels, num_items_in_batch=torch.tensor(trainer.count_items(labels)))
        loss.backward()
        loss = loss.detach()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        if math.isfinite(float(loss)) and all(bool(gradient.isfinite().all()) for gradient in gradients):
            # With a rate of 0 only finite gradients leave the weights as they are.
            kind, options = trainer.get_optimizer_cls_and_kwargs(trainer.args, model)
            kind(model.parameters(), **{**options, "lr": 0.0, "weight_decay": 0.0}).step()
        model.zero_grad(set_to_none=True)
    length = batch["input_ids"].shape[1]
    return Check(
        name="dry-run step",
        result=f"{len(longest)} rows of {length} tokens, loss {float(loss):.4g}, {time.monotonic() - started:.2f} s",
        passed=math.isfinite(float(loss)),
    )
