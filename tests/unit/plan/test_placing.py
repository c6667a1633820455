"""Which placement several processes get when the recipe leaves it open, and what is said when none fits."""

from __future__ import annotations

from typing import Any

import pytest

from fulltune.errors import DoesNotFitError
from fulltune.plan import gpus
from fulltune.plan.fit import make_plan, why_not_fsdp2
from fulltune.records.plan import Plan
from tests.unit.plan import sizes


def planned(hardware: str, **train: Any) -> Plan:
    task = sizes.llama(train={"global_batch_size": 64, **train})
    return make_plan(task, gpus.parse_hardware(hardware))


@pytest.mark.parametrize(
    ("hardware", "train", "placement", "reason"),
    [
        ("1x MI325X", {}, "single", "one process"),
        ("2x MI325X", {"num_processes": 2}, "ddp", "a full copy fits in each process"),
        ("8x A100-80GB", {"num_processes": 8}, "fsdp2", "ddp needs "),
        ("8x A100-80GB", {"num_processes": 8, "placement": "fsdp2"}, "fsdp2", "from the recipe"),
        ("2x MI325X", {"num_processes": 2, "placement": "fsdp2"}, "fsdp2", "from the recipe"),
        ("8x A100-80GB", {"num_processes": 8, "placement": "zero3"}, "zero3", "from the recipe"),
        ("2x H100-NVL", {"num_processes": 2, "optim": "adamw_8bit"}, "ddp", "a full copy fits in each process"),
        ("8x A100-80GB", {"num_processes": 8, "optim": "adamw_8bit"}, "fsdp2", "ddp needs "),
    ],
)
def test_placement_of_a_7b_model(hardware: str, train: dict[str, Any], placement: str, reason: str) -> None:
    plan = planned(hardware, **train)
    assert plan.placement == placement
    setting = next(one for one in plan.settings if one.name == "train.placement")
    assert setting.value == placement
    assert setting.reason.startswith(reason)
    assert setting.is_automatic == (reason != "from the recipe")
    assert (plan.sent_bytes == 0) == (plan.num_processes == 1)
    if placement == "fsdp2":
        assert plan.optim == train.get("optim", "adamw_torch_fused")


def test_where_neither_fits_both_needs_are_named() -> None:
    with pytest.raises(DoesNotFitError) as refusal:
        planned("2x L4", num_processes=2)
    problem, *ways = refusal.value.problems
    assert "(train.placement: ddp needs " in problem
    assert ", fsdp2 " in problem
    assert ways


def test_a_model_without_blocks_or_of_a_method_that_trains_little_is_not_shared_out() -> None:
    task, machine = sizes.llama(), gpus.parse_hardware("2x A100-80GB").machine
    assert "blocks" in str(why_not_fsdp2(task.recipe, task.shapes.model_copy(update={"units": None}), machine))
    assert "every" in str(why_not_fsdp2(task.recipe, task.shapes.model_copy(update={"num_trainable": 1}), machine))


@pytest.mark.parametrize(
    ("train", "said"), [({}, ""), ({"optim": "adafactor"}, "adafactor needs whole"), ({"device": "cpu"}, "the GPUs")]
)
def test_what_fsdp2_cannot_have_keeps_it_from_being_chosen(train: dict[str, Any], said: str) -> None:
    task, machine = sizes.llama(train=train), gpus.parse_hardware("2x A100-80GB").machine
    assert said in (why_not_fsdp2(task.recipe, task.shapes, machine) or "")
    assert bool(said) == bool(why_not_fsdp2(task.recipe, task.shapes, machine))
