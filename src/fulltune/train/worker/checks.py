from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fulltune import methods
from fulltune.errors import GuardStop
from fulltune.inference import selective_head
from fulltune.inference.run import positions_by_length
from fulltune.inference.store import Rows
from fulltune.models.base import Base
from fulltune.models.dropout import STEPS, SixteenBitDropout, drop_threshold
from fulltune.models.new_tokens import Pieces
from fulltune.models.packing import find_packing_leak, rows_for_check
from fulltune.recipe.tasks import TaskName
from fulltune.records.events import ChecksDone
from fulltune.records.plan import Plan
from fulltune.records.training import Check
from fulltune.stream.training import Streamed, streamed_of
from fulltune.tasks import Task
from fulltune.tasks.causal_lm import end_token
from fulltune.tasks.padding import IGNORED
from fulltune.text import counted
from fulltune.train.loop.callbacks import Recorder
from fulltune.train.loop.guarded_step import first_non_finite_module
from fulltune.train.loop.inputs import AttemptInputs
from fulltune.train.loop.trainer import FullTrainer
from fulltune.train.worker.dry_run import collate_on_device, dry_run_check, worst_micro_batch
from fulltune.train.worker.loading import NEGATIVES, LoadedModel, ScaledHead

_ISOLATED = "packed texts are isolated"
_SELECTIVE = "logits of trained tokens only"
_CHUNKED = "chunked loss"


def run_checks(inputs: AttemptInputs, loaded: LoadedModel, trainer: FullTrainer) -> list[Check]:
    """Run all checks except the dry run; the caller must stop if one failed."""
    plan, recipe, summary, rows = inputs.plan, inputs.recipe, inputs.summary, loaded.rows
    writes, model = inputs.task.FACTS.writes, loaded.objective.model
    train, world_size = summary.splits["train"], trainer.args.world_size
    truncated = f"{train.truncated_rows} of {train.rows} at {summary.max_length} tokens"
    processes = f"{world_size} of {plan.num_processes} planned"
    checks = [
        _check_trainable_parameters(model, plan),
        Check(name="processes", result=processes, passed=world_size == plan.num_processes),
        Check(name="truncated rows", result=truncated, passed=True),
        _describe_dropout(model),
    ]
    if (streamed := streamed_of(model)) is not None:
        shortest = collate_on_device(trainer, [rows[positions_by_length(rows)[-1]]])
        checks.append(_check_outputs(model, streamed, shortest))
    if loaded.head is not None:
        head, start = loaded.head, loaded.head_start
        origin = head.description if start is None or head.order else f"new, {start.head_origin}; {head.why}"
        new_rows = f"each new row {start.head_origin}" if start is not None and head.order else ""
        problem = _bf16_resolution_problem(loaded.scaled, summary.scale)
        result = problem or "; ".join(filter(None, [origin, new_rows, loaded.scale_note]))
        checks.append(Check(name="head", result=result, passed=problem is None))
    if inputs.task.FACTS.contrasts:
        checks.append(_count_batches_with_negatives(trainer, np.stack(rows["labels"])))
    if recipe.data.hard_negatives:
        checks.append(Check.load(inputs.data.parent / NEGATIVES))
    if recipe.model.new_tokens:
        checks.append(_count_new_tokens(Base.from_block(recipe.model, recipe.task).new_tokens, recipe.task, rows))
    if writes:
        without = int((_last_trained_tokens(rows) == IGNORED).sum())
        trained = f"{len(rows) - without} of {len(rows)}"
        checks.append(Check(name="rows with trained tokens", result=trained, passed=without == 0))
    if summary.form.writes_answers:
        # Only the task's rows: mixed-in raw text may be cut in the middle.
        checks.append(_check_end_tokens(inputs, loaded, Rows(inputs.data / "train")))
    if summary.packed or plan.packing:
        checks.append(_check_packed_texts_isolated(trainer, model, is_raw_text=summary.packed))
    if writes:
        checks.append(_install_selective_head(trainer, rows, inputs.task, own_loss=inputs.has_own_loss))
        if plan.chunked_loss:
            # Without chunks, training needs more memory; the check fails only if the recipe requires them.
            is_required = inputs.recipe.train.chunked_loss is True
            result = checks[-1].result if trainer.head is None else trainer.head.chunking_note
            possible = trainer.head is not None and trainer.head.can_chunk
            result += "; remove train.chunked_loss" if is_required and not possible else ""
            checks.append(Check(name=_CHUNKED, result=result, passed=possible or not is_required))
    return checks


