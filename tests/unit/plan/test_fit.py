"""The plan as tables of numbers: rates, epochs, batches, memory, steps."""

from __future__ import annotations

import math
from typing import Any

import pytest

from fulltune.errors import DoesNotFitError, RecipeError
from fulltune.hardware import Gpu, Machine
from fulltune.model import Shapes
from fulltune.plan import defaults, fit, memory
from fulltune.recipe import Recipe
from fulltune.records import DataSummary, Plan, SplitSummary

GB = 10**9
CPU = Machine(cpu="x", num_cores=16, memory_bytes=16 * GB, memory_available_bytes=12 * GB, cpu_bf16_speedup=1.1)
ZERO3 = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}}
BERT = Shapes(
    model_type="bert",
    is_decoder=False,
    num_parameters=110_000_000,
    num_tensors=200,
    num_layers=12,
    hidden_size=768,
    vocab_size=30_000,
    position_limit=512,
)


def summary(rows: int = 3200, kind: Any = "single_label") -> DataSummary:
    split = SplitSummary(
        rows=rows,
        tokens=rows * 20,
        trained_tokens=rows,
        truncated_rows=0,
        dropped_rows=0,
        length_percentiles={"p50": 20, "p95": 30, "max": 64},
    )
    return DataSummary(
        task="text-classification",
        problem_type=kind,
        columns={"text": "text", "label": "label"},
        labels=("a", "b"),
        max_length=64,
        max_length_reason="the longest row",
        splits={"train": split, "eval": split, "test": split},
        sources={},
        fingerprint="x",
    )


def planned(
    rows: int = 3200,
    machine: Machine = CPU,
    shapes: Shapes = BERT,
    disk: int = 100 * GB,
    kind: str = "single_label",
    **blocks: Any,
) -> Plan:
    values = {"model": "m", "task": "text-classification", "data": {"train": "a"}, **blocks}
    return fit(Recipe.model_validate(values), shapes, summary(rows, kind), machine, disk)


@pytest.mark.parametrize(
    ("parameters", "is_decoder", "rate"),
    [
        (22e6, False, 2e-4),
        (110e6, False, 5e-5),
        (340e6, False, 2e-5),
        (900e6, False, 1e-5),
        (135e6, True, 5e-5),
        (1.5e9, True, 2e-5),
        (7e9, True, 1e-5),
        (30e9, True, 5e-6),
    ],
)
def test_learning_rate_falls_with_size(parameters: float, is_decoder: bool, rate: float) -> None:
    assert defaults.learning_rate(int(parameters), is_decoder)[0] == rate


@pytest.mark.parametrize(
    ("task", "rows", "epochs"),
    [
        ("text-classification", 500, 10),
        ("text-classification", 2000, 5),
        ("text-classification", 10_000, 3),
        ("causal-lm", 500, 3),
        ("causal-lm", 10_000, 2),
    ],
)
def test_epochs_fall_with_rows(task: str, rows: int, epochs: float) -> None:
    assert defaults.num_train_epochs(task, rows)[0] == epochs


@pytest.mark.parametrize(
    ("batch", "processes", "row_bytes", "available", "micro"),
    [(32, 1, 1, 100, 32), (32, 1, 10, 100, 4), (32, 2, 1, 100, 16), (30, 1, 10, 120, 6), (32, 1, 1000, 100, 1)],
)
def test_micro_batch_is_the_largest_divisor_that_fits(
    batch: int, processes: int, row_bytes: int, available: int, micro: int
) -> None:
    assert defaults.micro_batch_size(batch, processes, row_bytes, available)[0] == micro


@pytest.mark.parametrize(
    ("kind", "choices", "tokens"), [("single_label", 0, 100), ("choice", 4, 400), ("source_target", 0, 200)]
)
def test_row_of_several_sequences_counts_each(kind: str, choices: int, tokens: int) -> None:
    assert memory.row_tokens(100, kind, choices) == tokens


