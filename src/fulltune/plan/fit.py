"""Fill in what the recipe left open, check that it can run here, and write down why each value is what it is."""

from __future__ import annotations

import math
from typing import Any

from fulltune import zero
from fulltune.errors import DoesNotFitError, RecipeError
from fulltune.hardware import Machine
from fulltune.model import Shapes
from fulltune.plan import defaults, memory
from fulltune.recipe import Recipe
from fulltune.records import DataSummary, Plan, Setting, StateBytes
from fulltune.tasks import task_named

FROM_RECIPE = "from the recipe"
LEAST_BF16_SPEEDUP = 1.2
"""Below it bf16's rounding buys too little."""


class _Ledger:
    """Settles one setting after another and keeps the reasons."""

    def __init__(self) -> None:
        self.settings: list[Setting] = []

    def settle(self, name: str, given: Any, chosen: Any = None, reason: str = "") -> Any:
        """The recipe's value if it gave one, else the chosen one."""
        value, why = (given, FROM_RECIPE) if given is not None else (chosen, reason)
        self.settings.append(Setting(name=name, value=value, reason=why, chosen=given is None))
        return value


def fit(recipe: Recipe, shapes: Shapes, summary: DataSummary, machine: Machine, disk_free_bytes: int) -> Plan:
    """Decide every number of the trial.

    Args:
        recipe: The checked recipe.
        shapes: The model's sizes.
        summary: The data stage's summary.
        machine: What is here.
        disk_free_bytes: Free bytes where the run folder lies.

    Returns:
        The plan; `settings` holds each value with its reason.

    Raises:
        RecipeError: When settings contradict each other or the machine.
        DoesNotFitError: When state or checkpoints cannot fit.
    """
    train, ledger = recipe.train, _Ledger()
    device = _device(recipe, machine, ledger)
    precision = _precision(recipe, machine, device, ledger)
    metric = _metric(recipe, summary, ledger)
    rate, why = defaults.learning_rate(shapes.num_parameters, shapes.is_decoder)
    rate = ledger.settle("method.learning_rate", recipe.method.learning_rate, rate, why)
    global_batch = _global_batch(recipe, summary, ledger)
    rows = summary.splits["train"].rows
    steps_per_epoch = math.ceil(rows / global_batch)
    epochs, total_steps = _duration(recipe, rows, steps_per_epoch, ledger)
    warmup = _warmup(recipe, total_steps, ledger)
    state = memory.state_bytes(shapes.num_parameters, recipe.model.weights_dtype)
    free = _memory_for_rows(recipe, shapes, state, machine, device, disk_free_bytes)
    micro = _micro_batch(recipe, shapes, summary, global_batch, free, ledger)
    accumulation = global_batch // (micro * train.num_processes)
    ledger.settle("gradient accumulation", None, accumulation, "global batch / (micro batch x processes)")
    if problems := zero.disagreements(recipe, micro, accumulation, train.num_processes, precision):
        raise RecipeError(problems)
    eval_steps = min(total_steps, train.eval_steps or steps_per_epoch)
    ledger.settle("train.eval_steps", train.eval_steps, eval_steps, "once per epoch")
    ledger.settle("data.max_length", recipe.data.max_length, summary.max_length, summary.max_length_reason)
    logging_steps = max(1, total_steps // 200)
    logging_steps = ledger.settle("train.logging_steps", train.logging_steps, logging_steps, "about 200 log lines")
    eval_batch = ledger.settle("evaluate.batch_size", recipe.evaluate.batch_size, 2 * micro, "twice the micro batch")
    grouped, why = defaults.group_by_length(summary.length_explained)
    grouped = ledger.settle("train.group_by_length", train.group_by_length, grouped, why)
    _settle_the_rest(recipe, ledger)
    return Plan(
        trial=f"{recipe.method.kind}-seed{train.seed}",
        data_fingerprint=summary.fingerprint,
        method=recipe.method.kind,
        seed=train.seed,
        learning_rate=rate,
        layerwise_lr_decay=recipe.method.layerwise_lr_decay,
        num_train_epochs=epochs,
        total_steps=total_steps,
        warmup_steps=warmup,
        lr_scheduler_type=train.lr_scheduler_type,
        global_batch_size=global_batch,
        micro_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        num_processes=train.num_processes,
        eval_batch_size=eval_batch,
        device=device,
        precision=precision,
        weights_dtype=recipe.model.weights_dtype,
        activation_checkpointing=train.activation_checkpointing,
        group_by_length=grouped,
        eval_steps=eval_steps,
        save_steps=train.save_steps or eval_steps,
        logging_steps=logging_steps,
        metric=metric,
        greater_is_better=task_named(recipe.task).METRICS[metric],
        num_parameters=shapes.num_parameters,
        num_trainable_parameters=shapes.num_parameters,
        state=state,
        settings=tuple(ledger.settings),
    )


def _device(recipe: Recipe, machine: Machine, ledger: _Ledger) -> str:
    wanted = recipe.train.device
    if wanted == "cuda" and not machine.gpus:
        raise RecipeError("train.device: 'cuda' but torch sees no GPU here; set 'auto' or 'cpu'")
    found = "cuda" if machine.gpus else "cpu"
    reason = f"{len(machine.gpus)} GPU(s) found" if machine.gpus else "no GPU found"
    device = str(ledger.settle("train.device", None if wanted == "auto" else wanted, found, reason))
    if device == "cuda" and recipe.train.num_processes > len(machine.gpus):
        raise RecipeError(f"train.num_processes: {recipe.train.num_processes}, but there are {len(machine.gpus)} GPUs")
    if device == "cpu" and recipe.train.num_processes > machine.num_cores:
        raise RecipeError(
            f"train.num_processes: {recipe.train.num_processes}, but this machine lets us use {machine.num_cores} "
            f"CPU core(s); set at most {machine.num_cores}"
        )
    return device


def _precision(recipe: Recipe, machine: Machine, device: str, ledger: _Ledger) -> Any:
    wanted = recipe.train.precision
    if wanted == "fp16" and device == "cpu":
        raise RecipeError(
            "train.precision: fp16 is not possible on a CPU (it would silently train in fp32); set 'auto', 'bf16' or "
            "'fp32'"
        )
    if recipe.model.weights_dtype == "bf16" and wanted in ("fp32", "fp16"):
        raise RecipeError(
            f"train.precision: {wanted} with model.weights_dtype: bf16 would compute in bf16; set precision: bf16, or "
            "weights_dtype: fp32"
        )
    if device == "cpu":
        ratio = machine.cpu_bf16_speedup
        reason = f"bf16 is {ratio:.1f} times as fast as fp32 here (measured)"
        chosen = "bf16" if ratio >= LEAST_BF16_SPEEDUP else "fp32"
        reason += "; weights stay fp32" if chosen == "bf16" else f"; it needs {LEAST_BF16_SPEEDUP} to be taken"
    else:
        chosen, reason = (
            ("bf16", "this GPU computes bf16; weights stay fp32")
            if machine.gpus[0].bf16
            else ("fp16", "this GPU has no fast bf16; the loss is scaled")
        )
    if recipe.model.weights_dtype == "bf16" and wanted == "auto":
        chosen, reason = "bf16", "the weights are bf16 (model.weights_dtype)"
    return ledger.settle("train.precision", None if wanted == "auto" else wanted, chosen, reason)


def _metric(recipe: Recipe, summary: DataSummary, ledger: _Ledger) -> str:
    possible = task_named(recipe.task).CHOOSING[summary.problem_type]
    wanted = recipe.evaluate.metric
    if wanted is not None and wanted not in possible:
        raise RecipeError(
            f"evaluate.metric: '{wanted}' cannot choose a checkpoint for {summary.problem_type.replace('_', ' ')}; "
            f"expected one of {', '.join(possible)}"
        )
    return str(
        ledger.settle("evaluate.metric", wanted, possible[0], f"usual for {summary.problem_type.replace('_', ' ')}")
    )


def _global_batch(recipe: Recipe, summary: DataSummary, ledger: _Ledger) -> int:
    train = recipe.train
    per_pass = (train.micro_batch_size or 1) * train.num_processes
    usual = 16 if recipe.task in defaults.WRITING_TASKS else 32
    # Small data: at least eight steps an epoch, or hardly any update happens.
    while usual > 4 and summary.splits["train"].rows < 8 * usual:
        usual //= 2
    chosen = math.ceil(usual / per_pass) * per_pass
    return int(
        ledger.settle(
            "train.global_batch_size", train.global_batch_size, chosen, f"usual for {recipe.task} with this many rows"
        )
    )


def _duration(recipe: Recipe, rows: int, steps_per_epoch: int, ledger: _Ledger) -> tuple[float, int]:
    train = recipe.train
    if train.max_steps is not None:
        ledger.settle("train.max_steps", train.max_steps)
        return train.max_steps / steps_per_epoch, train.max_steps
    epochs, why = defaults.num_train_epochs(recipe.task, rows)
    epochs = float(ledger.settle("train.num_train_epochs", train.num_train_epochs, epochs, why))
    return epochs, math.ceil(epochs * steps_per_epoch)


def _warmup(recipe: Recipe, total_steps: int, ledger: _Ledger) -> int:
    train = recipe.train
    if train.warmup_steps is not None and train.warmup_steps >= total_steps:
        raise RecipeError(
            f"train.warmup_steps: {train.warmup_steps}, but the run has {total_steps} steps; the rate would never fall"
        )
    if train.warmup_steps is not None:
        return int(ledger.settle("train.warmup_steps", train.warmup_steps))
    ratio, why = defaults.warmup_ratio(recipe.task)
    ratio = ledger.settle("train.warmup_ratio", train.warmup_ratio, ratio, why)
    # Rounded down: a warm-up over the whole of a very short run would never leave rate 0.
    return int(ratio * total_steps)


def _memory_for_rows(
    recipe: Recipe, shapes: Shapes, state: StateBytes, machine: Machine, device: str, disk_free_bytes: int
) -> int:
    """Bytes that each process has left for activations; refuses a state or checkpoints that cannot fit."""
    processes = recipe.train.num_processes
    available = machine.gpus[0].memory_bytes if device == "cuda" else machine.memory_available_bytes
    shared = zero.zero_of(recipe) or zero.Zero(stage=0, offload_optimizer=False, offload_weights=False)
    per_device = shared.device_bytes(state, processes)
    on_host = shared.host_bytes(state, processes)
    if device == "cpu":
        per_device += on_host // processes
    elif on_host > machine.memory_available_bytes:
        raise DoesNotFitError(
            f"{zero.NAME}: what is offloaded needs {_gib(on_host)}, but {_gib(machine.memory_available_bytes)} of the "
            "host's memory are free; offload less, or take a smaller model"
        )
    needed = per_device * (processes if device == "cpu" else 1)
    _refuse_what_cannot_fit(recipe, shapes, needed, available, device, disk_free_bytes)
    return (available if device == "cuda" else available // processes) - per_device


def _micro_batch(
    recipe: Recipe, shapes: Shapes, summary: DataSummary, global_batch: int, free_bytes: int, ledger: _Ledger
) -> int:
    train = recipe.train
    per_row = memory.row_bytes(
        memory.row_tokens(summary.max_length, summary.problem_type, summary.num_choices),
        shapes.num_layers,
        shapes.hidden_size,
        shapes.vocab_size,
        recipe.task,
        train.activation_checkpointing,
    )
    micro, why = defaults.micro_batch_size(global_batch, train.num_processes, per_row, free_bytes)
    return int(ledger.settle("train.micro_batch_size", train.micro_batch_size, int(micro), why))


def _refuse_what_cannot_fit(
    recipe: Recipe, shapes: Shapes, needed: int, available: int, device: str, disk_free_bytes: int
) -> None:
    if needed > available:
        halved = recipe.model.weights_dtype == "fp32" and needed / 2 <= available
        remedy = ", or set model.weights_dtype: bf16 (half of it, but loses small updates)" if halved else ""
        raise DoesNotFitError(
            f"{recipe.model.name}: weights, gradients and AdamW's state of {shapes.num_parameters / 1e6:,.0f} M "
            f"parameters need {_gib(needed)}, but {_gib(available)} of {'GPU ' if device == 'cuda' else ''}memory are "
            f"free; take a smaller model{remedy}"
        )
    one = memory.checkpoint_bytes(shapes.num_parameters, recipe.model.weights_dtype)
    # The kept ones, the best one, the one being written, and the finished model.
    disk = one * (recipe.train.save_total_limit + 2) + one // 3
    if disk > disk_free_bytes:
        raise DoesNotFitError(
            f"{recipe.output}: checkpoints and model need {_gib(disk)} on disk, but {_gib(disk_free_bytes)} are free; "
            "free some space, choose another 'output', or lower train.save_total_limit"
        )


def _gib(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB" if size >= 2**29 else f"{size / 2**20:,.0f} MiB"


def _settle_the_rest(recipe: Recipe, ledger: _Ledger) -> None:
    """Fields with a fixed default: recorded so that the report lists every setting."""
    named = {setting.name for setting in ledger.settings}
    for block in ("model", "data", "method", "train", "evaluate"):
        values = getattr(recipe, block)
        for field in type(values).model_fields:
            name = f"{block}.{field}"
            value = getattr(values, field)
            if name in named or value is None or name in ("data.train", "data.eval", "data.test"):
                continue
            given = field in values.model_fields_set
            ledger.settings.append(
                Setting(name=name, value=value, reason=FROM_RECIPE if given else "default", chosen=not given)
            )