def stop_if_check_failed(checks: Sequence[Check], recorder: Recorder) -> None:
    """Record the checks, and raise `GuardStop` if one failed."""
    recorder.write(ChecksDone(checks=tuple(checks)))
    failed = [check for check in checks if not check.passed]
    if failed:
        raise GuardStop([f"{check.name}: {check.result}" for check in failed])


def _check_trainable_parameters(model: PreTrainedModel, plan: Plan) -> Check:
    fixed = methods.sinusoidal_tables(model)
    parameters = [parameter for name, parameter in model.named_parameters() if name not in fixed]
    # ZeRO stage 3 leaves empty tensors and notes their sizes.
    sizes = [int(getattr(parameter, "ds_numel", parameter.numel())) for parameter in parameters]
    trainable = sum(size for size, parameter in zip(sizes, parameters, strict=True) if parameter.requires_grad)
    dtypes = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in parameters})
    return Check(
        name="trainable parameters",
        result=f"{trainable:,} of {sum(sizes):,} ({', '.join(dtypes)})",
        passed=trainable == (sum(sizes) if plan.num_frozen_parameters == 0 else plan.num_trainable_parameters),
    )


def _check_outputs(model: PreTrainedModel, streamed: Streamed, batch: Mapping[str, torch.Tensor]) -> Check:
    """Check that a streamed model's outputs are finite: absent weights are NaN."""
    called = set[int]()
    streamed.executor.on_unit = lambda unit, backward: called.add(unit)
    module = first_non_finite_module(model, batch)
    absent = [unit.path for number, unit in enumerate(streamed.units) if unit.names and number not in called]
    why = (
        f"the model reads weights outside of their modules' calls (of {', '.join(absent[:3])}), so it cannot be "
        "streamed; set another train.placement"
    )
    why = f"{module} is the first module whose output is not finite: {why if absent else 'check the weights'}"
    return Check(name="outputs", result=why if module else "finite for the shortest row", passed=module is None)


def _describe_dropout(model: PreTrainedModel) -> Check:
    modules = [module for module in model.modules() if isinstance(module, SixteenBitDropout)]
    shares = ", ".join(sorted({f"{module.p:g} becomes {drop_threshold(module.p) / STEPS:.6g}" for module in modules}))
    ours = f"{counted(len(modules), 'module')} with faster 16-bit random numbers ({shares})"
    return Check(name="dropout", result=ours if modules else "PyTorch's, or none", passed=True)


def _count_batches_with_negatives(trainer: FullTrainer, labels: np.ndarray) -> Check:
    batches = trainer.sampler.batches_of_epoch()
    having = sum(labels.shape[1] > 3 or len(np.unique(labels[rows, 0])) > 1 for rows in batches)
    return Check(name="batches with negatives", result=f"{having:,} of {len(batches):,}", passed=having > 0)


def _count_new_tokens(new_tokens: Pieces, task: TaskName, rows: Rows) -> Check:
    """Describe the new tokens: their mean number of pieces, and how often the train rows contain them."""
    counts = np.zeros(max(new_tokens) + 1)
    for column in ("input_ids", "labels") if task == "seq2seq" else ("input_ids",):
        for flat, _ in rows.lists(column):
            counts += np.bincount(flat[(flat >= 0) & (flat < len(counts))], minlength=len(counts))
    without = sum(counts[token] == 0 for token in new_tokens)
    pieces = sum(map(len, new_tokens.values())) / len(new_tokens)
    total = sum(counts[token] for token in new_tokens)
    result = f"{len(new_tokens):,}, before {pieces:.1f} pieces each; {total:,.0f} times in the train rows"
    return Check(name="new tokens", result=result + f"; {without:,} never, so not trained" * bool(without), passed=True)


def _last_trained_tokens(rows: Rows) -> np.ndarray:
    """Return each row's last trained token, or `IGNORED` if it has none: [rows]."""
    tokens = []
    for flat, offsets in rows.lists("labels"):
        positions = np.where(flat != IGNORED, np.arange(len(flat)), -1)
        last = np.maximum.reduceat(positions, offsets[:-1])
        tokens.append(np.where(last >= offsets[:-1], flat[last], IGNORED))
    return np.concatenate(tokens)


def _check_packed_texts_isolated(trainer: FullTrainer, model: PreTrainedModel, *, is_raw_text: bool) -> Check:
    """Check that texts packed into one row do not influence each other."""
    if trainer.is_deepspeed_enabled:
        result = "checked on a small copy of the model, because ZeRO shards the weights"
        return Check(name=_ISOLATED, result=result, passed=True)
    problem = find_packing_leak(model, collate_on_device(trainer, rows_for_check(model, joined=is_raw_text)))
    return Check(name=_ISOLATED, result=problem or "yes", passed=problem is None)


