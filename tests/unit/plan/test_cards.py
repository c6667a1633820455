"""What follows from the GPUs that a run takes: the type of its computations, its memory, what saves memory on them."""

from __future__ import annotations

from typing import Any

import pytest

from fulltune.errors import RecipeError
from fulltune.plan import gpus, resolve
from fulltune.plan.settings import Reasons, with_settings
from fulltune.plan.survey import survey_placements
from fulltune.plan.workload import make_basis
from fulltune.recipe.fields import Recipe
from fulltune.system.hardware import Gpu, Machine
from tests.unit.plan import sizes

GIB = 2**30
A100 = Gpu(name="NVIDIA A100", memory_bytes=80 * GIB, capability=(8, 0), free_bytes=79 * GIB)
T4 = Gpu(name="Tesla T4", memory_bytes=15 * GIB, capability=(7, 5), free_bytes=14 * GIB)
BF16 = "{} computes in bf16; weights stay fp32"
FP16 = "{} has no bf16 (which needs 8.0), so fp16 with loss scaling is used; weights stay fp32"
FP32 = "{} has no tensor cores, so fp16 would be no faster and less exact"


H100 = Gpu(name="NVIDIA H100", memory_bytes=80 * GIB, capability=(9, 0), free_bytes=79 * GIB)
B200 = Gpu(name="NVIDIA B200", memory_bytes=180 * GIB, capability=(10, 0), free_bytes=179 * GIB)


def machine(*cards: Gpu) -> Machine:
    return Machine(
        cpu="x",
        num_cores=8,
        memory_bytes=64 * GIB,
        memory_available_bytes=60 * GIB,
        cpu_bf16_speedup=1.0,
        gpus=cards,
    )


def precision(there: Machine, **settings: Any) -> tuple[str, str]:
    """It, and why."""
    reasons = Reasons()
    recipe = with_settings(sizes.bert().recipe, {f"train.{name}": value for name, value in settings.items()})
    found = resolve.choose_precision(recipe, there, "cuda", reasons)
    [setting] = reasons.settings
    assert setting.value == found
    return found, setting.reason


@pytest.mark.parametrize(
    ("capability", "found", "reason"),
    [
        ((6, 1), "fp32", FP32),
        ((7, 0), "fp16", FP16),
        ((7, 5), "fp16", FP16),
        ((8, 0), "bf16", BF16),
        ((12, 0), "bf16", BF16),
    ],
)
def test_precision_follows_the_compute_capability(capability: tuple[int, int], found: str, reason: str) -> None:
    card = A100.model_copy(update={"name": "Card", "capability": capability})
    label = "Card (compute capability {}.{})".format(*capability)
    assert precision(machine(card)) == (found, reason.format(label))


def test_oldest_of_the_cards_that_are_used_decides_and_the_one_with_the_least_memory() -> None:
    mixed = machine(A100, T4)
    assert precision(mixed)[0] == "bf16", "one process takes the first"
    value, reason = precision(mixed, num_processes=2)
    label = "Tesla T4 (compute capability 7.5)"
    assert (value, reason) == (
        "fp16",
        FP16.format(label) + "; other GPUs support more, but all use the same precision",
    )
    assert "could do more" not in precision(machine(A100, H100), num_processes=2)[1]
    fleet = gpus.local_hardware(mixed, 10 * GIB)
    assert fleet.name == "this machine: 1x NVIDIA A100, 1x Tesla T4, 8 cores, 64 GiB"
    one, two = (make_basis(sizes.bert(train={"num_processes": number}), fleet) for number in (1, 2))
    assert one.where == "79 GiB of GPU memory"
    assert two.where == "14 GiB of GPU memory (GPU 1, Tesla T4, has the least free memory of 2 GPUs)"


