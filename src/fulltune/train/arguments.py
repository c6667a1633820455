"""The one place where our settings become `transformers.TrainingArguments`."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fulltune import zero
from fulltune.errors import RecipeError, SetupError
from fulltune.recipe import Recipe
from fulltune.records import Plan

PINNED = {
    "output_dir": "the run folder",
    "learning_rate": "method.learning_rate",
    "per_device_train_batch_size": "train.micro_batch_size",
    "per_device_eval_batch_size": "evaluate.batch_size",
    "gradient_accumulation_steps": "train.global_batch_size and train.micro_batch_size",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "eval_strategy": "train.eval_strategy",
    "save_strategy": "train.eval_strategy and train.save_steps",
    "metric_for_best_model": "evaluate.metric",
    "greater_is_better": "evaluate.metric",
    "gradient_checkpointing": "train.activation_checkpointing",
    "train_sampling_strategy": "train.group_by_length",
    "use_cpu": "train.device",
    "logging_nan_inf_filter": "always off: it would log a loss of 0 while the weights are NaN",
    "auto_find_batch_size": "always off: it restarts on trained weights and changes the global batch",
    "remove_unused_columns": "always off: the collator chooses the columns",
    "resume_from_checkpoint": "the same command continues a run",
    "push_to_hub": "never during training",
    "average_tokens_across_devices": "always on: the loss counts the items of all processes",
    "save_only_model": "always off: without optimizer state a run could not continue",
    "ignore_data_skip": "always off: a continued run would see other rows",
    "restore_callback_states_from_checkpoint": "always off: early stopping reads the history",
    "data_seed": "train.seed",
    "dataloader_drop_last": "always off: every row is seen once per epoch",
    "bf16_full_eval": "train.precision",
    "fp16_full_eval": "train.precision",
    "eval_accumulation_steps": "not needed: logits are reduced batch by batch",
    "batch_eval_metrics": "not needed: logits are reduced batch by batch",
    "logging_strategy": "train.logging_steps",
    "logging_first_step": "always on",
    "disable_tqdm": "always on: fulltune has its own display",
    "dataloader_pin_memory": "on with a GPU",
    "ddp_backend": "gloo on CPU, else transformers' choice",
    "fsdp": "not supported yet",
}
"""Fields that `train.extra` may not set, and what sets them."""


OWN_OPTIMIZERS = ("adamw_8bit", "adamw_bf16")
"""fulltune's own; transformers knows the first name too, as another one of `adamw_bnb_8bit`."""

PER_TENSOR = (*OWN_OPTIMIZERS, "adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop")
"""Optimizers that update a tensor from its own gradient and state alone: they can do it in the backward pass."""


def check_extra(recipe: Recipe, *, runs_here: bool = True) -> None:
    """Refuse what only the worker would find out: fields of `train.extra` that do not exist, that we pin or that have
    a setting of their own; unknown optimizers and trackers; settings of DeepSpeed that cannot be used.

    Args:
        recipe: The recipe.
        runs_here: The packages that the settings need must be installed; False for a plan of hardware elsewhere.

    Raises:
        RecipeError: Naming each such setting.
        SetupError: When a package is missing.
    """
    problems = [
        *_unknown_fields(recipe),
        *_unknown_optimizer(recipe),
        *_bf16_updates(recipe),
        *_in_backward(recipe),
        *_unknown_trackers(recipe),
    ]
    if zero.wanted(recipe):
        try:
            zero.settings(recipe)
        except RecipeError as error:
            problems += error.problems
    if problems:
        raise RecipeError(problems)
    missing = _missing_packages(recipe) if runs_here else []
    if missing:
        raise SetupError(missing)


def _unknown_fields(recipe: Recipe) -> list[str]:
    if not recipe.train.extra:
        return []
    from transformers import TrainingArguments

    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    own = set(type(recipe.train).model_fields)
    problems = []
    for name in recipe.train.extra:
        if name in PINNED:
            problems.append(f"train.extra.{name}: cannot be set here; see {PINNED[name]}")
        elif name in own:
            problems.append(f"train.extra.{name}: is a setting of its own; write it as train.{name}")
        elif name not in known:
            hint = _did_you_mean(name, known)
            problems.append(f"train.extra.{name}: transformers.TrainingArguments has no such field{hint}")
    if not recipe.train.extra.get("dataloader_num_workers"):
        problems += [
            f"train.extra.{name}: has no effect without train.extra.dataloader_num_workers above 0"
            for name in ("dataloader_prefetch_factor", "dataloader_persistent_workers")
            if recipe.train.extra.get(name)
        ]
    return problems


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean '{near[0]}'?" if near else ""