def _install_selective_head(trainer: FullTrainer, rows: Rows, task: Task, own_loss: bool) -> Check:
    """Let the trainer compute only trained tokens' logits if the results stay the same. The returned check always
    passes. `own_loss` (the user's) needs all logits."""
    if trainer.is_deepspeed_enabled:  # only its engine can run the model, and it exists once training begins
        result = "off: ZeRO shards the model"
    elif own_loss:  # needs all logits
        result = "off: you supply the loss"
    else:
        batch = collate_on_device(trainer, [rows[i] for i in positions_by_length(rows)[-2:]])
        trainer.head, result = selective_head.verify_selective_head(trainer.model, task, batch)
    return Check(name=_SELECTIVE, result=result, passed=True)


def _check_end_tokens(inputs: AttemptInputs, loaded: LoadedModel, rows: Rows) -> Check:
    """Check that each untruncated answer ends with a trained end token that survives padding and stops generation."""
    tokenizer = loaded.tokenizer
    last, ends = count_last_tokens(rows, tokenizer)
    without = sum(count for token, count in last.items() if token not in ends)
    cut = inputs.summary.splits["train"].truncated_rows
    stop_generation_at(loaded.objective.model, ends)
    pair = [dict(rows[i]) for i in (positions_by_length(rows)[0], positions_by_length(rows)[-1])]
    padded = inputs.task.collate(pair, tokenizer.pad_token_id)
    survives = end_token({"labels": padded["labels"][1].tolist()}) == end_token(pair[1])
    names = ", ".join(repr(tokenizer.decode([token])) for token in sorted(ends)) or "none"
    return Check(
        name="answers end with a trained end token",
        result=f"{len(rows) - without} of {len(rows)} rows ({names}; {cut} truncated)",
        passed=without <= cut and survives,
    )


def count_last_tokens(rows: Rows, tokenizer: PreTrainedTokenizerBase) -> tuple[dict[int, int], set[int]]:
    """Count rows by their last trained token, {token id: rows}; also return which of these tokens are special."""
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    tokens, counts = np.unique(_last_trained_tokens(rows), return_counts=True)
    last = dict(zip(tokens.tolist(), counts.tolist(), strict=True))
    return last, {token for token in last if token in special}


def stop_generation_at(model: PreTrainedModel, ends: set[int]) -> None:
    """Add end tokens to the model's generation config, because chat turns often end with another token."""
    if not ends:
        return
    eos = model.generation_config.eos_token_id
    present = {eos} if isinstance(eos, int) else set(eos or ())
    if not ends <= present:
        model.generation_config.eos_token_id = sorted(present | ends)


def dry_run_in_engine(trainer: FullTrainer, rows: Rows, plan: Plan) -> Check:
    """Run one forward and backward pass on the longest rows in DeepSpeed's engine, with the loss multiplied by 0."""
    engine: Any = trainer.model_wrapped
    batch = collate_on_device(trainer, [rows[i] for i in worst_micro_batch(rows, plan)])
    started = time.monotonic()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        engine.train()
        labels = batch.pop("labels")
        outputs = engine(**batch)
        loss = cast("Any", trainer.compute_loss_func)(
            outputs, labels, num_items_in_batch=torch.tensor(trainer.count_items(labels))
        )
        # All ranks must decide alike: in the backward pass each waits for the others.
        finite = trainer.accelerator.reduce(loss.detach().isfinite().float(), reduction="sum")
        passed = int(finite) == trainer.accelerator.num_processes
        if passed:
            engine.set_gradient_accumulation_boundary(False)
            engine.backward(loss * 0.0, scale_wrt_gas=False)
    return dry_run_check(batch, float(loss.detach()), started, passed)


def _bf16_resolution_problem(scaled: ScaledHead | None, scale: tuple[float, float] | None) -> str | None:
    """Return a message if bf16 weights are too coarse for targets with this (mean, standard deviation), else None."""
    if scale is None or scaled is None or scaled.layer.weight.dtype != torch.bfloat16:
        return None
    size, spread = max(abs(scale[0]), scale[1]), scale[1]
    apart = 2.0 ** (math.frexp(size)[1] - 8)  # bf16 has 8 digits
    if apart <= spread:
        return None
    return (
        f"bf16 weights are too coarse: near {size:.3g} neighbouring values are {apart:.3g} apart, but the targets' "
        f"standard deviation is {spread:.3g}; set model.weights_dtype: fp32"
    )
