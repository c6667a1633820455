"""The plan as tables of numbers: rates, epochs, batches, memory, steps."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from fulltune.errors import DoesNotFitError, RecipeError
from fulltune.footprint.records import Footprint
from fulltune.models.shapes import Shapes
from fulltune.plan import defaults, gpus
from fulltune.plan.budget import LIBRARIES_BYTES
from fulltune.plan.fit import make_plan
from fulltune.plan.savings import why_loss_not_chunked
from fulltune.recipe.methods import FullMethod
from fulltune.records.data import MixedSummary
from fulltune.records.plan import Plan
from fulltune.system.hardware import Gpu, Machine
from tests import plans
from tests.unit.plan import sizes

GB = 10**9
CPU = Machine(cpu="x", num_cores=16, memory_bytes=16 * GB, memory_available_bytes=12 * GB, cpu_bf16_speedup=1.1)
CARD = Gpu(name="g", memory_bytes=80 * GB, capability=(8, 0))
ZERO3 = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}}


def footprint() -> Footprint:
    """A model whose rows of 64 tokens have 512 MiB of activations, or 32 MiB when these are recomputed."""
    kept, recomputed = (sizes.moment("end of forward", activations=size) for size in (2**23, 2**19))
    return Footprint(
        weights_dtype="fp32",
        largest_tensor=1,
        sequences_per_row=1,
        variants=sizes.variants(kept, recomputed),
        evaluation=dict.fromkeys(sizes.PRECISIONS, (recomputed,)),
        flops_per_token=2.0 * sizes.BERT.num_parameters,
        attention_flops_per_pair=1.0,
    )


def planned(rows: int = 3200, machine: Machine = CPU, disk: int = 100 * GB, **blocks: Any) -> Plan:
    workload = replace(sizes.bert(rows, **blocks), footprint=lambda weights_dtype: footprint())
    return make_plan(workload, gpus.local_hardware(machine, disk))


def test_mixed_rows_lengthen_the_epochs_and_not_their_number() -> None:
    """An epoch is one pass over the task's rows: of these 3,200 the usual 5, each with 1,600 others."""
    task = sizes.bert(3200, preserve={"drift": False})  # how many generic texts are read depends on the training
    others = task.summary.splits["train"].model_copy(update={"rows": 400, "tokens": 400 * 64})
    mixed = MixedSummary(where="b", weight=1 / 3, rows_per_epoch=1600, kind="single label", counts=others)
    both = task.summary.model_copy(update={"mixed": (mixed,)})
    fleet = gpus.local_hardware(CPU.model_copy(update={"cpu_flops": 1e12}), 100 * GB)
    alone, plan = (make_plan(replace(task, summary=one), fleet) for one in (task.summary, both))
    assert (alone.num_train_epochs, alone.total_steps, alone.eval_steps) == (5, 500, 100)
    assert (plan.num_train_epochs, plan.total_steps, plan.eval_steps) == (5, 750, 150)
    assert both.tokens_per_epoch == (3200 + 1600) * 64
    assert alone.time is not None
    assert plan.time is not None
    assert plan.time.tokens / alone.time.tokens == pytest.approx(1.5, rel=0.01)


def test_learning_rate_falls_with_size_and_epochs_with_rows() -> None:
    millions = (22, 110, 340, 900)
    assert [defaults.full_learning_rate(one * 10**6, False)[0] for one in millions] == [2e-4, 5e-5, 2e-5, 1e-5]
    assert [defaults.full_learning_rate(one * 10**9, True)[0] for one in (1, 2, 7, 30)] == [5e-5, 2e-5, 1e-5, 5e-6]
    small, large = (cast("Shapes", SimpleNamespace(num_parameters=one * 10**6, is_decoder=False)) for one in (22, 340))
    full = FullMethod(kind="full")
    for task, of_small, of_large in (("text-classification", 2e-4, 2e-5), ("text-pairs", 5e-5, 2e-5)):
        rates = [defaults.default_learning_rate(full, shapes, task)[0] for shapes in (small, large)]
        assert rates == [of_small, of_large]
    rows = (500, 2000, 10_000)
    assert [defaults.default_num_epochs("text-classification", one)[0] for one in rows] == [10, 5, 3]
    assert [defaults.default_num_epochs("causal-lm", one)[0] for one in rows] == [3, 3, 2]


