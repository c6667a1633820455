"""A run that goes on with another placement or number of processes: what stays, what is planned anew."""

from __future__ import annotations

from typing import Any

import pytest

from fulltune.errors import RecipeError
from fulltune.plan import changed as planning
from fulltune.records.plan import Setting
from tests import plans


@pytest.mark.parametrize(
    ("planned", "train", "expected"),
    [
        ({}, {}, True),
        ({}, {"placement": "single"}, True),
        ({}, {"num_processes": 2}, False),
        ({"placement": "ddp", "num_processes": 2}, {"num_processes": 2}, True),
        ({"placement": "ddp", "num_processes": 2}, {"placement": "fsdp2", "num_processes": 2}, False),
        ({"placement": "fsdp2", "num_processes": 2}, {"placement": "fsdp2", "num_processes": 4}, False),
        ({"placement": "ddp", "num_processes": 2}, {"num_processes": 2, "num_machines": 2}, False),
        ({"placement": "ddp", "num_processes": 4, "num_machines": 4}, {"num_processes": 4, "num_machines": 2}, False),
        ({"placement": "zero3"}, {"placement": "zero3", "offload": "all"}, False),
        ({"placement": "zero3", "offload": "all"}, {"placement": "zero3", "offload": "all"}, True),
        ({"placement": "deepspeed"}, {"extra": {"deepspeed": {}}}, True),
        ({"placement": "zero3"}, {"extra": {"deepspeed": {}}}, False),
    ],
)
def test_plan_is_kept_where_the_recipe_asks_for_no_other_place(
    planned: dict[str, Any], train: dict[str, Any], expected: bool
) -> None:
    assert planning.has_same_placement(plans.plan(**planned), plans.recipe(train=train)) is expected


def _setting(name: str, value: Any, reason: str) -> Setting:
    return Setting(name=name, value=value, reason=reason, is_automatic=True)


def test_only_the_place_is_planned_anew() -> None:
    settings = (
        _setting("method.learning_rate", 1e-3, "found"),
        _setting("train.micro_batch_size", 8, "fits"),
        _setting("train.optim", "adamw_8bit", "memory ran out"),
    )
    begun = plans.plan(settings=settings, learning_rate=1e-3, rollbacks=(4,), optim="adamw_8bit", total_steps=10)
    other = (
        _setting("method.learning_rate", 5e-5, "usual"),
        _setting("train.micro_batch_size", 2, "fits in each"),
        _setting("train.placement", "fsdp2", "given"),
        _setting("train.optim", "adamw_torch_fused", "usual"),
        _setting("evaluate.batch_size", 32, "fits"),
        _setting("train.num_machines", 2, "given"),
    )
    anew = plans.plan(
        **{"settings": other, "learning_rate": 5e-5, "placement": "fsdp2", "num_processes": 2, "total_steps": 99},
        **{"micro_batch_size": 2, "gradient_accumulation_steps": 2, "eval_batch_size": 32, "available_bytes": 7},
        **{"activation_checkpointing": True, "chunked_loss": True, "num_machines": 2},
    )

    moved = planning.with_new_placement(begun, anew)

    kept = ("learning_rate", "total_steps", "optim", "rollbacks", "global_batch_size", "seed", "trial")
    assert {name: getattr(moved, name) for name in kept} == {name: getattr(begun, name) for name in kept}
    placed = (
        "placement",
        "num_processes",
        "num_machines",
        "micro_batch_size",
        "gradient_accumulation_steps",
        "eval_batch_size",
    )
    placed += ("available_bytes", "activation_checkpointing", "chunked_loss")
    assert {name: getattr(moved, name) for name in placed} == {name: getattr(anew, name) for name in placed}
    assert {one.name: (one.value, one.reason) for one in moved.settings} == {
        "method.learning_rate": (1e-3, "found"),
        "train.micro_batch_size": (2, "fits in each"),
        "train.optim": ("adamw_8bit", "memory ran out"),
        "train.placement": ("fsdp2", "given"),
        "train.num_machines": (2, "given"),
        "evaluate.batch_size": (32, "fits"),
    }


def test_run_that_goes_on_keeps_the_rows_of_its_steps() -> None:
    """Left open, they would follow from the number of processes."""
    begun = plans.plan(global_batch_size=32)
    assert planning.recipe_for_resuming(plans.recipe(train={"num_processes": 2}), begun).train.global_batch_size == 32
    with pytest.raises(
        RecipeError, match="started with 32 rows per step, which cannot be divided among 3 processes; set a"
    ):
        planning.recipe_for_resuming(plans.recipe(train={"num_processes": 3}), begun)
    with pytest.raises(RecipeError, match="cannot be divided among 2 processes in micro batches of 24"):
        planning.recipe_for_resuming(plans.recipe(train={"num_processes": 2, "micro_batch_size": 24}), begun)


def test_optimizer_that_cannot_run_there_is_said() -> None:
    """Memory ran out before, and the run took one that the recipe does not name."""
    begun = plans.plan(optim="adamw_8bit")
    with pytest.raises(RecipeError, match=r"train\.placement: zero3: the run started with adamw_8bit"):
        planning.recipe_for_resuming(plans.recipe(train={"placement": "zero3", "num_processes": 2}), begun)
    for placement in ("ddp", "fsdp2"):
        planning.recipe_for_resuming(plans.recipe(train={"placement": placement, "num_processes": 2}), begun)