def test_micro_batch_of_choices_is_smaller() -> None:
    tight = CPU.model_copy(update={"memory_available_bytes": int(4.5 * GB)})
    data = summary().model_copy(update={"task": "multiple-choice", "problem_type": "choice", "num_choices": 5})
    recipe = Recipe.model_validate({"model": "m", "task": "multiple-choice", "data": {"train": "a"}})
    assert fit(recipe, BERT, data, tight, 100 * GB).micro_batch_size < planned(machine=tight).micro_batch_size


def test_memory_of_the_state_is_sixteen_bytes_a_parameter_in_fp32() -> None:
    assert memory.state_bytes(1000, "fp32").total == 16_000
    assert memory.state_bytes(1000, "bf16").total == 8_000
    assert memory.checkpoint_bytes(1000, "fp32") == 12_000
    assert memory.row_bytes(10, 2, 32, 100, "text-classification", True) < memory.row_bytes(
        10, 2, 32, 100, "text-classification", False
    )


@pytest.mark.parametrize(
    ("rows", "train", "steps"),
    [
        (3200, {"num_train_epochs": 2, "global_batch_size": 32}, 200),
        (3201, {"num_train_epochs": 2, "global_batch_size": 32}, 202),
        (3200, {"num_train_epochs": 0.5, "global_batch_size": 32}, 50),
        (3200, {"max_steps": 7}, 7),
        (3200, {}, 500),
    ],
)
def test_steps_follow_from_rows_epochs_and_batch(rows: int, train: dict[str, Any], steps: int) -> None:
    assert planned(rows, train=train).total_steps == steps


@pytest.mark.parametrize(
    ("train", "warmup"),
    [
        ({"max_steps": 100}, 10),
        ({"max_steps": 100, "warmup_ratio": 0.5}, 50),
        ({"max_steps": 100, "warmup_steps": 7}, 7),
        ({"max_steps": 5}, 0),
    ],
)
def test_warmup_steps(train: dict[str, Any], warmup: int) -> None:
    assert planned(train=train).warmup_steps == warmup


def test_warmup_steps_longer_than_the_run_are_refused() -> None:
    with pytest.raises(RecipeError, match="warmup_steps: 500, but the run has 100 steps"):
        planned(train={"max_steps": 100, "warmup_steps": 500})


@pytest.mark.parametrize("rows", [20, 100, 300, 3200])
@pytest.mark.parametrize(
    "train", [{}, {"num_processes": 3}, {"micro_batch_size": 5}, {"global_batch_size": 24, "num_processes": 2}]
)
def test_batch_is_micro_times_accumulation_times_processes(rows: int, train: dict[str, Any]) -> None:
    plan = planned(rows, train=train)
    assert plan.global_batch_size == plan.micro_batch_size * plan.gradient_accumulation_steps * plan.num_processes
    assert math.isclose(plan.num_train_epochs * math.ceil(rows / plan.global_batch_size), plan.total_steps)


def test_batch_that_processes_cannot_share_is_refused() -> None:
    with pytest.raises(ValueError, match="global_batch_size: 8 is not a multiple of num_processes 3"):
        planned(train={"global_batch_size": 8, "num_processes": 3})


@pytest.mark.parametrize(
    ("machine", "model", "train", "precision"),
    [
        ({}, {}, {}, "fp32"),
        ({"cpu_bf16_speedup": 3.1}, {}, {}, "bf16"),
        ({"gpus": (Gpu(name="a", memory_bytes=24 * GB, bf16=True),)}, {}, {}, "bf16"),
        ({"gpus": (Gpu(name="a", memory_bytes=24 * GB, bf16=False),)}, {}, {}, "fp16"),
        ({"gpus": (Gpu(name="a", memory_bytes=24 * GB, bf16=True),)}, {}, {"device": "cpu"}, "fp32"),
        ({}, {"weights_dtype": "bf16"}, {}, "bf16"),
        ({"cpu_bf16_speedup": 3.1}, {}, {"precision": "fp32"}, "fp32"),
    ],
)
def test_precision_follows_the_machine(
    machine: dict[str, Any], model: dict[str, Any], train: dict[str, Any], precision: str
) -> None:
    plan = planned(machine=CPU.model_copy(update=machine), model={"name": "m", **model}, train=train)
    assert plan.precision == precision


