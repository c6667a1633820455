"""The whole survey on hardware that is not here: what is planned, with which placement, and what else there is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fulltune.errors import RecipeError
from fulltune.plan import cards, load, time
from fulltune.plan.survey import Wishes, survey, with_settings
from fulltune.records import Plan, Survey
from tests.unit.plan import sizes


def planned(hardware: str, task: load.Task | None = None, wishes: Wishes | None = None) -> tuple[Survey, Plan | None]:
    task, fleet = task or sizes.llama(), cards.parse(hardware)
    recipe = load.spread_over(task.recipe, fleet)
    return survey(replace(task, recipe=recipe, spread=recipe is not task.recipe), fleet, wishes or Wishes())


@pytest.mark.parametrize("card", cards.CARDS, ids=lambda card: card.name)
def test_encoder_is_planned_for_every_card(card: cards.Card) -> None:
    found, plan = planned(f"2x {card.name}, 256GB host", sizes.bert())
    assert plan is not None
    assert plan.time is not None
    assert (plan.device, plan.num_processes, plan.optim) == ("cuda", 2, "adamw_torch_fused")
    assert plan.precision == ("bf16" if card.bf16 else "fp16")
    assert found.placement == "2 copies, AdamW fp32"
    assert plan.global_batch_size == plan.micro_batch_size * plan.gradient_accumulation_steps * 2


@pytest.mark.parametrize("card", cards.CARDS, ids=lambda card: card.name)
def test_7b_on_eight_of_every_card_fits_or_has_ways_out(card: cards.Card) -> None:
    found, plan = planned(f"8x {card.name}")
    assert found.fits == (plan is not None)
    if plan is not None:
        chosen = next(one for one in found.placements if one.name == found.placement)
        assert chosen.fits
        assert chosen.runs
        assert found.ways_out == ()
    else:
        assert found.notes
        assert 1 <= len(found.ways_out) <= 3
        assert found.ways_out[0].enough


@pytest.mark.parametrize(
    ("hardware", "placement"),
    [
        ("1x MI325X", "one device, AdamW fp32"),
        ("8x A100-80GB", "ZeRO-2"),
        ("4x A100-80GB", "ZeRO-2"),
        ("1x RTX 4090, 64GB host", "ZeRO-3, all on disk"),
    ],
)
def test_placement_of_a_7b_model(hardware: str, placement: str) -> None:
    found, plan = planned(hardware)
    assert found.placement == placement
    assert plan is not None
    reasons = {one.name: one.reason for one in plan.settings}
    assert (reasons.get("train.extra") == f"placement: {placement}") == ("ZeRO" in placement)
    assert reasons["train.num_processes"] == ("one for each device" if plan.num_processes > 1 else "default")


def test_memory_of_the_row_is_the_plans() -> None:
    for hardware in ("8x A100-80GB", "1x MI325X"):
        found, plan = planned(hardware)
        assert plan is not None
        assert plan.memory is not None
        chosen = next(one for one in found.placements if one.name == found.placement)
        assert chosen.micro_batch_size == plan.micro_batch_size
        assert chosen.device_bytes == pytest.approx(plan.memory.peak, rel=0.02)


def test_time_and_price_follow_from_the_row() -> None:
    found, plan = planned("8x A100-80GB", wishes=Wishes(price=time.Price(2.0, "USD")))
    assert plan is not None
    assert plan.time is not None
    chosen = next(one for one in found.placements if one.name == found.placement)
    assert plan.time.tokens_per_second == pytest.approx(chosen.tokens_per_second)
    assert plan.time.tokens == pytest.approx(plan.total_steps * 64 * 512, rel=1e-6)
    assert plan.time.train_seconds == pytest.approx(plan.time.tokens / plan.time.tokens_per_second)
    assert found.price == pytest.approx(2.0 * 8 * plan.time.total_seconds / 3600)
    assert found.currency == "USD"
    assert found.time == plan.time


def test_nothing_fits_and_the_ways_out_say_what_would() -> None:
    found, plan = planned("1x T4, 16GB host, 50GB disk")
    assert plan is None
    assert (found.fits, found.placement, found.price, found.time) == (False, "", None, None)
    assert [way.enough for way in found.ways_out] == [True, True, True]
    assert found.ways_out[0].change.startswith("16x T4, ")
    assert found.ways_out[1].change.startswith("a host with ")
    assert {one.method: one.verdict for one in found.advice}["full fine-tuning"] == "leave"


def test_disk_too_small_has_ways_out_of_its_own() -> None:
    found, plan = planned("1x MI325X, 100GB disk")
    assert plan is None
    assert {way.where for way in found.ways_out} == {"disk"}
    assert "on disk" in found.notes[0]


def test_faster_and_cheaper_plans_are_named() -> None:
    found, _ = planned("1x RTX 4090, 64GB host")
    changes = [one.change for one in found.alternatives]
    assert any(change.startswith("a host with ") for change in changes)
    assert any(change.startswith("2x RTX 4090, ") for change in changes)
    found, _ = planned("cpu, 16 cores, 64GB host", sizes.bert())
    assert [one.kind for one in found.alternatives] == ["faster"]
    assert found.alternatives[0].change.startswith('--for "1x L4"')


@pytest.mark.parametrize(
    ("train", "problem"),
    [
        (
            {"global_batch_size": 12},
            "train.global_batch_size: 12 cannot be shared by 8 devices; set a multiple of 8, or train.num_processes",
        ),
        (
            {"global_batch_size": 24, "micro_batch_size": 2},
            "train.global_batch_size: 24 cannot be shared by 8 devices x micro batch 2; set a multiple of 16, or "
            "train.num_processes",
        ),
    ],
)
def test_batch_that_the_devices_cannot_share_is_refused(train: dict[str, Any], problem: str) -> None:
    with pytest.raises(RecipeError) as raised:
        planned("8x A100-80GB", sizes.llama(train=train))
    assert raised.value.problems == (problem,)


def test_number_of_processes_of_the_recipe_is_kept() -> None:
    found, plan = planned("8x A100-80GB", sizes.bert(train={"num_processes": 2}))
    assert plan is not None
    assert (plan.num_processes, found.num_devices) == (2, 2)


def test_recipes_own_placement_is_recognised() -> None:
    zero3 = {"zero_optimization": {"stage": 3}}
    for train, placement in (
        ({"optim": "adamw_8bit"}, "2 copies, 8-bit AdamW"),
        ({"extra": {"deepspeed": zero3}}, "ZeRO-3"),
    ):
        found, plan = planned("2x H100", sizes.bert(train=train))
        assert plan is not None
        assert found.placement == placement


def test_settings_by_dotted_names_change_the_recipe() -> None:
    recipe = sizes.llama(train={"extra": {"tf32": True}}).recipe
    changed = with_settings(recipe, {"train.extra.deepspeed": {"a": 1}, "model.weights_dtype": "bf16"})
    assert changed.train.extra == {"tf32": True, "deepspeed": {"a": 1}}
    assert changed.model.weights_dtype == "bf16"


def test_memory_limit_of_the_recipe_is_the_limit_of_the_table() -> None:
    found, plan = planned("1x A100-80GB", sizes.bert(train={"memory_limit": "4GiB"}))
    assert found.device_free_bytes == 4 * sizes.GIB
    assert plan is not None
    assert plan.memory is not None
    assert all(one.device_bytes <= 4 * sizes.GIB for one in found.placements if one.fits)


def test_optimizer_that_the_table_does_not_have_is_planned_at_the_plain_ones_speed() -> None:
    found, plan = planned("1x A100-80GB", sizes.bert(train={"optim": "adafactor"}))
    assert plan is not None
    assert plan.time is not None
    assert found.placement == ""