@pytest.mark.parametrize(
    ("gigabytes", "savings"),
    [
        (30.0, (32, False, "adamw_torch_fused")),
        (12.0, (8, False, "adamw_torch_fused")),
        (2.9, (1, False, "adamw_torch_fused")),
        (2.8, (8, True, "adamw_torch_fused")),
        (2.45, (1, False, "adamw_8bit")),
    ],
)
def test_savings_are_the_fastest_that_fit_and_change_numbers_last(gigabytes: float, savings: tuple[Any, ...]) -> None:
    plan = planned(machine=CPU.model_copy(update={"memory_available_bytes": int(gigabytes * GB)}))
    assert (plan.micro_batch_size, plan.activation_checkpointing, plan.optim) == savings
    assert plan.memory is not None
    assert plan.memory.peak <= gigabytes * GB - LIBRARIES_BYTES


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
    with pytest.raises(RecipeError, match="warmup_steps: 500, but the run has only 100 steps"):
        planned(train={"max_steps": 100, "warmup_steps": 500})


@pytest.mark.parametrize("rows", [20, 100, 300, 3200])
@pytest.mark.parametrize(
    "train", [{}, {"num_processes": 3}, {"micro_batch_size": 5}, {"global_batch_size": 24, "num_processes": 2}]
)
def test_batch_is_micro_times_accumulation_times_processes(rows: int, train: dict[str, Any]) -> None:
    plan = planned(rows, train=train)
    assert plan.global_batch_size == plan.micro_batch_size * plan.gradient_accumulation_steps * plan.num_processes
    assert math.isclose(plan.num_train_epochs * math.ceil(rows / plan.global_batch_size), plan.total_steps)


@pytest.mark.parametrize(
    ("machine", "model", "train", "precision"),
    [
        ({}, {}, {}, "fp32"),
        ({"cpu_bf16_speedup": 3.1}, {}, {}, "bf16"),
        ({"gpus": (CARD,)}, {}, {}, "bf16"),
        ({"gpus": (CARD,)}, {}, {"device": "cpu"}, "fp32"),
        ({}, {"weights_dtype": "bf16"}, {}, "bf16"),
        ({"cpu_bf16_speedup": 3.1}, {}, {"precision": "fp32"}, "fp32"),
    ],
)
def test_precision_follows_the_machine(
    machine: dict[str, Any], model: dict[str, Any], train: dict[str, Any], precision: str
) -> None:
    plan = planned(machine=CPU.model_copy(update=machine), model={"name": "m", **model}, train=train)
    assert plan.precision == precision


def test_precision_on_a_cpu_says_what_was_measured() -> None:
    plan = planned(machine=CPU.model_copy(update={"cpu_bf16_speedup": 0.1}))
    expected = "bf16 is about 0.1 times as fast as fp32 here (measured); worthwhile from 1.2 times"
    assert {setting.name: setting.reason for setting in plan.settings}["train.precision"] == expected


def test_global_batch_that_many_processes_round_up_says_so() -> None:
    machine = CPU.model_copy(update={"gpus": (CARD,) * 24})
    plan = planned(machine=machine, train={"num_processes": 24})
    reason = {setting.name: setting.reason for setting in plan.settings}["train.global_batch_size"]
    assert plan.global_batch_size == 48
    assert reason.startswith(
        "32 is usual for text-classification with this many rows; rounded up to a multiple of 24 rows"
    )