def _unknown_optimizer(recipe: Recipe) -> list[str]:
    optim = recipe.train.optim
    if optim is None or optim in OWN_OPTIMIZERS:
        return []
    from transformers.training_args import OptimizerNames

    known = sorted(name.value for name in OptimizerNames)
    if optim in known:
        return []
    hint = _did_you_mean(optim, known) or f"; it knows {', '.join(known)}"
    return [f"train.optim: transformers knows no optimizer '{optim}'{hint}"]


def _bf16_updates(recipe: Recipe) -> list[str]:
    """Settings that have no effect, updates that would vanish, and our optimizers under DeepSpeed."""
    train, problems = recipe.train, []
    own = train.optim is None or train.optim in OWN_OPTIMIZERS
    if recipe.model.weights_dtype == "fp32" and train.bf16_rounding is not None:
        problems.append(
            f"train.bf16_rounding: '{train.bf16_rounding}' has no effect, because the weights are fp32; remove it, or "
            "set model.weights_dtype: bf16"
        )
    if recipe.model.weights_dtype == "bf16" and not own and train.bf16_rounding != "nearest":
        problems.append(
            f"train.optim: '{train.optim}' rounds bf16 weights (model.weights_dtype) to nearest: updates smaller than "
            "half of their spacing vanish, at usual learning rates most of them; set optim: adamw_bf16 or adamw_8bit, "
            "or weights_dtype: fp32, or bf16_rounding: nearest to have it so"
        )
    if own and train.extra.get("optim_args"):
        named = f"'{train.optim}' takes none" if train.optim else "train.optim is left out"
        problems.append(f"train.extra.optim_args: has no effect, because {named}; remove it")
    if train.optim in OWN_OPTIMIZERS and zero.wanted(recipe):
        problems.append(
            f"train.optim: '{train.optim}' cannot run inside DeepSpeed, which keeps fp32 weights and shares out an "
            "optimizer's state itself; remove optim, or train.extra.deepspeed"
        )
    return problems


def _in_backward(recipe: Recipe) -> list[str]:
    """What `train.optimizer_in_backward` cannot go with; the plan adds accumulation, which it decides."""
    train, name = recipe.train, "train.optimizer_in_backward"
    if not train.optimizer_in_backward:
        return []
    problems = []
    if train.max_grad_norm:
        problems.append(
            f"{name}: needs train.max_grad_norm: 0, found {train.max_grad_norm:g}; the norm is of all gradients, and "
            "they are never there together"
        )
    if train.num_processes > 1:
        problems.append(
            f"{name}: needs train.num_processes: 1, found {train.num_processes}; tensors would be updated before the "
            "processes' gradients are put together"
        )
    if zero.wanted(recipe):
        problems.append(f"{name}: cannot go with {zero.NAME}, which updates by itself; remove one of them")
    if train.precision == "fp16":
        problems.append(
            f"{name}: cannot go with train.precision: fp16, whose gradients are scaled until all are there; set bf16 "
            "or fp32"
        )
    if train.optim is not None and train.optim not in PER_TENSOR:
        problems.append(
            f"{name}: needs an optimizer that treats each tensor by itself ({', '.join(PER_TENSOR)}), found "
            f"'{train.optim}'"
        )
    return problems


def _unknown_trackers(recipe: Recipe) -> list[str]:
    if not recipe.train.report_to:
        return []
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    known = sorted(INTEGRATION_TO_CALLBACK)
    return [
        f"train.report_to: transformers knows no tracker '{name}'"
        + (_did_you_mean(name, known) or f"; it knows {', '.join(known)}")
        for name in recipe.train.report_to
        if name not in (*known, *_NOT_PACKAGES)
    ]


def _missing_packages(recipe: Recipe) -> list[str]:
    """Packages that the settings need and that are not installed, each with the command that installs it."""
    problems = []
    if recipe.train.report_to:
        from transformers.integrations.integration_utils import get_available_reporting_integrations

        present = get_available_reporting_integrations()
        problems += [
            f"train.report_to: '{name}' needs a package that is missing; pip install {_PACKAGES.get(name, name)}"
            for name in recipe.train.report_to
            if name not in (*present, *_NOT_PACKAGES)
        ]
    package, install = _package_of(recipe.train.optim or "")
    if package and importlib.util.find_spec(package) is None:
        problems.append(f"train.optim: '{recipe.train.optim}' needs a package that is missing; pip install {install}")
    if zero.wanted(recipe) and importlib.util.find_spec("deepspeed") is None:
        problems.append(f"{zero.NAME}: needs DeepSpeed; pip install 'fulltune[deepspeed]'")
    return problems


