"""What is measured and what is taken, as tables."""

from __future__ import annotations

from typing import Any

import pytest

from fulltune.records.plan import Setting, TimeNeed
from fulltune.records.training import MeasuredSetting
from fulltune.train.parent import measure
from fulltune.train.parent.measure import with_measurements
from fulltune.train.parent.next_attempt import settings_with_reasons
from tests.plans import outcome, plan, recipe

GIB = 2**30


def row(name: str, seconds: float, problem: str | None = None, **changes: Any) -> MeasuredSetting:
    return MeasuredSetting(name=name, kind="lever", changes=changes, train_seconds=seconds, problem=problem)


# ---- what is tried ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "train", "expected"),
    [
        (
            "text-classification",
            {},
            ["fp32, no speedups", "+ bf16 computations", "+ activation checkpointing", "+ 8-bit"],
        ),
        (
            "causal-lm",
            {},
            ["fp32, no speedups", "+ bf16 computations", "+ chunked loss", "+ activation checkpointing", "+ 8-bit"],
        ),
        ("text-classification", {"precision": "bf16", "optim": "adafactor"}, ["bf16, no speedups", "+ activation"]),
        (
            "causal-lm",
            {"precision": "fp32", "chunked_loss": True, "activation_checkpointing": False},
            ["fp32, no speedups", "+ 8-bit"],
        ),
        ("text-classification", {"max_grad_norm": 0, "optim": "adamw_torch"}, ["fp32", "+ bf16", "+ act"]),
    ],
)
def test_levers_are_those_that_the_recipe_leaves_open_and_the_task_has(
    task: str, train: dict[str, Any], expected: list[str]
) -> None:
    planned = plan(precision=train.get("precision", "bf16"), gradient_accumulation_steps=1)

    rows = measure.speedups_to_measure(recipe(task, train=train), planned)

    assert len(rows) == len(expected)
    assert all(one.name.startswith(name) for one, name in zip(rows, expected, strict=True))


def test_levers_add_up_and_leave_alone_what_the_recipe_gives() -> None:
    rows = measure.speedups_to_measure(
        recipe(train={"activation_checkpointing": True}), plan(activation_checkpointing=True)
    )

    assert [one.changes for one in rows] == [
        {"precision": "fp32", "optim": "adamw_torch_fused"},
        {"precision": "bf16", "optim": "adamw_torch_fused"},
        {"precision": "bf16", "optim": "adamw_8bit"},
    ]


@pytest.mark.parametrize(
    ("micro", "settings", "expected"),
    [
        (32, {}, [16, 8]),
        (8, {}, [4, 2, 16, 32]),
        (1, {}, [2, 4]),
        (8, {"train": {"micro_batch_size": 8}}, []),
    ],
)
def test_micro_batches_are_the_neighbours_among_the_divisors(
    micro: int, settings: dict[str, Any], expected: list[int]
) -> None:
    planned = plan(global_batch_size=32, micro_batch_size=micro, gradient_accumulation_steps=32 // micro)

    rows = measure.micro_batches_to_measure(recipe(**settings), planned, {"precision": "bf16"})

    assert [setting.changes["micro_batch_size"] for setting in rows] == expected
    for setting in rows:
        assert setting.changes["micro_batch_size"] * setting.changes["gradient_accumulation_steps"] == 32
        assert setting.changes["eval_batch_size"] == 2 * setting.changes["micro_batch_size"]
        assert setting.changes["precision"] == "bf16"


@pytest.mark.parametrize(
    ("seconds", "lacking", "problem"),
    [
        (3600.0, "", None),
        (3600.0, "C++ compiler", "not tried: no C++ compiler was found"),
        (59.0, "", "not tried: the run takes 59 s, and compiling takes a minute or two"),
    ],
)
def test_compiling_is_tried_where_it_can_pay(seconds: float, lacking: str, problem: str | None) -> None:
    (setting,) = measure.compilation_to_measure(
        recipe(), row("best", seconds, precision="bf16", chunked_loss=True), lacking
    )

    assert setting.problem == problem
    assert setting.changes == {"precision": "bf16", "chunked_loss": True, "torch_compile": True}
    for train in ({"torch_compile": False}, {"placement": "zero2"}):
        assert measure.compilation_to_measure(recipe(train=train), row("best", seconds), lacking) == []


# ---- what is taken ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([("a", 10.0, ""), ("b", 5.0, ""), ("c", 7.0, "")], "b"),
        ([("a", 10.0, ""), ("b", 9.8, ""), ("c", 12.0, "")], "a"),  # as fast: the one with fewer changes
        ([("a", 10.0, ""), ("b", 5.0, "does not fit")], "a"),
        ([("a", 0.0, "memory ran out"), ("b", 5.0, "")], "b"),
        ([("a", 0.0, "memory ran out")], None),
        ([], None),
    ],
)
def test_fastest_that_fits_is_taken_the_earliest_of_equals(
    rows: list[tuple[str, float, str]], expected: str | None
) -> None:
    best = measure.find_fastest([row(*one) for one in rows])

    assert (None if best is None else best.name) == expected


def test_settings_carry_the_measured_values_and_the_reason() -> None:
    settings = (
        Setting(name="train.precision", value="fp32", reason="x", is_automatic=True),
        Setting(name="train.micro_batch_size", value=32, reason="x", is_automatic=True),
        Setting(name="gradient accumulation", value=1, reason="global batch / micro batch", is_automatic=True),
        Setting(name="train.seed", value=42, reason="from the recipe", is_automatic=False),
    )
    changes = {
        "precision": "bf16",
        "micro_batch_size": 16,
        "gradient_accumulation_steps": 2,
        "chunked_loss": False,
        "torch_compile": True,
    }

    result = settings_with_reasons(
        plan(settings=settings), changes, lambda old: "derived" if " " in old.name else "measured"
    )

    assert [(one.name, one.value, one.reason) for one in result] == [
        ("train.precision", "bf16", "measured"),
        ("train.micro_batch_size", 16, "measured"),
        ("gradient accumulation", 2, "derived"),
        ("train.seed", 42, "from the recipe"),
        ("train.torch_compile", True, "measured"),
    ]


# ---- a probe's outcome -----------------------------------------------------------------------------------------

TIME = TimeNeed(
    train_seconds=20.0, eval_seconds=1.0, save_seconds=0.0, tokens=5000, tokens_per_second=250.0, source="dry-run step"
)


@pytest.mark.parametrize(
    ("status", "changes", "problem", "tokens_per_second"),
    [
        ("done", {"forecast": TIME, "dry_run_growth_bytes": GIB, "dry_run_loss": 2.5}, None, 200.0),
        ("done", {"forecast": TIME, "dry_run_growth_bytes": 3 * GIB}, "does not fit into 2 GiB", 200.0),
        ("out_of_memory", {"reason": "can't allocate\n  8 bytes"}, "memory ran out: can't allocate 8 bytes", 0.0),
        ("refused", {"reason": "model: has no eager attention"}, "model: has no eager attention", 0.0),
        ("crashed", {"reason": "x " * 90}, "x " * 57 + "[...]", 0.0),
    ],
)
def test_outcome_of_a_probe_becomes_a_row(
    status: Any, changes: dict[str, Any], problem: str | None, tokens_per_second: float
) -> None:
    result = with_measurements(row("a", 0.0), outcome(status, **changes), 4000.0, 2 * GIB)

    assert result.problem == problem
    assert result.tokens_per_second == tokens_per_second  # without padding
    assert result.peak_memory_bytes == changes.get("dry_run_growth_bytes", 0)
    assert result.loss == changes.get("dry_run_loss")