@pytest.mark.parametrize("placement", ["single", "ddp", "fsdp2", "zero2", "zero3"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_placement_begins_and_is_watched_alike_and_says_what_makes_its_result_another(
    placement: str, precision: str
) -> None:
    processes = 1 if placement == "single" else 2
    plan = planned(train={"placement": placement, "num_processes": processes, "precision": precision})
    assert plan.head_init == "probe"
    assert plan.generic.texts_per_evaluation == planned().generic.texts_per_evaluation > 0
    reason = {setting.name: setting.reason for setting in plan.settings}["train.precision"]
    rounds = "ZeRO computes with weights rounded to bf16, so results differ from other placements"
    assert (rounds in reason) == (placement.startswith("zero") and precision == "bf16")


@pytest.mark.parametrize(
    ("error", "changes", "words"),
    [
        (RecipeError, {"train": {"device": "cuda"}}, "torch sees no GPU"),
        (RecipeError, {"train": {"precision": "fp16"}}, "not possible on a CPU"),
        (RecipeError, {"evaluate": {"metric": "bleu"}}, "expected one of accuracy"),
        (
            DoesNotFitError,
            {"machine": CPU.model_copy(update={"memory_available_bytes": GB})},
            r"a step needs 1.25 GiB \(.*\), even with micro batch 1, adamw_8bit, .* only 254 MiB of memory",
        ),
        (
            DoesNotFitError,
            {"train": {"num_processes": 8, "placement": "ddp"}},
            "but only 731 MiB of memory for each of 8 processes is available",
        ),
        (RecipeError, {"train": {"num_processes": 17}}, "17, but this machine has 16 CPU cores available"),
        (
            RecipeError,
            {"train": {"num_processes": 2, "extra": {"deepspeed": {**ZERO3, "train_batch_size": 7}}}},
            "train_batch_size is 7, but train.global_batch_size gives 32",
        ),
        (
            DoesNotFitError,
            {
                "machine": CPU.model_copy(update={"memory_available_bytes": GB, "gpus": (CARD,)}),
                "train": {"placement": "zero3", "offload": "all"},
            },
            "train.placement: zero3: offloading needs 2.25 GiB of host memory, but only 954 MiB",
        ),
        (
            DoesNotFitError,
            {"disk": GB},
            r"need 5.82 GiB on disk \(4 checkpoints of 1.24 GiB, and 855 MiB for the model\), but only 954 MiB is free",
        ),
    ],
)
def test_plan_that_cannot_work_is_refused(error: type[Exception], changes: dict[str, Any], words: str) -> None:
    with pytest.raises(error, match=words):
        planned(**changes)


@pytest.mark.parametrize(
    ("train", "own_loss", "plain", "reason"),
    [
        ({"extra": {"deepspeed": ZERO3}}, False, True, "ZeRO "),
        ({"torch_compile": True}, False, True, ""),
        ({}, True, True, "your own loss"),
        ({}, False, False, "scales or caps its logits"),
        ({}, False, True, ""),
    ],
)
def test_one_reason_keeps_the_logits_whole(train: dict[str, Any], own_loss: bool, plain: bool, reason: str) -> None:
    recipe = plans.recipe("causal-lm", train=train)
    obstacle = why_loss_not_chunked(recipe, plain, own_loss=own_loss)
    assert reason in (obstacle or "")
    assert bool(obstacle) == bool(reason)


def test_every_value_has_a_reason_and_each_setting_stands_once() -> None:
    settings = planned(train={"seed": 3}).settings
    names = [setting.name for setting in settings]
    assert len(names) == len(set(names))
    assert all(setting.reason for setting in settings)
    by_name = {setting.name: setting for setting in settings}
    assert by_name["train.seed"].reason == "from the recipe"
    assert not by_name["train.seed"].is_automatic
    assert by_name["method.learning_rate"].is_automatic


def test_memory_of_compiled_blocks_is_not_counted_and_the_plan_says_so() -> None:
    plain, compiled = (planned(train={"torch_compile": on}) for on in (False, True))
    assert compiled.torch_compile
    assert compiled.memory == plain.memory
    values = {setting.name: setting.value for setting in compiled.settings}
    assert values["memory.torch_compile"] == "not counted"
    assert "memory.torch_compile" not in {setting.name for setting in plain.settings}
