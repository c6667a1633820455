"""Operations, seconds and money."""

from __future__ import annotations

from typing import Any

import pytest

from fulltune.errors import RecipeError
from fulltune.plan import gpus, time
from fulltune.records.data import DataSummary
from fulltune.records.plan import MemorySettings
from fulltune.records.probe import MOST_FEATURE_BYTES, MOST_SOLVER_BYTES
from fulltune.system.parallel_layout import ParallelLayout
from tests.unit.plan import sizes
from tests.unit.plan.sizes import LLAMA


def test_step_of_a_decoder_is_six_operations_a_parameter_and_token_eight_when_recomputed() -> None:
    update = {"flops_per_token": 2 * 7e9, "attention_flops_per_pair": 0.0}
    work = time.Work(sizes.footprint(LLAMA).model_copy(update=update), tokens_per_row=512)
    assert work.step_flops(4, recomputed=False) == pytest.approx(6 * 7e9 * 4 * 512)
    assert work.step_flops(4, recomputed=True) == pytest.approx(8 * 7e9 * 4 * 512)


def test_attention_grows_with_the_square_of_the_length() -> None:
    attention = sizes.footprint(LLAMA).model_copy(update={"flops_per_token": 0.0})
    short, twice = (time.Work(attention, length).forward_flops(1) for length in (100, 200))
    assert twice == 4 * short


@pytest.mark.parametrize(
    ("mean", "p95", "grouped", "packed", "tokens"),
    [(20, 60, True, False, 21.4), (20, 60, False, False, 60), (20, 60, True, True, 20), (62, 64, True, False, 64)],
)
def test_tokens_of_a_row_count_padding(mean: int, p95: int, grouped: bool, packed: bool, tokens: float) -> None:
    data = sizes.summary("text-classification", 1000, 64)
    split = data.splits["train"].model_copy(
        update={"tokens": 1000 * mean, "length_percentiles": {"p50": mean, "p95": p95, "max": 64}}
    )
    data = data.model_copy(update={"splits": {**data.splits, "train": split}, "packed": packed})
    work = time.work_per_row(data, sizes.footprint(sizes.BERT), grouped)
    assert work.tokens_per_row == pytest.approx(tokens)


@pytest.mark.parametrize(
    ("hardware", "precision", "hidden", "tera"),
    [
        ("1x A100-80GB", "bf16", 4096, 312 * 0.5),
        ("8x A100-80GB", "bf16", 1024, 312 * 0.3),
        ("1x A100-80GB", "bf16", 384, 312 * 0.15),
        ("1x A100-80GB", "fp32", 4096, 312 * 0.5 / 8),
        ("cpu, 16 cores", "fp32", 384, 0.05 * 16 * 0.75),
        ("cpu, 16 cores", "bf16", 384, 0.05 * 16 * 0.57),
    ],
)
def test_rate_of_a_device(hardware: str, precision: str, hidden: int, tera: float) -> None:
    assert time.device_flops(gpus.parse_hardware(hardware), precision, hidden) == pytest.approx(tera * 1e12)


def test_rate_of_unknown_hardware_is_none() -> None:
    cpu = gpus.parse_hardware("cpu")
    slow = cpu.machine.model_copy(update={"cpu_flops": 0.0})
    assert time.device_flops(cpu.model_copy(update={"machine": slow}), "fp32", 512) is None


@pytest.mark.parametrize(
    ("text", "rate", "currency"),
    [("2.5", 2.5, ""), ("2.5 USD", 2.5, "USD"), ("3€", 3, "€"), ("$1.20", 1.2, "$"), (" 0 ", 0, ""), ("7 Kč", 7, "Kč")],
)
def test_price_is_read(text: str, rate: float, currency: str) -> None:
    assert time.parse_price(text) == (rate, currency)


@pytest.mark.parametrize("text", ["cheap", "", "1,5", "nan", "-2"])
def test_price_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match=f"--price: '{text}' is not a price; write the cost of one device per hour"):
        time.parse_price(text)


# ---- bytes that a process sends in a step, by hand -----------------------------------------------------------------

P = LLAMA.num_parameters
UNITS = LLAMA.units
assert UNITS is not None
FSDP2 = ParallelLayout(3, False, False, engine="fsdp2")
SETTINGS = MemorySettings(micro_batch_size=1, longest_tokens=8, num_processes=8, precision="bf16")


@pytest.mark.parametrize(
    ("shared", "changes", "each_pass", "each_step"),
    [
        (None, {}, 0, 2 * 4 * P),
        (None, {"weights_dtype": "bf16"}, 0, 2 * 2 * P),
        (None, {"num_trainable": 10**6, "num_all_parameters": P}, 0, 2 * 4 * 10**6),
        # The head is put together once, everything else twice.
        (FSDP2, {}, 4 * (3 * P - UNITS.persistent), 0),
        (ParallelLayout(2, False, False), {}, 2 * P, 2 * P),
        (ParallelLayout(3, False, False), {}, 3 * 2 * P, 0),
        (ParallelLayout(3, True, True), {}, 3 * 2 * P, 0),
        (ParallelLayout(3, False, False), {"precision": "fp32"}, 3 * 4 * P, 0),
        # What stays as it was has no gradients.
        (ParallelLayout(3, False, False), {"num_trainable": 10**6, "num_all_parameters": P}, 2 * 2 * P + 2 * 10**6, 0),
        (ParallelLayout(1, False, False), {}, 0, 2 * 2 * P),
    ],
)
@pytest.mark.parametrize("processes", [2, 8])
def test_bytes(
    shared: ParallelLayout | None, changes: dict[str, Any], each_pass: int, each_step: int, processes: int
) -> None:
    sent = time.communication_bytes(LLAMA, SETTINGS.changed(num_processes=processes, **changes), shared)
    share = (processes - 1) / processes
    assert sent == pytest.approx((share * each_pass, share * each_step))


# ---- a new head's linear probe -----------------------------------------------------------------------------------


def with_labels(count: int, rows: int) -> DataSummary:
    labels = tuple(f"label {number}" for number in range(count))
    return sizes.summary("text-classification", rows, 64).model_copy(update={"labels": labels})


def test_rows_are_those_that_are_looked_at() -> None:
    summary = with_labels(10, 100_000)
    assert time.linear_probe_cost(summary, 384)[0] == 20_000 + 1_000
    assert time.linear_probe_cost(summary, 4096)[0] == MOST_FEATURE_BYTES // (12 * 4096) + 1_000
    assert time.linear_probe_cost(summary, 4096)[1] <= time.PROBE_PARTS * MOST_FEATURE_BYTES + MOST_SOLVER_BYTES


@pytest.mark.parametrize("count", [5_000, 30_000])
def test_classes_that_are_too_many_to_fit_cost_nothing(count: int) -> None:
    few, many = with_labels(100, 20_000), with_labels(count, 20_000)
    assert time.linear_probe_cost(few, 768)[2] > time.linear_probe_cost(many, 768)[2] == time.PROBE_SECONDS
    assert time.linear_probe_cost(many, 768)[1] < time.linear_probe_cost(few, 768)[1]