@pytest.mark.parametrize(
    ("ratio", "reason"),
    [
        (3.14, "bf16 is 3.1 times as fast as fp32 here (measured); weights stay fp32"),
        (0.1, "bf16 is 0.1 times as fast as fp32 here (measured); it needs 1.2 to be taken"),
    ],
)
def test_precision_on_a_cpu_says_what_was_measured(ratio: float, reason: str) -> None:
    plan = planned(machine=CPU.model_copy(update={"cpu_bf16_speedup": ratio}))
    assert {setting.name: setting.reason for setting in plan.settings}["train.precision"] == reason


@pytest.mark.parametrize(
    ("kind", "metric", "greater"),
    [
        ("single_label", "accuracy", True),
        ("multi_label", "f1_micro", True),
        ("regression", "spearman", True),
    ],
)
def test_metric_default_follows_the_problem(kind: str, metric: str, greater: bool) -> None:
    plan = planned(kind=kind)
    assert (plan.metric, plan.greater_is_better) == (metric, greater)


@pytest.mark.parametrize(
    ("error", "changes", "words"),
    [
        (RecipeError, {"train": {"device": "cuda"}}, "torch sees no GPU"),
        (RecipeError, {"train": {"precision": "fp16"}}, "not possible on a CPU"),
        (RecipeError, {"evaluate": {"metric": "bleu"}}, "expected one of accuracy"),
        (
            DoesNotFitError,
            {"machine": CPU.model_copy(update={"memory_available_bytes": GB})},
            "need 1.6 GiB, but 0.9 GiB",
        ),
        (DoesNotFitError, {"train": {"num_processes": 8}}, "need 13.1 GiB"),
        (RecipeError, {"train": {"num_processes": 17}}, "17, but this machine lets us use 16 CPU core"),
        (
            RecipeError,
            {"train": {"num_processes": 2, "extra": {"deepspeed": {**ZERO3, "train_batch_size": 7}}}},
            "train_batch_size is 7, but train.global_batch_size gives 32",
        ),
        (
            DoesNotFitError,
            {
                "machine": CPU.model_copy(
                    update={"memory_available_bytes": GB, "gpus": (Gpu(name="g", memory_bytes=80 * GB, bf16=True),)}
                ),
                "train": {"extra": {"deepspeed": ZERO3}},
            },
            "what is offloaded needs 1.6 GiB, but 0.9 GiB of the host's memory",
        ),
        (DoesNotFitError, {"disk": GB}, "on disk, but 0.9 GiB are free"),
    ],
)
def test_plan_that_cannot_work_is_refused(error: type[Exception], changes: dict[str, Any], words: str) -> None:
    with pytest.raises(error, match=words):
        planned(**changes)


def test_weights_and_state_that_are_shared_out_count_once() -> None:
    """Eight processes with a copy each need 13.1 GiB of the 12 GB."""
    shared = planned(train={"num_processes": 8, "extra": {"deepspeed": ZERO3}})
    assert shared.num_processes == 8


def test_every_value_has_a_reason_and_each_setting_stands_once() -> None:
    settings = planned(train={"seed": 3}).settings
    names = [setting.name for setting in settings]
    assert len(names) == len(set(names))
    assert all(setting.reason for setting in settings)
    by_name = {setting.name: setting for setting in settings}
    assert by_name["train.seed"].reason == "from the recipe"
    assert not by_name["train.seed"].chosen
    assert by_name["method.learning_rate"].chosen
