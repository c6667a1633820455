"""Placements as tables of numbers: bytes where they lie, what is short, and what holds a step back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fulltune.plan import gpus, placements
from fulltune.plan.workload import Workload, make_basis
from fulltune.records.plan import PlacementOption
from fulltune.text import to_yaml
from tests.unit.plan import sizes

P = sizes.LLAMA.num_parameters
BLOCK = 202_383_360  # parameters
ZERO2 = {"deepspeed": {"zero_optimization": {"stage": 2}}}
GIB = 2**30


def table(hardware: str, task: Workload | None = None, **train: Any) -> dict[str, PlacementOption]:
    fleet = gpus.parse_hardware(hardware)
    train = {"global_batch_size": 64, **train, "num_processes": fleet.num_devices}
    task = task or sizes.llama(train=train)
    options = placements.placement_table(make_basis(task, fleet))
    return {one.name: one for one in options}


def state(one: PlacementOption) -> int:
    return one.kinds["weights"] + one.kinds["gradients"] + one.kinds["optimizer"]


@pytest.mark.parametrize(
    ("name", "bytes_per_parameter"),
    [
        ("one device, AdamW fp32", 16.0),
        ("one device, 8-bit AdamW", 4 + 4 + 2.0625),
        ("one device, bf16 weights", 2 + 2 + 4),
        ("one device, bf16 + 8-bit", 2 + 2 + 2.0625),
        ("ZeRO-2, optimizer on host", 2.0),
        ("ZeRO-3, all on host", 0.0),
    ],
)
def test_state_on_one_device_in_bytes_a_parameter(name: str, bytes_per_parameter: float) -> None:
    # With a chunked loss the head's gradient is there twice for a moment.
    assert state(table("1x H100")[name]) / P == pytest.approx(bytes_per_parameter, rel=0.01)


@pytest.mark.parametrize(
    ("name", "bytes_per_parameter"),
    [
        ("8 copies, AdamW fp32", 16.0),
        ("ZeRO-2", 2 + 16 / 8),
        ("ZeRO-3", 18 / 8),
    ],
)
def test_state_on_each_of_eight_devices_in_bytes_a_parameter(name: str, bytes_per_parameter: float) -> None:
    assert state(table("8x H100")[name]) / P == pytest.approx(bytes_per_parameter, rel=0.01)


def test_fsdp2_shares_state_out_and_has_a_blocks_gradients_beside_its_parts() -> None:
    options = table("8x H100")["FSDP2"].kinds
    assert (options["weights"] + options["optimizer"]) / P == pytest.approx(12 / 8, rel=0.01)
    assert 0 < options["gradients"] <= 4 * P / 8 + 4 * BLOCK


@pytest.mark.parametrize(
    ("name", "host"),
    # 8.03 B parameters took 176 GB of host memory with ZeRO-3, all on the host.
    [("ZeRO-2, optimizer on host", 16 * 1.22), ("ZeRO-3, all on host", 176 / 8.03), ("one device, AdamW fp32", 0)],
)
def test_bytes_on_host_a_parameter(name: str, host: float) -> None:
    assert table("1x H100")[name].host_bytes / P == pytest.approx(host, rel=0.01)


def test_what_is_short_is_said_with_its_size() -> None:
    rows = table("1x RTX 4090, 64GB host")
    assert str(rows["one device, AdamW fp32"].shortage).startswith("device +")
    assert str(rows["ZeRO-3, all on host"].shortage).startswith("host +")


def test_cpu_has_nothing_to_offload_to() -> None:
    assert set(table("cpu, 16 cores, 256GB host")) == {
        "one device, AdamW fp32",
        "one device, 8-bit AdamW",
        "one device, bf16 weights",
        "one device, bf16 + 8-bit",
    }


@pytest.mark.parametrize("hardware", ["1x RTX 4090", "8x A100-80GB"])
def test_methods_that_train_little_have_only_placements_that_they_can_have(hardware: str) -> None:
    trained, added = 20_000_000, 20_000_000
    task = sizes.llama()
    shapes = task.shapes.model_copy(update={"num_all_parameters": P + added, "num_trainable": trained})
    rows = table(hardware, replace(task, shapes=shapes))

    # DeepSpeed and FSDP are there for full fine-tuning alone.
    assert all("copies" in name or "one device" in name for name in rows)
    assert all(one.host_bytes == 0 for one in rows.values())
    plain = rows[next(iter(rows))]
    assert plain.kinds["optimizer"] == 8 * trained
    assert plain.kinds["weights"] == 4 * (P + added)


@pytest.mark.parametrize(
    ("train", "model", "name", "how"),
    [
        ({}, {}, "2 copies, AdamW fp32", "as the recipe is"),
        ({}, {}, "ZeRO-2, optimizer on host", "train.placement: zero2, train.offload: optimizer"),
        ({"placement": "ddp"}, {}, "2 copies, AdamW fp32", "as the recipe is"),
        ({"placement": "zero2"}, {}, "2 copies, AdamW fp32", "train.placement: auto"),
        (
            {"placement": "zero3", "offload": "all"},
            {},
            "2 copies, AdamW fp32",
            "train.placement: auto, train.offload: none",
        ),
        ({"placement": "zero3", "offload": "all"}, {}, "ZeRO-3, all on host", "as the recipe is"),
        ({"placement": "fsdp2"}, {}, "FSDP2", "as the recipe is"),
        ({"optim": "adamw_8bit"}, {}, "2 copies, AdamW fp32", "train.optim: adamw_torch_fused"),
        ({}, {"weights_dtype": "bf16"}, "2 copies, bf16 weights", "as the recipe is"),
        (
            {"bf16_rounding": "kahan"},
            {"weights_dtype": "bf16"},
            "2 copies, AdamW fp32",
            "model.weights_dtype: fp32, train.bf16_rounding: null",
        ),
        ({"extra": ZERO2}, {}, "ZeRO-2", "as the recipe is"),
        ({"extra": ZERO2}, {}, "ZeRO-3", "train.placement: zero3, train.extra.deepspeed: null"),
    ],
)
def test_how_says_what_to_change_in_the_recipe(
    train: dict[str, Any], model: dict[str, Any], name: str, how: str
) -> None:
    train = {"global_batch_size": 64, "num_processes": 2, **train}
    assert _how(table("2x H100", sizes.llama(train=train, model={"name": "m", **model}))[name]) == how


def _how(one: PlacementOption) -> str:
    return ", ".join(f"{name}: {to_yaml(value)}" for name, value in one.settings.items()) or "as the recipe is"


@pytest.mark.parametrize("rows", [8, 16, 32])
def test_speed_of_a_measured_offload_run_is_met_within_a_factor_of_two(rows: int) -> None:
    # Llama-3.1-8B on an RTX 4090, rows of 1,024 tokens: 914, 1,373 and 1,791 tokens/s (SlideFormer's DeepSpeed runs).
    # The last is above the data sheet's rate if everything was recomputed.
    measured = {8: 914, 16: 1373, 32: 1791}[rows]
    train = {"global_batch_size": rows, "micro_batch_size": rows, "activation_checkpointing": True}
    task = sizes.llama(tokens=1024, train=train)
    one = table("1x RTX 4090, 256GB host", task)["ZeRO-3, all on host"]
    assert one.tokens_per_second is not None
    assert 0.5 < one.tokens_per_second * P / 8.03e9 / measured < 2


def test_unknown_gpu_has_bytes_and_no_speed() -> None:
    fleet = gpus.parse_hardware("1x H100").model_copy(update={"gpu_model": None})
    options = placements.placement_table(make_basis(sizes.llama(), fleet))
    assert all(one.device_bytes > 0 and one.tokens_per_second is None for one in options)


def test_micro_batch_is_the_fastest_that_fits() -> None:
    plain = table("1x A100-80GB", sizes.bert(tokens=512, train={"global_batch_size": 64}))["one device, AdamW fp32"]
    assert (plain.micro_batch_size, plain.activation_checkpointing) == (64, False)
    tight = table("1x RTX 3060 12GB", sizes.bert(tokens=512, train={"global_batch_size": 64}))
    assert tight["one device, AdamW fp32"].micro_batch_size < 64
    assert not tight["one device, AdamW fp32"].activation_checkpointing
    given = sizes.bert(train={"global_batch_size": 64, "micro_batch_size": 2, "activation_checkpointing": True})
    kept = table("1x A100-80GB", given)["one device, AdamW fp32"]
    assert (kept.micro_batch_size, kept.activation_checkpointing) == (2, True)


@pytest.mark.parametrize("where", [{}, {"extra": ZERO2}, {"placement": "zero2"}])
def test_chunked_loss_is_only_without_deepspeed(where: dict[str, Any]) -> None:
    train = {"activation_checkpointing": True, "micro_batch_size": 8, **where}
    rows = table("8x H100", sizes.llama(tokens=2048, train={"global_batch_size": 64, "num_processes": 8, **train}))
    whole = 8 * 2048 * 10 * sizes.LLAMA.vocab_size
    for name, one in rows.items():
        assert (one.kinds["logits"] == whole) == ("ZeRO" in name or "host" in name)
        assert one.kinds["logits"] <= whole


@pytest.mark.parametrize("rounding", ["stochastic", "kahan", "nearest"])
def test_bf16_weights_are_rounded_as_the_recipe_says(rounding: str) -> None:
    model = {"name": "m", "weights_dtype": "bf16"}
    task = sizes.llama(train={"global_batch_size": 4, "bf16_rounding": rounding}, model=model)
    one = table("1x H200", task)["one device, bf16 weights"]
    assert one.kinds["optimizer"] / P == (6 if rounding == "kahan" else 4)
    assert not one.settings