def test_few_bytes_of_shared_memory_leave_images_to_the_training_process() -> None:
    asked = Recipe.model_validate({"model": "m", "task": "image-classification", "data": {"train": "t"}})
    for free, expected in ((2**26, 0), (2**31, 7), (None, 7)):
        reasons, here = Reasons(), machine(A100).model_copy(update={"num_cores": 8, "shared_memory_bytes": free})
        assert resolve.choose_loader_workers(asked, here, "cuda", reasons) == expected
        assert ("shared memory (/dev/shm) has only 64 MiB" in reasons.settings[0].reason) == (expected == 0)


@pytest.mark.parametrize("card", ["T4", "V100-16GB", "P100"])
@pytest.mark.parametrize("given", ["auto", "fp32"])
def test_bf16_weights_are_no_alternative_where_bf16_is_emulated(card: str, given: str) -> None:
    surveyed, plan = survey_placements(sizes.llama(train={"precision": given}), gpus.parse_hardware(f"1x {card}"))
    assert plan is None
    assert not [one.name for one in surveyed.placements if "bf16" in one.name]
    assert not [one.change for one in surveyed.ways_out if "bf16" in one.change]


@pytest.mark.parametrize(
    ("task", "device", "train", "workers"),
    [
        ("image-classification", "cuda", {}, 7),
        ("image-classification", "cuda", {"num_processes": 4}, 1),
        ("image-classification", "cuda", {"num_processes": 8}, 0),
        ("image-classification", "cuda", {"extra": {"dataloader_num_workers": 2}}, 0),
        ("image-classification", "cpu", {}, 0),
        ("causal-lm", "cuda", {}, 0),
    ],
)
def test_images_are_decoded_beside_the_gpu(task: str, device: str, train: dict[str, Any], workers: int) -> None:
    recipe, reasons = (
        Recipe.model_validate({"model": "m", "task": task, "data": {"train": "a"}, "train": train}),
        Reasons(),
    )
    assert resolve.choose_loader_workers(recipe, machine(A100), device, reasons) == workers
    assert all(setting.is_automatic and setting.value == workers for setting in reasons.settings)


@pytest.mark.parametrize(
    ("kernel", "card", "device", "precision", "problem"),
    [
        (None, T4, "cuda", "fp32", ""),
        ("sdpa", None, "cpu", "fp32", ""),
        ("flash_attention_2", A100, "cuda", "fp16", ""),
        ("flash_attention_2", B200, "cuda", "bf16", ""),
        ("flash_attention_2", A100, "cpu", "bf16", "only runs on a GPU; remove it"),
        ("flash_attention_2", T4, "cuda", "fp16", "capability 8.0 or newer (Ampere), but this is Tesla T4 (compute"),
        ("flash_attention_2", A100, "cuda", "fp32", "only computes in 16 bits, but train.precision is fp32"),
        ("flash_attention_3", H100, "cuda", "bf16", ""),
        ("flash_attention_3", T4, "cuda", "fp16", "capability 8.0 to 9.x (Ampere to Hopper), but this is Tesla T4"),
        (
            "flash_attention_3",
            B200,
            "cuda",
            "bf16",
            "capability 8.0 to 9.x (Ampere to Hopper), but this is NVIDIA B200",
        ),
    ],
)
def test_an_attention_kernel_that_cannot_be_had_is_refused_with_what_it_needs(
    kernel: str | None, card: Gpu | None, device: str, precision: str, problem: str
) -> None:
    recipe = with_settings(sizes.bert().recipe, {"model.attn_implementation": kernel})
    there = machine(*([card] if card else []))
    if not problem:
        resolve.check_kernels(recipe, there, device, precision)
        return
    with pytest.raises(RecipeError) as caught:
        resolve.check_kernels(recipe, there, device, precision)
    assert caught.value.problems[0].startswith(f"model.attn_implementation: {kernel} ")
    assert problem in caught.value.problems[0]


def test_of_several_cards_the_oldest_says_which_attention_can_be_had() -> None:
    recipe = with_settings(
        sizes.bert().recipe, {"model.attn_implementation": "flash_attention_2", "train.num_processes": 2}
    )
    with pytest.raises(RecipeError, match="this is Tesla T4"):
        resolve.check_kernels(recipe, machine(A100, T4), "cuda", "fp16")
