"""The whole survey on hardware that is not here: what is planned, with which placement, and what else there is."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from fulltune.cli.show.plan import build_plan_sections
from fulltune.errors import RecipeError
from fulltune.plan import alternatives, gpus, time, workload
from fulltune.plan.settings import with_settings
from fulltune.plan.survey import advise_on_methods, rank_fitting_placements, survey_placements
from fulltune.records.plan import Plan, Survey
from fulltune.report.format import pages
from tests.unit.plan import sizes

ZERO2 = {"deepspeed": {"zero_optimization": {"stage": 2}}}


def planned(
    hardware: str, task: workload.Workload | None = None, price: time.DevicePrice | None = None
) -> tuple[Survey, Plan | None]:
    task, fleet = task or sizes.llama(), gpus.parse_hardware(hardware)
    recipe, spread = workload.set_one_process_per_device(task.recipe, fleet)
    return survey_placements(replace(task, recipe=recipe, spread=spread), fleet, price)


@pytest.mark.parametrize("gpu", gpus.GPUS, ids=lambda gpu: gpu.name)
def test_7b_on_eight_of_every_gpu_fits_or_has_alternatives(gpu: gpus.GpuModel) -> None:
    surveyed, plan = planned(f"8x {gpu.name}")
    assert surveyed.fits == (plan is not None)
    if plan is not None:
        chosen = next(one for one in surveyed.placements if one.name == surveyed.placement)
        assert chosen.fits
        assert surveyed.ways_out == ()
    else:
        assert surveyed.notes
        assert 1 <= len(surveyed.ways_out) <= 3
        assert surveyed.ways_out[0].enough


@pytest.mark.parametrize(
    ("hardware", "placement"),
    [
        ("1x MI325X", "one device, AdamW fp32"),
        ("8x A100-80GB", "FSDP2"),
        ("4x A100-80GB", "FSDP2"),
        ("4x RTX 4090, 64GB host", "FSDP2, 8-bit AdamW"),
        ("1x RTX 4090, 256GB host", "ZeRO-2, optimizer on host"),
    ],
)
def test_placement_of_a_7b_model(hardware: str, placement: str) -> None:
    surveyed, plan = planned(hardware)
    assert surveyed.placement == placement
    assert plan is not None
    reasons = {one.name: one.reason for one in plan.settings}
    assert reasons.get("train.placement", "").startswith(f"placement: {placement}") == ("ZeRO" in placement)
    assert reasons["train.num_processes"] == ("from --for" if plan.num_processes > 1 else "default")


def test_time_and_price_follow_from_the_row() -> None:
    surveyed, plan = planned("8x A100-80GB", price=(2.0, "USD"))
    assert plan is not None
    assert plan.time is not None
    chosen = next(one for one in surveyed.placements if one.name == surveyed.placement)
    assert plan.time.tokens_per_second == pytest.approx(chosen.tokens_per_second)
    assert plan.time.tokens == pytest.approx(plan.total_steps * 64 * 512, rel=1e-6)
    assert plan.time.train_seconds == pytest.approx(plan.time.tokens / plan.time.tokens_per_second)
    assert (surveyed.price, surveyed.currency) == (pytest.approx(2.0 * 8 * plan.time.whole_seconds / 3600), "USD")


def test_nothing_fits_and_the_alternatives_say_what_would() -> None:
    surveyed, plan = planned("1x T4, 16GB host, 50GB disk")
    assert plan is None
    assert (surveyed.fits, surveyed.placement, surveyed.price) == (False, "", None)
    # Larger hardware alone does not make the disk larger.
    assert [way.change.split()[1] for way in surveyed.ways_out if way.enough] == ["model"]
    surveyed, _ = planned("1x RTX 4090, 64GB host")
    assert surveyed.ways_out[0].change == "4x RTX 4090, 64GB host, FSDP2, 8-bit AdamW"
    assert {one.method: one.verdict for one in surveyed.advice}["full fine-tuning"] == "leave"


@pytest.mark.parametrize(
    ("hardware", "train"),
    [
        ("1x RTX 4090, 64GB host", {}),
        ("1x RTX 4090", {}),
        ("2x RTX 4090, 64GB host", {}),
        ("2x RTX 3090, 62GiB host, 2TB disk", {}),
        ("1x T4, 16GB host", {}),
        ("1x T4, 16GB host, 50GB disk", {}),
        ("1x A100-40GB, 64GB host", {"micro_batch_size": 8}),
        ("1x A100-40GB, 64GB host", {"optim": "adamw_torch"}),
        ("8x L4, 64GB host", {"extra": ZERO2}),
    ],
)
def test_every_alternative_that_is_followed_gives_what_it_promised(hardware: str, train: dict[str, Any]) -> None:
    task = sizes.llama(train={"global_batch_size": 64, **train})
    surveyed, plan = planned(hardware, task)
    assert plan is None
    followed = [way for way in surveyed.ways_out if way.enough and (way.settings or way.hardware)]
    for way in followed:
        recipe = with_settings(task.recipe, way.settings)
        _, plan = planned(way.hardware or hardware, replace(task, recipe=recipe))
        assert plan is not None, way
    if "disk" not in hardware:
        assert followed


@pytest.mark.parametrize("hardware", ["1x RTX 4090, 139GB host", "2x A100-40GB, 256GB host", "8x A100-80GB", "1x L40S"])
def test_every_placement_that_is_followed_is_as_fast_as_its_row_says(hardware: str) -> None:
    task = sizes.llama(train={"global_batch_size": 64})
    table = planned(hardware, task)[0].placements
    followed = rank_fitting_placements(table)
    assert followed
    for row in followed:
        _, plan = planned(hardware, replace(task, recipe=with_settings(task.recipe, row.settings)))
        assert plan is not None, row.name
        assert plan.time is not None
        assert plan.time.tokens_per_second == pytest.approx(row.tokens_per_second, rel=0.03), row.name


def test_recomputing_that_is_faster_is_chosen_with_its_reason() -> None:
    # One row fits without; with, each pass of many rows shares the way to the host.
    _, plan = planned("1x RTX 4090, 139GB host", sizes.llama(train={"global_batch_size": 64}))
    assert plan is not None
    assert plan.activation_checkpointing
    assert plan.micro_batch_size > 1
    reason = next(one.reason for one in plan.settings if one.name == "train.activation_checkpointing")
    assert re.fullmatch(r"1\.\d\d times as fast as without checkpointing, because micro batches are larger", reason)


def test_whole_command_is_foreseen_part_by_part() -> None:
    task = sizes.llama(evaluate={"generate_rows": 20})
    surveyed, plan = planned("8x A100-80GB", task, (1.0, ""))
    assert plan is not None
    assert plan.time is not None
    parts = plan.time.overhead_seconds
    assert list(parts) == ["starting", "checks and dry run", "scoring the baselines", "scoring the trained model"]
    assert all(seconds > 0 for seconds in parts.values())
    assert plan.time.whole_seconds == pytest.approx(plan.time.total_seconds + sum(parts.values()))
    assert surveyed.price == pytest.approx(8 * plan.time.whole_seconds / 3600)
    _, silent = planned("8x A100-80GB", sizes.llama(evaluate={"generate_rows": 0, "baselines": False}))
    assert silent is not None
    assert silent.time is not None
    fewer = silent.time.overhead_seconds
    assert "scoring the baselines" not in fewer
    assert fewer["scoring the trained model"] < parts["scoring the trained model"]


def _with_rows(task: workload.Workload, rows: int) -> workload.Workload:
    """So many eval and so many test rows."""
    splits = task.summary.splits
    held_out = {name: splits[name].model_copy(update={"rows": rows}) for name in ("eval", "test")}
    return replace(task, summary=task.summary.model_copy(update={"splits": {**splits, **held_out}}))


def _scored(hardware: str, task: workload.Workload) -> dict[str, float]:
    _, plan = planned(hardware, task)
    assert plan is not None
    assert plan.time is not None
    return {name: seconds for name, seconds in plan.time.overhead_seconds.items() if name.startswith("scoring")}


def test_scoring_takes_what_the_hardware_takes_for_the_scored_rows() -> None:
    task = _with_rows(sizes.bert(rows=1000), 200)
    cpu, card = (_scored(hardware, task) for hardware in ("cpu", "1x A100-80GB"))
    assert all(card[name] < cpu[name] / 5 for name in cpu)
    fewer = _scored("cpu", _with_rows(task, 20))
    assert fewer["scoring the trained model"] < cpu["scoring the trained model"] / 5


SMALL = sizes.LLAMA.model_copy(
    update={"num_parameters": 10**9, "num_trainable": 10**6, "num_all_parameters": 10**9 + 10**6}
)


def _by(kind: str, shapes: Any = sizes.LLAMA) -> workload.Workload | None:
    """The 7B model by full fine-tuning, or as much smaller as LoRA makes it."""
    task = sizes.llama(method={"kind": kind}, train={"global_batch_size": 64})
    return replace(task, shapes=shapes, footprint=lambda weights_dtype: sizes.footprint(shapes))


def _survey(
    task: workload.Workload | None, hardware: str, other: workload.Workload | None
) -> tuple[Survey, Plan | None]:
    assert task is not None
    return survey_placements(task, gpus.parse_hardware(hardware), with_method=lambda kind: other)


def test_method_that_fits_where_full_does_not_is_an_alternative_with_its_settings() -> None:
    surveyed, plan = _survey(_by("full"), "1x RTX 4090, 64GB host", _by("lora", SMALL))
    assert plan is None
    way = next(one for one in surveyed.ways_out if one.change == "method: lora")
    assert way.enough
    assert way.settings["method"] == "lora"
    assert "--set method=lora" in alternatives.format_flags(way)
    assert {one.method: one.verdict for one in surveyed.advice}["LoRA"] == "take"
    for other in (_by("lora"), None):  # as large as full; not possible
        surveyed, _ = _survey(_by("full"), "1x RTX 4090, 64GB host", other)
        assert not any(one.change == "method: lora" for one in surveyed.ways_out)
        assert not any("--set method=lora" in one.rule for one in surveyed.advice)  # the command would be refused


def test_method_as_an_alternative_leaves_no_comparison_behind() -> None:
    compared = sizes.llama(methods=["full", "lora"], compare={"budget": "2h"})
    surveyed, _ = _survey(compared, "1x RTX 4090, 64GB host", _by("lora", SMALL))
    (way,) = (one for one in surveyed.ways_out if one.change == "method: lora")
    assert way.settings.items() >= {"method": "lora", "methods": [], "compare.budget": None}.items()
    assert "--set 'methods=[]' --set compare.budget=null" in alternatives.format_flags(way)


def test_disk_too_small_has_alternatives_of_its_own() -> None:
    surveyed, plan = planned("1x MI325X, 40GB disk")
    assert plan is None
    assert "on disk" in surveyed.notes[0]
    surveyed, plan = planned("1x RTX 4090, 256GB host, 50GB disk")
    assert plan is None
    assert [way.change.split()[0] for way in surveyed.ways_out] == ["free"]
    assert "on disk" in surveyed.notes[0]


def test_much_faster_placement_that_fits_is_taken_with_its_reason() -> None:
    surveyed, plan = planned("4x 8x H100-80GB, 400Gb network")
    assert plan is not None
    assert (surveyed.placement, plan.placement, surveyed.settings["train.placement"]) == ("ZeRO-2", "zero2", "zero2")
    speeds = {one.name: one.tokens_per_second or 0.0 for one in surveyed.placements if one.fits}
    assert speeds["ZeRO-2"] == max(speeds.values()) > 2 * speeds["FSDP2"]
    [reason] = [one.reason for one in plan.settings if one.name == "train.placement"]
    assert reason == "placement: ZeRO-2, much faster than fsdp2, which fits as well; pip install 'fulltune[deepspeed]'"
    given: Any = {"placement": "fsdp2", "num_processes": 32, "num_machines": 4}
    for train in (given, {"optim": "adafactor"}):  # what the recipe says is kept
        surveyed, plan = planned("4x 8x H100-80GB, 400Gb network", sizes.llama(train=train))
        assert plan is not None
        assert plan.placement == train.get("placement", "ddp")
    surveyed, _ = planned("8x A100-80GB")  # as fast as ZeRO-2
    assert surveyed.placement == "FSDP2"


def test_batch_that_the_devices_cannot_share_is_refused() -> None:
    with pytest.raises(RecipeError) as raised:
        planned("8x A100-80GB", sizes.llama(train={"global_batch_size": 24, "micro_batch_size": 2}))
    assert raised.value.problems == (
        "train.global_batch_size: 24 cannot be divided among 8 devices x micro batch 2; set a multiple of 16, or "
        "train.num_processes",
    )


def test_only_devices_that_work_are_paid() -> None:
    wishes = (2.0, "")
    surveyed, plan = planned("8x A100-80GB", sizes.bert(train={"num_processes": 2}), wishes)
    assert plan is not None
    assert plan.time is not None
    assert surveyed.price == pytest.approx(2.0 * 2 * plan.time.whole_seconds / 3600)
    surveyed, plan = planned("cpu, 8 cores", sizes.bert(train={"num_processes": 2}), wishes)
    assert plan is not None
    assert plan.time is not None
    assert surveyed.num_devices == 1
    assert surveyed.price == pytest.approx(2.0 * plan.time.whole_seconds / 3600)


def test_given_copies_that_do_not_fit_are_told_to_be_shared_out() -> None:
    train = {"global_batch_size": 64, "num_processes": 8, "placement": "ddp", "optim": "adamw_torch_fused"}
    here = gpus.parse_hardware("8x L40S").model_copy(update={"here": True})
    surveyed, plan = survey_placements(sizes.llama(train=train), here)
    assert plan is None
    assert any(way.settings.get("train.placement") == "fsdp2" and way.enough for way in surveyed.ways_out)


def test_several_devices_share_the_state_rather_than_round_it() -> None:
    # Two copies with 8-bit moments would fit.
    task = sizes.llama(train={"global_batch_size": 4, "optim": "adamw_8bit"})
    surveyed, plan = planned("2x H100-NVL, 64GB host", task)
    assert plan is not None
    assert surveyed.placement == "2 copies, 8-bit AdamW"
    surveyed, plan = planned("2x H100-NVL, 64GB host", sizes.llama(train={"global_batch_size": 4}))
    assert plan is not None
    assert (surveyed.placement, plan.optim) == ("ZeRO-2", "adamw_torch_fused")


@pytest.mark.parametrize("host", [100, 130, 140, 170])
def test_table_and_plan_agree_on_the_host(host: int) -> None:
    block = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    task = sizes.llama(train={"global_batch_size": 64, "extra": {"deepspeed": {"zero_optimization": block}}})
    fleet = gpus.parse_hardware(f"1x H100, {host}GB host")
    surveyed, _ = survey_placements(task, fleet.model_copy(update={"here": True}))
    row = next(one for one in surveyed.placements if one.name == "ZeRO-3, all on host")
    assert surveyed.fits == row.fits


def test_recipes_own_placement_is_recognised() -> None:
    surveyed, _ = planned("2x H100", sizes.bert(train={"extra": {"deepspeed": {"zero_optimization": {"stage": 3}}}}))
    assert surveyed.placement == "ZeRO-3"


def test_settings_by_dotted_names_change_the_recipe() -> None:
    recipe = sizes.llama(train={"extra": {"tf32": True}}).recipe
    changed = with_settings(recipe, {"train.extra.deepspeed": {"a": 1}, "model.weights_dtype": "bf16"})
    assert changed.train.extra == {"tf32": True, "deepspeed": {"a": 1}}
    assert changed.model.weights_dtype == "bf16"
    assert with_settings(changed, {"train.extra.deepspeed": None}).train.extra == {"tf32": True}


def test_memory_limit_of_the_recipe_is_the_limit_of_the_table() -> None:
    surveyed, plan = planned("1x A100-80GB", sizes.bert(train={"memory_limit": "4GiB"}))
    assert surveyed.device_free_bytes == 4 * sizes.GIB
    assert plan is not None
    assert plan.memory is not None
    assert all(one.device_bytes <= 4 * sizes.GIB for one in surveyed.placements if one.fits)


def test_busy_machine_is_said_before_its_times(capsys: pytest.CaptureFixture[str]) -> None:
    fleet = gpus.parse_hardware("cpu, 2 cores, 64GB host")
    busy = fleet.model_copy(update={"machine": fleet.machine.model_copy(update={"load_average": 9.0})})
    surveyed, plan = survey_placements(sizes.bert(), busy)
    pages.print_parts(Console(width=80), build_plan_sections(surveyed, plan))
    text = " ".join(capsys.readouterr().out.split())
    assert text.index("busy this machine is busy (load 9 on 2 cores)") < text.index("takes ")
    assert "(arithmetic: measured on a busy machine, see above)" in text
    _, idle = survey_placements(sizes.bert(), fleet)
    assert plan is not None
    assert idle is not None
    assert bool(plan.busy) > bool(idle.busy)


# ---- advice ------------------------------------------------------------------------------------------------------

SMALL_CARD, LARGE_CARD = 4 * sizes.GIB, 79 * sizes.GIB


@pytest.mark.parametrize(
    ("rows", "shapes", "full_fits", "lora_fits", "card", "full", "lora"),
    [
        (500, sizes.LLAMA, True, None, LARGE_CARD, "try", "take"),
        (50_000, sizes.LLAMA, True, None, LARGE_CARD, "try", "try"),
        (100_000, sizes.LLAMA, True, None, LARGE_CARD, "take", "try"),
        (100_000, sizes.LLAMA, False, None, LARGE_CARD, "leave", "take"),
        (500, sizes.LLAMA, False, True, LARGE_CARD, "leave", "take"),
        (500, sizes.LLAMA, False, False, LARGE_CARD, "leave", "leave"),
        # Full fine-tuning is shared out there, LoRA's weights are not.
        (500, sizes.LLAMA, True, None, SMALL_CARD, "try", "leave"),
        (500, sizes.LLAMA, True, False, LARGE_CARD, "try", "leave"),
        (500, sizes.BERT, True, None, LARGE_CARD, "try", "try"),
        (50_000, sizes.BERT, True, None, LARGE_CARD, "take", "try"),
    ],
)
def test_advice_follows_from_rows_model_and_what_fits(
    rows: int, shapes: Any, full_fits: bool, lora_fits: bool | None, card: int, full: str, lora: str
) -> None:
    advice = advise_on_methods(rows, shapes, full_fits, lora_fits, card)
    assert {one.method: one.verdict for one in advice} == {
        "full fine-tuning": full,
        "LoRA": lora,
        "adapters": "leave",
        "prompt tuning": "leave",
    }
    order = ["take", "try", "leave"]
    assert [one.verdict for one in advice] == sorted((one.verdict for one in advice), key=order.index)
    assert all(one.rule for one in advice)