def _package_of(optim: str) -> tuple[str, str]:
    """The module that one of transformers' optimizers needs, and what to install; empty for torch's and our own."""
    if optim in OWN_OPTIMIZERS:
        return "", ""
    if optim in ("adamw_torch_4bit", "adamw_torch_8bit"):
        return "torchao", "torchao"
    for start, module, package in _BEGINNINGS:
        if optim.startswith(start):
            return module, package
    return ("bitsandbytes", "bitsandbytes") if "bnb" in optim or optim.endswith(("_8bit", "_32bit")) else ("", "")


_BEGINNINGS = (
    ("galore", "galore_torch", "galore-torch"),
    ("apollo", "apollo_torch", "apollo-torch"),
    ("lomo", "lomo_optim", "lomo-optim"),
    ("adalomo", "lomo_optim", "lomo-optim"),
    ("grokadamw", "grokadamw", "grokadamw"),
    ("schedule_free", "schedulefree", "schedulefree"),
    ("stable_adamw", "optimi", "torch-optimi"),
    ("ademamix", "bitsandbytes", "bitsandbytes"),
)
_PACKAGES = {"azure_ml": "azureml-core", "comet_ml": "comet-ml", "kubeflow": "kubeflow-trainer"}
"""Trackers whose package has another name."""
_NOT_PACKAGES = ("all", "none", "flyte")
"""Words of transformers, and the tracker that it cannot look for."""


def training_arguments(recipe: Recipe, plan: Plan, checkpoints: Path) -> Any:
    """Map recipe and plan; everything that is not named here keeps transformers' default."""
    from transformers import TrainingArguments

    train = recipe.train
    values: dict[str, Any] = {
        "output_dir": str(checkpoints),
        "per_device_train_batch_size": plan.micro_batch_size,
        "per_device_eval_batch_size": plan.eval_batch_size,
        "gradient_accumulation_steps": plan.gradient_accumulation_steps,
        "num_train_epochs": plan.num_train_epochs,
        "max_steps": plan.total_steps,
        "learning_rate": plan.learning_rate,
        "lr_scheduler_type": plan.lr_scheduler_type,
        "lr_scheduler_kwargs": train.lr_scheduler_kwargs or None,
        "warmup_steps": plan.warmup_steps,
        # Our own are made by the trainer; from transformers' AdamW it takes the rate, the betas and epsilon.
        "optim": "adamw_torch" if plan.optim in OWN_OPTIMIZERS else plan.optim,
        "weight_decay": train.weight_decay,
        "adam_beta1": train.adam_beta1,
        "adam_beta2": train.adam_beta2,
        "adam_epsilon": train.adam_epsilon,
        "max_grad_norm": train.max_grad_norm,
        "seed": plan.seed,
        "bf16": plan.precision == "bf16" and plan.weights_dtype != "bf16",
        "fp16": plan.precision == "fp16",
        "activation_checkpointing": plan.activation_checkpointing,
        "use_cpu": plan.device == "cpu",
        "logging_strategy": "steps",
        "logging_steps": plan.logging_steps,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "eval_strategy": "steps",
        "eval_steps": plan.eval_steps,
        "save_strategy": "steps",
        "save_steps": plan.save_steps,
        # Ours keeps the best one and only counts checkpoints that are whole: see checkpoints.py.
        "save_total_limit": None,
        "metric_for_best_model": plan.metric,
        "greater_is_better": plan.greater_is_better,
        "report_to": list(train.report_to) or "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": plan.device == "cuda",
    }
    if plan.num_processes > 1 and plan.device == "cpu":
        values["ddp_backend"] = "gloo"
    extra = dict(train.extra)
    if plan.torch_compile:
        extra["torch_compile"] = True
    if zero.wanted(recipe):
        # Checked again: a file can have changed since the plan was made.
        problems = zero.disagreements(
            recipe, plan.micro_batch_size, plan.gradient_accumulation_steps, plan.num_processes, plan.precision
        )
        if problems:
            raise RecipeError(problems)
        extra["deepspeed"] = zero.settings(recipe)
    try:
        made = TrainingArguments(**values, **extra)
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise RecipeError(f"train: transformers refuses these settings: {' '.join(str(error).split())}") from None
    if made.n_gpu > 1:
        # The Trainer would split each micro batch over all GPUs it sees (DataParallel) and scale the loss.
        made._n_gpu = 1
    return made
