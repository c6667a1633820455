"""The recipe's `train.placement`: what does not go together is said, and what is shared out follows from it."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from fulltune.system import parallel_layout
from fulltune.system.parallel_layout import ParallelLayout
from tests import plans

STATE = {"weights": 400, "gradients": 401, "optimizer": 800}


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        (
            {"placement": "single", "num_processes": 2},
            ["placement: single runs one process, but num_processes is 2; set 1"],
        ),
        (
            {"placement": "ddp"},
            ["placement: ddp needs num_processes: 2 or more; with one process use single"],
        ),
        (
            {"num_machines": 2, "num_processes": 3},
            ["num_processes: expected a multiple of num_machines"],
        ),
        ({"num_machines": 2}, ["(2), such as 2"]),
        ({"placement": "fsdp2"}, ["with one process use zero2 or zero3 with an offload"]),
        ({"offload": "optimizer"}, ["offload: 'optimizer' needs placement: zero2 or zero3, found auto"]),
        ({"placement": "zero2", "offload": "all"}, ["offload: 'all' needs placement: zero3, found zero2"]),
        ({"placement": "fsdp2", "num_processes": 2, "offload": "all"}, ["needs placement: zero3, found fsdp2"]),
        (
            {"placement": "fsdp2", "num_processes": 2, "optim": "adafactor"},
            ["optim: 'adafactor' needs whole tensors, but placement: fsdp2 shards them; expected one of adamw_8bit, "],
        ),
        ({"placement": "zero3", "extra": {"deepspeed": {}}}, ["placement and train.extra.deepspeed both set"]),
        (
            {"placement": "ddp", "offload": "all", "extra": {"deepspeed": {}}},
            [
                "placement: ddp needs",
                "placement and train.extra.deepspeed both",
                "offload and train.extra.deepspeed both",
            ],
        ),
    ],
)
def test_what_does_not_go_together_is_all_said(train: dict[str, Any], expected: list[str]) -> None:
    with pytest.raises(ValidationError) as refused:
        plans.recipe(train=train)
    (error,) = refused.value.errors()
    lines = error["msg"].removeprefix("Value error, ").splitlines()
    assert len(lines) == len(expected)
    assert all(one in line for one, line in zip(expected, lines, strict=True)), lines


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ({}, None),
        ({"placement": "single"}, None),
        ({"num_processes": 2}, None),
        ({"placement": "ddp", "num_processes": 2}, None),
        ({"placement": "fsdp2", "num_processes": 2}, ParallelLayout(3, False, False, engine="fsdp2")),
        ({"placement": "zero2"}, ParallelLayout(2, False, False)),
        ({"placement": "zero2", "offload": "optimizer"}, ParallelLayout(2, True, False)),
        ({"placement": "zero3", "offload": "all"}, ParallelLayout(3, True, True)),
    ],
)
def test_what_is_shared_out_follows_from_the_placement(train: dict[str, Any], expected: ParallelLayout | None) -> None:
    assert parallel_layout.layout_of(plans.recipe(train=train)) == expected


def test_each_process_has_a_part_rounded_up() -> None:
    whole = ParallelLayout(3, False, False, engine="fsdp2")
    assert whole.bytes_per_process(STATE, 2) == {"weights": 200, "gradients": 201, "optimizer": 400}
    assert whole.bytes_per_process(STATE, 1) == {"weights": 400, "gradients": 401, "optimizer": 800}
    assert {whole.tier_of(kind) for kind in ("weights", "gradients", "optimizer")} == {"device"}
    assert ParallelLayout(2, True, False).bytes_per_process(STATE, 4) == {
        "weights": 400,
        "gradients": 101,
        "optimizer": 200,
    }


def test_a_machine_has_its_share_of_the_processes() -> None:
    assert plans.recipe(train={"num_machines": 4, "num_processes": 32}).train.processes_per_machine == 8


def test_machines_are_of_the_place_and_not_of_the_result() -> None:
    alone = plans.recipe(train={"num_processes": 2})
    assert plans.recipe(train={"num_processes": 2, "num_machines": 2}).fingerprint() == alone.fingerprint()
