"""Which settings of a recipe a Lightning `Trainer` is given, which are refused, and which it decides itself.

Pure functions, without Lightning.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fulltune.recipe.fields import Recipe
from fulltune.recipe.preserve import PreserveBlock
from fulltune.recipe.training import PER_TENSOR
from fulltune.records.data import DataSummary
from fulltune.records.plan import Plan

PRECISION = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}
_TRAINERS: dict[str, str] = {
    "max_rollbacks": "a guard that stops the training raises; go on with Trainer.fit(ckpt_path=...)",
    "hang_timeout": "set the strategy's timeout, such as DDPStrategy(timeout=...)",
    "notice": "Lightning saves by its own callbacks, such as ModelCheckpoint",
    "save_steps": "give the Trainer ModelCheckpoint(every_n_train_steps=...)",
    "save_total_limit": "give the Trainer ModelCheckpoint(save_top_k=...)",
    "load_best_model_at_end": "give job.save(folder, checkpoint=...) the path that ModelCheckpoint calls best",
    "early_stopping_patience": "give the Trainer EarlyStopping(**job.monitor(), patience=...)",
    "early_stopping_threshold": "give the Trainer EarlyStopping(**job.monitor(), min_delta=...)",
    "report_to": "give the Trainer its loggers",
    "memory_limit": "the plan keeps to it, and nothing holds the process to it",
}
"""Settings of `train` that have no effect, and what to do instead. `placement` and `offload` are for the plan, which
counts the memory: see `misplaced`."""


def problems_of(recipe: Recipe) -> list[str]:
    """What a recipe asks for that cannot be had with a Lightning Trainer; empty: nothing."""
    train = recipe.train
    problems = []
    if recipe.methods:
        problems.append("methods: are compared by 'fulltune compare'; give one method of kind full")
    elif recipe.method.kind != "full":
        problems.append(f"method.kind: '{recipe.method.kind}' is not built for Lightning, full is; use 'fulltune run'")
    if recipe.is_searched:
        problems.append("search: is done by 'fulltune run'; give a setting in its place")
    if recipe.preserve.budget is not None:
        problems.append("preserve.budget: is kept by 'fulltune run' alone; remove it")
    if train.extra:
        own = "; give DeepSpeed's settings to DeepSpeedStrategy(config=...)" if "deepspeed" in train.extra else ""
        problems.append(f"train.extra: is for transformers' Trainer ({', '.join(train.extra)}); remove it{own}")
    if train.optim not in (None, *PER_TENSOR):
        problems.append(f"train.optim: '{train.optim}' is not built for Lightning; take one of {', '.join(PER_TENSOR)}")
    if train.activation_offloading:
        problems.append("train.activation_offloading: is not built for Lightning; remove it")
    return problems


def warnings_of(recipe: Recipe) -> list[str]:
    """Settings that the recipe gives, and that the Lightning Trainer decides: each with what to do instead."""
    given = recipe.train.model_fields_set
    found = [
        f"train.{name}: has no effect on a Lightning Trainer: {how}" for name, how in _TRAINERS.items() if name in given
    ]
    if recipe.preserve != PreserveBlock():
        found.append("preserve: generic text is read by 'fulltune run' alone, not while a Lightning Trainer trains")
    return found


def trainer_arguments(recipe: Recipe, plan: Plan, root: str) -> dict[str, Any]:
    """Arguments of `lightning.Trainer` that follow from a plan.

    Args:
        recipe: The recipe.
        plan: Its plan.
        root: The folder for what Lightning writes.
    """
    values: dict[str, Any] = {
        "accelerator": "cpu" if plan.device == "cpu" else "gpu",
        "devices": recipe.train.processes_per_machine,
        "num_nodes": recipe.train.num_machines,
        # bf16 weights compute in their own type: "bf16-true" would also turn the labels into it.
        "precision": "32-true" if plan.weights_dtype == "bf16" else PRECISION[plan.precision],
        "max_steps": plan.total_steps,
        "max_epochs": -1,
        "accumulate_grad_batches": plan.gradient_accumulation_steps,
        "gradient_clip_val": recipe.train.max_grad_norm or None,
        "gradient_clip_algorithm": "norm" if recipe.train.max_grad_norm else None,
        "log_every_n_steps": plan.logging_steps,
        "num_sanity_val_steps": -1 if plan.eval_on_start else 0,
        "use_distributed_sampler": False,
        "default_root_dir": root,
    }
    if not plan.eval_steps:
        return values | {"limit_val_batches": 0}
    if recipe.train.eval_strategy == "epoch" and plan.total_steps > plan.eval_steps:
        return values | {"check_val_every_n_epoch": 1}
    # What ends inside of its first epoch is scored all the same.
    batches = plan.eval_steps * plan.gradient_accumulation_steps
    return values | {"val_check_interval": batches, "check_val_every_n_epoch": None}


def disagreements(plan: Plan, world_size: int, accumulation: int) -> list[str]:
    """What the Trainer has otherwise than the plan, so that global batches would be others.

    Args:
        plan: The plan.
        world_size: Processes that the Trainer has.
        accumulation: Its `accumulate_grad_batches`.
    """
    problems = []
    if world_size != plan.num_processes:
        problems.append(
            f"Trainer: has {world_size} processes, and the plan cuts each global batch of {plan.global_batch_size} "
            f"rows for {plan.num_processes}; prepare(..., overrides=['train.num_processes={world_size}']), or give the "
            "Trainer job.trainer_arguments()"
        )
    if accumulation != plan.gradient_accumulation_steps:
        problems.append(
            f"Trainer: accumulate_grad_batches is {accumulation}, and the plan has {plan.gradient_accumulation_steps}; "
            "set train.global_batch_size and train.micro_batch_size in the recipe, and give the Trainer "
            "job.trainer_arguments()"
        )
    return problems


STRATEGIES = {
    "SingleDeviceStrategy": ("single",),
    "DDPStrategy": ("ddp",),
    "FSDPStrategy": ("fsdp2",),
    "ModelParallelStrategy": ("fsdp2",),
    "DeepSpeedStrategy": ("zero2", "zero3"),
}
"""Lightning's strategies, and the plan's placements that place alike."""


def strategy_of(classes: Sequence[str]) -> str:
    """Which of `STRATEGIES` it is; one's own by what it comes from, and any other by its name.

    Args:
        classes: Names of the strategy's class and of those that it comes from: DeepSpeed's comes from DDP's.
    """
    return next((name for name in classes if name in STRATEGIES), classes[0])


def misplaced(plan: Plan, strategy: str) -> str | None:
    """That the memory was planned for another strategy; None: for this one."""
    if plan.placement in STRATEGIES.get(strategy, ()):
        return None
    expected = " or ".join(name for name, placements in STRATEGIES.items() if plan.placement in placements)
    return (
        f"memory is planned for train.placement: {plan.placement} ({expected}), and the Trainer has {strategy}: the "
        "plan says nothing about whether it fits"
    )


def holds_whole(strategy: str) -> bool:
    """Whether each process has all weights and gradients."""
    return strategy in ("SingleDeviceStrategy", "DDPStrategy")


def wrong_in_deepspeed(plan: Plan, summary: DataSummary, strategy: str, precision: str) -> list[str]:
    """What DeepSpeed would get wrong without a word; empty: nothing, or another strategy.

    Args:
        plan: The plan.
        summary: Of the prepared data.
        strategy: One of `STRATEGIES`.
        precision: The Trainer's.
    """
    if strategy != "DeepSpeedStrategy":
        return []
    problems = []
    if summary.form.is_number and precision != "32-true":
        problems.append(
            f"Trainer: DeepSpeedStrategy turns the numbers to be learned into {precision.partition('-')[0]} bits, in "
            "which 526,580 and 528,000 are the same; set train.precision: fp32"
        )
    rows = summary.splits["train"].rows + sum(source.rows_per_epoch for source in summary.mixed)
    in_step = plan.micro_batch_size * plan.num_processes
    if plan.gradient_accumulation_steps > 1 and 0 < rows % plan.global_batch_size <= plan.global_batch_size - in_step:
        problems.append(
            f"Trainer: an epoch's last step has fewer micro batches than {plan.gradient_accumulation_steps}, and "
            "DeepSpeed would add them to the next epoch's first step; set train.global_batch_size so that it is "
            "train.micro_batch_size times train.num_processes"
        )
    return problems
