"""The one place where our settings become `transformers.TrainingArguments`."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from typing import Any

from fulltune.errors import FulltuneError, RecipeError, SetupError
from fulltune.recipe import rules as recipe_rules
from fulltune.recipe.fields import Recipe
from fulltune.recipe.rules import NO_PACKAGES, as_arguments
from fulltune.recipe.training import OWN_OPTIMIZERS
from fulltune.records.plan import Plan
from fulltune.system import sharing


def check_extra(recipe: Recipe, *, runs_here: bool = True) -> None:
    """Refuse what cannot be trained, before any row is read: by the recipe alone, by an engine's settings, and, if it
    runs here, by missing packages."""
    problems = recipe_rules.problems_of(recipe)
    if recipe.train.engine_by:
        try:
            sharing.settings(recipe)
        except RecipeError as error:
            problems += error.problems
    if problems:
        raise RecipeError(problems)
    missing = _missing_packages(recipe) if runs_here else []
    if missing:
        raise SetupError(missing)


def _missing_packages(recipe: Recipe) -> list[str]:
    """Packages that the settings need and that are not installed, each with the command that installs it."""
    problems = []
    if recipe.train.report_to:
        from transformers.integrations.integration_utils import get_available_reporting_integrations

        present = get_available_reporting_integrations()
        problems += [
            f"train.report_to: '{name}' needs a package that is missing; pip install {_PACKAGES.get(name, name)}"
            for name in recipe.train.report_to
            if name not in (*present, *NO_PACKAGES)
        ]
    package, install = package_of(recipe.train.optim or "")
    if package and importlib.util.find_spec(package) is None:
        problems.append(f"train.optim: '{recipe.train.optim}' needs a package that is missing; pip install {install}")
    if recipe.train.use_liger_kernel and importlib.util.find_spec("liger_kernel") is None:
        problems.append("train.use_liger_kernel: needs a package that is missing; pip install 'fulltune[liger]'")
    kernel = recipe.model.attn_implementation
    of_kernel = _KERNELS.get(kernel or "", ())
    if of_kernel and not any(map(importlib.util.find_spec, of_kernel)):
        names = " or ".join(name.replace("_", "-") for name in of_kernel)
        problems.append(f"model.attn_implementation: '{kernel}' needs a package that is missing: {names}")
    return [*problems, *sharing.missing_package(recipe)]


def package_of(optim: str) -> tuple[str, str]:
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
_KERNELS = {
    "flash_attention_2": ("flash_attn", "kernels"),
    "flash_attention_3": ("flash_attn_interface", "kernels"),
}
"""Attention to the modules of which it needs one; by the second, transformers takes the kernel from the Hub."""
_PACKAGES = {"azure_ml": "azureml-core", "comet_ml": "comet-ml", "kubeflow": "kubeflow-trainer"}
"""Trackers whose package has another name."""


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
    }
    if plan.num_processes > 1 and plan.device == "cpu":
        values["ddp_backend"] = "gloo"
    # The Trainer cannot save an optimizer whose state FSDP2 shares out: `FullTrainer` does.
    values["save_only_model"] = plan.placement == "fsdp2"
    extra = as_arguments(train.extra)
    # Copied to the GPU while the next rows are collated: pinned memory alone would not do that.
    if isinstance(config := extra.get("accelerator_config") or {}, dict):  # else a file of the user's
        extra["accelerator_config"] = {"non_blocking": plan.device == "cuda", **config}
    if plan.loader_workers:
        extra["dataloader_num_workers"] = plan.loader_workers
    if extra.get("dataloader_num_workers") and hasattr(os, "fork"):
        # What is forked needs not be pickled, and touches no GPU.
        extra.setdefault("dataloader_multiprocessing_context", "fork")
    extra |= {sharing.PACKAGE: sharing.completed(recipe, plan)} if recipe.train.engine_by else {}
    try:
        made = TrainingArguments(**values, **extra)
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise _refused(" ".join(str(error).split()), isinstance(error, RuntimeError), plan) from None
    if made.n_gpu > 1:
        # The Trainer would split each micro batch over all GPUs it sees (DataParallel) and scale the loss.
        made._n_gpu = 1
    return made


def _refused(said: str, when_running: bool, plan: Plan) -> FulltuneError:
    """Why there are no arguments; the processes are connected where they are made."""
    if not when_running or re.search("gloo|nccl|connect|socket", said, re.IGNORECASE) is None:
        return RecipeError(f"train: transformers refuses these settings: {said}")
    return SetupError(
        f"train.num_processes: {plan.num_processes} processes cannot reach each other: {said}; of several machines "
        "name the network interface that leads to the others in GLOO_SOCKET_IFNAME (on GPUs in NCCL_SOCKET_IFNAME, "
        "too), and open their ports to each other"
    )
