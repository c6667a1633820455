"""Plans and outcomes as records, for tables of numbers."""

from __future__ import annotations

from typing import Any

from fulltune.recipe.fields import Recipe
from fulltune.records.plan import DiskNeed, MemoryNeed, Plan
from fulltune.records.training import Outcome

MIB = 2**20


def plan(**changes: Any) -> Plan:
    """A plan of ten steps with eight rows each, in one pass."""
    values: dict[str, Any] = {
        "trial": "full-seed42",
        "method": "full",
        "seed": 42,
        "learning_rate": 1e-3,
        "layerwise_lr_decay": 1.0,
        "num_train_epochs": 1.0,
        "total_steps": 10,
        "warmup_steps": 0,
        "lr_scheduler_type": "linear",
        "global_batch_size": 8,
        "micro_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "num_processes": 1,
        "eval_batch_size": 16,
        "device": "cpu",
        "precision": "fp32",
        "weights_dtype": "fp32",
        "activation_checkpointing": False,
        "eval_steps": 10,
        "save_steps": 10,
        "logging_steps": 1,
        "metric": "accuracy",
        "greater_is_better": True,
        "num_parameters": 10,
        "longest_tokens": 512,
        "state": {"weights": 1, "gradients": 1, "optimizer": 2},
        "disk": DiskNeed(checkpoint_bytes=3, num_checkpoints=1, model=1),
        "settings": (),
    }
    return Plan(**{**values, **changes})


def outcome(status: str, number: int = 1, **values: Any) -> Outcome:
    """How an attempt of that plan ended."""
    given = {"reason": "because", "trial": "full-seed42", "attempt": number}
    return Outcome(status=status, **{**given, **values})  # type: ignore[arg-type]  # of this type


def recipe(task: str = "text-classification", **blocks: Any) -> Recipe:
    """A recipe that leaves everything open but what is given: `train={"optim": "adafactor"}`."""
    return Recipe.model_validate({"model": "m", "task": task, "data": {"train": "rows.csv"}, **blocks})


def need(plan: Plan) -> MemoryNeed:
    """100 MiB of weights; a row has 40 MiB of activations (4 when they are recomputed) and 60 MiB of logits."""
    rows = plan.micro_batch_size
    kinds: dict[Any, int] = {
        "weights": 100 * MIB,
        "gradients": 100 * MIB,
        "optimizer": (52 if plan.optim == "adamw_8bit" else 200) * MIB,
        "activations": (4 if plan.activation_checkpointing else 40) * rows * MIB,
        "logits": (6 if plan.chunked_loss else 60 * rows) * MIB,
        "buffers": 0,
    }
    phases: dict[Any, int] = {"loading": 100 * MIB, "step": sum(kinds.values()), "evaluation": 150 * MIB}
    return MemoryNeed(kinds=kinds, phases=phases)
