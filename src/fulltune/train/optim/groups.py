from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from fulltune.records.plan import Plan
from fulltune.train.optim import optimizers

_LAYER = re.compile(r"\.(?:layers?|h|blocks?|block)\.(\d+)\.")
_EMBEDDING = re.compile(r"(?:^|\.)(?:embed|wte|wpe|word_embeddings|shared)")


Group = dict[str, Any]


def planned_optimizer(
    model: nn.Module, plan: Plan, arguments: TrainingArguments | SimpleNamespace, head_modules: Sequence[str]
) -> tuple[type[torch.optim.Optimizer], list[Group], dict[str, Any]]:
    """Return the planned optimizer's class, parameter groups and keyword arguments."""
    kind, options = Trainer.get_optimizer_cls_and_kwargs(cast("TrainingArguments", arguments), cast("Any", model))
    if (own := optimizers.adamw_arguments(plan.optim, plan.bf16_rounding, plan.seed)) is not None:
        kind, options = optimizers.AdamW, {name: options[name] for name in ("lr", "betas", "eps")} | own
    decayed = set(Trainer.get_decay_parameter_names(cast("Any", None), model))  # needs no trainer
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    begins = tuple(f"{path}." for path in head_modules)
    head = {name for name in parameters if name.startswith(begins)}
    groups = parameter_groups(list(parameters), decayed, plan, arguments.weight_decay, head)
    return kind, [{**group, "params": [parameters[name] for name in group["params"]]} for group in groups], options


def parameter_groups(
    names: Sequence[str], decayed: Collection[str], plan: Plan, weight_decay: float, head: Collection[str] = ()
) -> list[Group]:
    """Split parameter names into groups with weight decay (`decayed`) and without, in the order of transformers'
    checkpoints. Layer-wise learning rate decay also splits them by depth, top first. The `head` groups come last and
    use the plan's `head_learning_rate`."""
    body = [name for name in names if name not in head]
    if plan.layerwise_lr_decay == 1.0:
        groups = _group_by_decay(body, decayed, weight_decay)
    else:
        groups = _group_by_depth(body, decayed, plan, weight_decay)
    of_head = _group_by_decay([name for name in names if name in head], decayed, weight_decay)
    return [*groups, *({**group, "lr": plan.head_learning_rate or 0.0} for group in of_head if group["params"])]


def _group_by_decay(names: Sequence[str], decayed: Collection[str], weight_decay: float) -> list[Group]:
    """Return two groups: `decayed` names with weight decay, and the others without."""
    return [
        {"params": [name for name in names if name in decayed], "weight_decay": weight_decay},
        {"params": [name for name in names if name not in decayed], "weight_decay": 0.0},
    ]


def _group_by_depth(names: Sequence[str], decayed: Collection[str], plan: Plan, weight_decay: float) -> list[Group]:
    """Return groups, top layers first, whose learning rate decays with depth."""
    num_layers = max((int(match.group(1)) + 1 for name in names if (match := _LAYER.search(name))), default=0)
    groups: dict[tuple[int, bool], list[str]] = {}
    for name in names:
        groups.setdefault((num_layers + 1 - layer_depth(name, num_layers), name not in decayed), []).append(name)
    return [
        {
            "params": members,
            "lr": plan.learning_rate * plan.layerwise_lr_decay**below_top,
            "weight_decay": 0.0 if plain else weight_decay,
        }
        for (below_top, plain), members in sorted(groups.items())
    ]


def layer_depth(name: str, num_layers: int) -> int:
    """Return 0 for embeddings, 1 to `num_layers` for layers, and `num_layers` + 1 for parameters above them."""
    if match := _LAYER.search(name):
        return int(match.group(1)) + 1
    return 0 if _EMBEDDING.search(name) else num_layers + 1
