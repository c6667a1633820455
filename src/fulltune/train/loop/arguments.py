from __future__ import annotations

import importlib.util
import os
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fulltune.errors import FulltuneError, RecipeError, SetupError
from fulltune.recipe import rules as recipe_rules
from fulltune.recipe.fields import Recipe
from fulltune.recipe.rules import NO_PACKAGES, as_training_arguments
from fulltune.recipe.tasks import TEXT_PAIRS
from fulltune.recipe.training import OWN_OPTIMIZERS
from fulltune.records.plan import Plan
from fulltune.system import parallel_layout
from fulltune.system.run_folder import flatten_settings

if TYPE_CHECKING:
    from transformers import TrainingArguments


def check_trainable(recipe: Recipe, *, check_packages: bool = True) -> None:
    """Raise `RecipeError` if the recipe's settings conflict, or `SetupError` if `check_packages` is set and packages
    are missing."""
    problems = recipe_rules.problems_of(recipe)
    if recipe.train.zero_enabled_by:
        try:
            parallel_layout.zero_settings(recipe)
        except RecipeError as error:
            problems += error.problems
    if problems:
        raise RecipeError(problems)
    missing = _missing_package_messages(recipe) if check_packages else []
    if missing:
        raise SetupError(missing)


def _missing_package_messages(recipe: Recipe) -> list[str]:
    problems = []
    if recipe.train.report_to:
        from transformers.integrations.integration_utils import get_available_reporting_integrations

        present = get_available_reporting_integrations()
        problems += [
            f"train.report_to: '{name}' needs a missing package; run: pip install {_PACKAGES.get(name, name)}"
            for name in recipe.train.report_to
            if name not in (*present, *NO_PACKAGES)
        ]
    package, install = package_for_optimizer(recipe.train.optim or "")
    if package and importlib.util.find_spec(package) is None:
        problems.append(f"train.optim: '{recipe.train.optim}' needs a missing package; run: pip install {install}")
    if recipe.train.use_liger_kernel and importlib.util.find_spec("liger_kernel") is None:
        problems.append("train.use_liger_kernel: needs a missing package; run: pip install 'fulltune[liger]'")
    kernel = recipe.model.attn_implementation
    of_kernel = _KERNELS.get(kernel or "", ())
    if of_kernel and not any(map(importlib.util.find_spec, of_kernel)):
        names = " or ".join(name.replace("_", "-") for name in of_kernel)
        problems.append(f"model.attn_implementation: '{kernel}' needs a missing package: {names}")
    if recipe.train.zero_enabled_by and importlib.util.find_spec(parallel_layout.PACKAGE) is None:
        problems.append(f"{recipe.train.zero_enabled_by}: needs DeepSpeed; {parallel_layout.INSTALL}")
    return problems


def package_for_optimizer(optim: str) -> tuple[str, str]:
    """Return an optimizer's module and pip package, or two empty strings if it needs none."""
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
_KERNELS = {
    "flash_attention_2": ("flash_attn", "kernels"),
    "flash_attention_3": ("flash_attn_interface", "kernels"),
}
"""Modules by attention implementation; one of them must be installed."""
_PACKAGES = {"azure_ml": "azureml-core", "comet_ml": "comet-ml", "kubeflow": "kubeflow-trainer"}


def training_arguments(recipe: Recipe, plan: Plan, checkpoints: Path) -> TrainingArguments:
    """Convert recipe and plan to transformers' `TrainingArguments`; `checkpoints` is the output folder."""
    from transformers import TrainingArguments

    train = recipe.train
    # Pairs read apart start well, and the loss tells on few eval rows whether later weights are better still.
    by_loss = recipe.task == TEXT_PAIRS and recipe.evaluate.metric is None
    os.environ |= {"MLFLOW_DISABLE_TELEMETRY": "true", "WANDB_ERROR_REPORTING": "false"} | os.environ
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
        # The trainer creates fulltune's optimizers; they use the rate, betas and epsilon of transformers' AdamW.
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
        # A streamed state is on the disk after each step, and a checkpoint notes where the run is.
        "save_steps": 1 if plan.placement == "stream" else plan.save_steps,
        # `checkpoints.delete_old_checkpoints` counts only whole checkpoints and keeps the best one.
        "save_total_limit": None,
        "metric_for_best_model": "loss" if by_loss else plan.metric,
        "greater_is_better": plan.greater_is_better and not by_loss,
        "report_to": list(train.report_to) or "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }
    if plan.num_processes > 1 and plan.device == "cpu":
        values["ddp_backend"] = "gloo"
    # The Trainer cannot save optimizer state that FSDP2 shards: `FullTrainer` does.
    values["save_only_model"] = plan.placement == "fsdp2"
    extra = {"run_name": f"{checkpoints.parents[1].name}-{plan.trial}"} | as_training_arguments(train.extra)
    # Rows are copied to the GPU while the next ones are collated; pinned memory alone does not do that.
    if isinstance(config := extra.get("accelerator_config") or {}, dict):  # else a file of the user's
        extra["accelerator_config"] = {"non_blocking": plan.device == "cuda", **config}
    if plan.loader_workers:
        extra["dataloader_num_workers"] = plan.loader_workers
    if extra.get("dataloader_num_workers"):
        # Forked workers need no pickling and touch no GPU.
        extra.setdefault("dataloader_multiprocessing_context", "fork")
    if recipe.train.zero_enabled_by:
        extra[parallel_layout.PACKAGE] = parallel_layout.resolve_settings(recipe, plan)
    try:
        arguments = TrainingArguments(**values, **extra)
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise _error_from_transformers(" ".join(str(error).split()), isinstance(error, RuntimeError), plan) from None
    settings = flatten_settings(recipe.model_dump(mode="json", exclude_defaults=True), "recipe.")
    arguments.to_dict = partial(dict, arguments.to_dict() | settings)  # type: ignore[method-assign]  # for trackers; picklable
    if arguments.n_gpu > 1:
        # The Trainer would split each micro batch over all visible GPUs (DataParallel) and scale the loss.
        arguments._n_gpu = 1
    return arguments


def _error_from_transformers(message: str, is_runtime_error: bool, plan: Plan) -> FulltuneError:
    if not is_runtime_error or re.search("gloo|nccl|connect|socket", message, re.IGNORECASE) is None:
        return RecipeError(f"train: transformers rejects these settings: {message}")
    return SetupError(
        f"train.num_processes: {plan.num_processes} processes cannot reach each other: {message}; on several machines, "
        "set GLOO_SOCKET_IFNAME (on GPUs also NCCL_SOCKET_IFNAME) to the network interface that reaches the others, "
        "and open the ports between them"
    )
