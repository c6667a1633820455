"""The plan of a model that is streamed from disk: its memory, disk and time, when it is chosen and when refused."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from fulltune.cli.show.plan import build_plan_sections
from fulltune.errors import DoesNotFitError, RecipeError, SetupError
from fulltune.models.shapes import Shapes
from fulltune.plan import changed, gpus
from fulltune.plan.fit import make_plan
from fulltune.plan.survey import survey_placements
from fulltune.plan.workload import Workload
from fulltune.records.plan import Phase, Plan
from fulltune.report.format import pages
from fulltune.report.format.words import describe_stream
from fulltune.stream.units import unit_sizes
from fulltune.train.parent.next_attempt import plan_next_attempt, plan_rollback
from tests import plans
from tests.unit.plan import sizes

PARAMETERS, BLOCK, VOCABULARY = 6_738_415_616, 202_383_360, 32_000 * 4096
MIB = 2**20
LAPTOP = "cpu, 24GB host, 2 cores"
on_a_gpu = pytest.mark.stand_in("records of machines and models", card="whether the bytes are right")
NARROW = {"model": {"name": "m", "weights_dtype": "bf16"}}


@pytest.fixture(scope="module")
def shapes() -> Shapes:
    """Llama-2-7B."""
    return measured(32)


def measured(layers: int) -> Shapes:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers))
    units = unit_sizes(model)
    return sizes.LLAMA.model_copy(
        update={"unit_sizes": units, "num_layers": layers, "num_parameters": sum(units.values())}
    )


def task(shapes: Shapes, placement: str = "stream", blocks: dict[str, Any] | None = None, **train: Any) -> Workload:
    given = {"placement": placement, "global_batch_size": 2, **train}
    # With checkpointing, a layer's input in 16 bits and the activations of one layer are in memory.
    per_token = 2 * 4096 * (shapes.num_layers + 34)
    kept = sizes.moment("head", activations=2 * 4096 * 34 * shapes.num_layers, logits=10 * 32_000)
    recomputed = sizes.moment("layer", activations=per_token, logits=10 * 32_000)
    traced = sizes.footprint(shapes).model_copy(update={"variants": sizes.variants(kept, recomputed)})
    work = replace(sizes.llama(tokens=512, **(blocks or {}), train=given), shapes=shapes)
    return replace(work, footprint=lambda weights_dtype: traced)


def narrow(shapes: Shapes, placement: str = "stream", hardware: str = LAPTOP, **train: Any) -> Plan:
    """A plan with bf16 weights and 8-bit moments."""
    train = {"optim": "adamw_8bit", "precision": "bf16", **train}
    return make_plan(task(shapes, placement, NARROW, **train), gpus.parse_hardware(hardware))


def test_units_of_the_model_are_its_blocks_and_what_is_beside_them(shapes: Shapes) -> None:
    assert len(shapes.unit_sizes) == 32 + 3
    assert sum(shapes.unit_sizes.values()) == shapes.num_parameters == PARAMETERS
    assert shapes.unit_sizes["model.layers.31"] == BLOCK
    assert shapes.unit_sizes["lm_head"] == VOCABULARY


def test_memory_is_that_of_a_few_units_and_the_inputs_of_all(shapes: Shapes) -> None:
    plan = narrow(shapes, stream={"host_memory": "2750MiB"})
    assert plan.memory is not None
    kinds = plan.memory.kinds
    assert kinds["weights"] == 2 * 2 * BLOCK  # two buffers
    assert kinds["gradients"] == 2 * BLOCK + 2 * VOCABULARY  # a buffer, and the head's gradient
    assert (
        kinds["logits"] > 2 * plan.micro_batch_size * 512 * 32000
    )  # gradients of all logits until the head's is summed
    assert kinds["optimizer"] == 0  # slices lie where the weights do
    inputs = 2 * 4096 * 2 * 512 * (35 + 1)
    assert kinds["activations"] == inputs + 2 * 4096 * 34 * plan.micro_batch_size * 512  # and a block of 34 inputs
    assert plan.memory.peak < 2.3 * 2**30
    assert plan.memory.phases["saving"] < plan.memory.peak
    assert plan.memory_limit_bytes == 2750 * MIB
    assert plan.activation_checkpointing is False
    reasons = {one.name: one.reason for one in plan.settings}
    assert reasons["train.activation_checkpointing"].startswith("every block is recomputed")


def test_memory_grows_with_depth_by_the_inputs_alone() -> None:
    shallow, deep = (narrow(measured(layers), micro_batch_size=1) for layers in (16, 32))
    grown = {}
    for kind in ("weights", "gradients", "optimizer", "activations", "logits", "buffers"):
        sizes_of_both = [one.memory.kinds[kind] for one in (deep, shallow) if one.memory]
        grown[kind] = sizes_of_both[0] - sizes_of_both[1]
    assert deep.stream is not None
    assert shallow.stream is not None
    grown["weights"] -= deep.stream.cache_bytes - shallow.stream.cache_bytes  # it takes what is left
    assert grown == dict.fromkeys(grown, 0) | {"activations": 16 * 2 * 4096 * 2 * 512}


@pytest.mark.parametrize(
    ("optim", "dtype", "per_parameter", "gradients"),
    [
        ("adamw_torch_fused", "fp32", 12, 4),
        ("adamw_8bit", "bf16", 4.0625, 2),
        ("adamw_bf16", "bf16", 6, 2),
    ],
)
def test_disk_holds_the_state_a_spare_record_of_each_size_and_the_gradients(
    optim: str, dtype: str, per_parameter: float, gradients: int, shapes: Shapes
) -> None:
    blocks = {"model": {"name": "m", "weights_dtype": dtype}}
    plan = make_plan(task(shapes, "stream", blocks, optim=optim), gpus.parse_hardware("cpu, 64GB host"))
    assert plan.stream is not None
    spare = BLOCK + VOCABULARY + 4096
    assert plan.stream.state_bytes == pytest.approx(per_parameter * (PARAMETERS + spare), rel=1e-6)
    assert plan.stream.gradient_bytes == gradients * PARAMETERS
    assert plan.disk.checkpoint_bytes == plan.stream.state_bytes + plan.stream.gradient_bytes
    weights = PARAMETERS * (4 if dtype == "fp32" else 2)
    assert plan.disk.model == pytest.approx(2 * weights, rel=0.01)  # the finished model and the best weights


def test_gradients_on_another_disk_and_in_another_type(shapes: Shapes) -> None:
    plan = narrow(shapes, stream={"disk": "/fast", "gradients": "fp32", "rated_writes": "300TB"})
    assert plan.stream is not None
    assert plan.stream.gradient_bytes == 4 * PARAMETERS
    assert plan.disk.checkpoint_bytes == 0
    one, other = (plan.state_folder(Path(place, "r")) for place in ("runs", "others"))
    assert one == plan.state_folder(Path("runs/r").resolve())
    assert one.parent != other.parent  # another run of the same name
    assert (one.parents[1], one.parent.name[:2], one.name) == (Path("/fast"), "r-", "full-seed42")
    assert narrow(shapes).state_folder(Path("runs/r")) == Path("runs/r/state/full-seed42")
    wear = dict(describe_stream(plan))["wear"]
    assert "50.6 GiB a step: 5,521 steps until" in wear  # 300 TB / (8.0625 x 6.74 GB)


def test_step_is_the_longer_of_computing_and_disk_and_then_the_update(shapes: Shapes) -> None:
    plan = narrow(shapes, stream={"host_memory": "2750MiB"})
    one = plan.stream
    assert one is not None
    assert not one.is_measured
    flops = 4 * 1024 * (2 * (PARAMETERS - VOCABULARY) + 4 * 32 * 4096 * 512)
    assert one.step_seconds["computing"] == pytest.approx(flops / (2 * 50e9 * 0.57), rel=0.01)
    assert one.step_seconds["disk"] == pytest.approx((2 + 2) * PARAMETERS / 1e9)  # one reading, and the gradients
    state = 4.0625 * PARAMETERS
    assert one.step_seconds["optimizer"] == pytest.approx(8.5e-9 * PARAMETERS / 2)  # the forward pass hides the disk
    assert plan.time is not None
    whole = one.step_seconds["computing"] + one.step_seconds["optimizer"]
    assert plan.time.train_seconds == pytest.approx(plan.total_steps * whole)
    told = dict(describe_stream(plan))
    assert told["a day"].startswith(f"{86400 * 1024 / whole:,.0f}"[:2])
    assert "wait for the disk" not in told["a step"]
    slow = gpus.parse_hardware(LAPTOP).model_copy(update={"disk_speed": (30e6, 20e6)})
    train = {"optim": "adamw_8bit", "precision": "bf16", "stream": {"host_memory": "2750MiB"}}
    waiting = make_plan(task(shapes, "stream", NARROW, **train), slow)
    assert waiting.stream is not None
    forward = waiting.stream.step_seconds["computing"] / 4
    update = (state + 2 * PARAMETERS) / 30e6 + state / 20e6 - forward
    assert waiting.stream.step_seconds["optimizer"] == pytest.approx(update, rel=1e-6)
    told = dict(describe_stream(waiting))
    assert "they wait for the disk" in told["a step"]
    assert told["disk speed"] == "reads 0.03 GB/s, writes 0.02 GB/s (measured)"


def test_memory_that_is_left_caches_weights_and_spares_reading(shapes: Shapes) -> None:
    small, large = (narrow(shapes, stream={"host_memory": limit}) for limit in ("2750MiB", "8GiB"))
    assert small.stream is not None
    assert large.stream is not None
    assert small.stream.cache_bytes == 0
    assert large.memory is not None
    assert large.memory.peak == pytest.approx(0.9 * (8 * 1024 - 700) * MIB, abs=MIB)
    assert large.memory.kinds["weights"] == 2 * 2 * BLOCK + large.stream.cache_bytes
    spared = small.stream.step_seconds["disk"] - large.stream.step_seconds["disk"]
    assert spared == pytest.approx(large.stream.cache_bytes / 1e9)
    assert describe_stream(plans.plan()) == ()


@on_a_gpu
def test_cache_beside_a_gpu_fills_the_limit_of_its_host_and_nothing_without_one(shapes: Shapes) -> None:
    def found(hardware: str, **stream: str) -> tuple[int, int, int | None]:
        plan = narrow(shapes, hardware=hardware, stream=stream)
        assert plan.stream is not None
        assert plan.memory is not None
        return plan.stream.cache_bytes, plan.memory.host, plan.memory_limit_bytes

    card = "1x RTX 4090, 24GB host"
    none, host, limit = found(card)
    assert (none, limit) == (0, None)
    cached, with_cache, limit = found(card, host_memory="8GiB")
    assert cached == with_cache - host > 0
    assert (with_cache, limit) == ((8 * 1024 - 700) * MIB, None)
    assert found(card, device_memory="20GiB", host_memory="8GiB") == (cached, with_cache, 20 * 1024 * MIB)
    on_cpu, host, limit = found(LAPTOP, device_memory="1GiB")
    assert on_cpu > 0
    assert (host, limit) == (0, None)


@on_a_gpu
@pytest.mark.parametrize(
    ("stream", "hardware", "problem"),
    [
        ({"host_memory": "2GiB"}, LAPTOP, "1.32 GiB of train.stream.host_memory (2GiB) is available"),
        ({"device_memory": "2GiB"}, "1x RTX 4090", "2 GiB of train.stream.device_memory (2GiB) is available"),
        (
            {"host_memory": "1GiB"},
            "1x RTX 4090",
            "needs 1.97 GiB of host memory, but 1 GiB is train.stream.host",
        ),
    ],
)
def test_limit_below_the_need_is_refused_with_the_largest_unit(
    stream: dict[str, str], hardware: str, problem: str, shapes: Shapes
) -> None:
    with pytest.raises(DoesNotFitError) as refusal:
        narrow(shapes, hardware=hardware, stream=stream)
    assert problem in refusal.value.problems[0]
    assert "model.layers.0, 202,383,360 parameters" in refusal.value.problems[0]


def test_limit_that_the_refusal_names_would_do(shapes: Shapes) -> None:
    with pytest.raises(DoesNotFitError) as refusal:
        narrow(shapes, stream={"host_memory": "2GiB"})
    limit = refusal.value.problems[0].partition("parameters; ")[2].removesuffix(" would do").replace(" ", "")
    assert narrow(shapes, stream={"host_memory": limit}).memory is not None


def test_disk_too_small_is_refused(shapes: Shapes) -> None:
    with pytest.raises(DoesNotFitError) as refusal:
        narrow(shapes, hardware=f"{LAPTOP}, 40GB disk")
    assert "1 checkpoint of 39.3 GiB, and 25.1 GiB for the model" in refusal.value.problems[0]
    assert any("train.load_best_model_at_end: false: frees 12.6 GiB" in way for way in refusal.value.problems[1:])
    assert narrow(shapes, hardware=f"{LAPTOP}, 40GB disk", stream={"disk": "/fast"}).disk.checkpoint_bytes == 0


def test_model_without_blocks_is_refused_with_what_was_looked_for(shapes: Shapes) -> None:
    why = "train.placement: stream: CNN has no repeated blocks (no torch.nn.ModuleList with weights) to stream"
    bare = shapes.model_copy(update={"unit_sizes": {}, "no_units": why})
    with pytest.raises(SetupError, match=r"no torch\.nn\.ModuleList"):
        narrow(bare)
    with pytest.raises(DoesNotFitError) as refusal:
        narrow(bare, "auto")
    assert "stream is not possible: CNN has no repeated blocks" in refusal.value.problems[0]


def test_plan_shows_slow_speeds_the_states_own_disk_and_one_narrow_table(shapes: Shapes) -> None:
    train = {"optim": "adamw_8bit", "precision": "bf16", "stream": {"disk": "/fast"}}
    slow = {"disk_speed": (2e8, 2e8), "state_disk_bytes": 99 * 2**30}
    fleet = gpus.parse_hardware(LAPTOP).model_copy(update=slow)
    surveyed, plan = survey_placements(task(shapes, "stream", NARROW, global_batch_size=1, **train), fleet)
    assert plan is not None
    assert plan.time is not None
    console = Console(width=80, record=True, file=io.StringIO())
    pages.print_parts(console, build_plan_sections(surveyed, plan))
    shown = " ".join(console.export_text().split())
    assert "checkpoint x 0" not in shown
    assert re.search(r"state [\d.]+ GiB in /fast; 99 GiB free", shown)
    assert re.search(r"speed 0\.\d\d tokens/s", shown)
    assert 0.1 < plan.time.tokens_per_second < 1
    assert shown.count("▸ stream, bf16 + 8-bit") == 1  # or the table is split


# ---- when it is chosen -----------------------------------------------------------------------------------------------


def test_stream_is_chosen_if_nothing_else_fits_and_the_recipe_allows_it(shapes: Shapes) -> None:
    plan = narrow(shapes, "auto")
    assert plan.placement == "stream"
    reason = next(one.reason for one in plan.settings if one.name == "train.placement")
    assert reason.startswith("a whole copy needs ")
    assert narrow(shapes, "auto", "1x MI325X").stream is None
    with pytest.raises(DoesNotFitError, match="one process; stream, untested on GPUs, must be set there"):
        narrow(shapes, "auto", "1x RTX 4090, 24GB host")
    assert narrow(shapes, "stream", "1x RTX 4090, 24GB host").stream is not None
    machine = gpus.parse_hardware(LAPTOP)
    refused = task(shapes, "auto", NARROW | {"preserve": {"budget": "1%"}}, optim="adamw_8bit", precision="bf16")
    alone = replace(task(shapes, "auto", NARROW, optim="adamw_8bit", precision="bf16"), may_stream=False)
    for one, why in ((refused, "preserve.budget: is not supported"), (alone, "one process and one run")):
        with pytest.raises(DoesNotFitError) as refusal:
            make_plan(one, machine)
        assert why in refusal.value.problems[0]


def test_savings_that_change_the_result_come_before_streaming(shapes: Shapes) -> None:
    fits = make_plan(task(shapes, "auto"), gpus.parse_hardware("1x A100-80GB"))
    assert (fits.placement, fits.optim) == ("single", "adamw_8bit")


def test_survey_lists_streaming_beside_the_others(shapes: Shapes) -> None:
    surveyed, plan = survey_placements(task(shapes, "auto"), gpus.parse_hardware("1x RTX 4090, 24GB host"))
    assert plan is not None
    assert (plan.placement, surveyed.placement) == ("stream", "stream, AdamW fp32")
    row = next(one for one in surveyed.placements if one.name == "stream, AdamW fp32")
    assert row.fits
    assert row.device_bytes < 8 * 2**30
    # Offloading by ZeRO is faster where the host can hold the state.
    surveyed, plan = survey_placements(task(shapes, "auto"), gpus.parse_hardware("1x RTX 4090, 256GB host"))
    assert plan is not None
    assert surveyed.placement.startswith("ZeRO")


# ---- attempts --------------------------------------------------------------------------------------------------------


def test_streamed_run_goes_back_to_no_earlier_weights(shapes: Shapes) -> None:
    spiked = plans.outcome("spiked", first_bad_step=40)
    plan = narrow(shapes)
    assert plan_rollback(plan, 3, spiked, 20) is None
    assert plan_rollback(plan.model_copy(update={"stream": None}), 3, spiked, 20) is not None


def test_retry_after_running_out_of_memory_keeps_the_states_format(shapes: Shapes) -> None:
    work = task(shapes, "stream", global_batch_size=1)
    plan = make_plan(work, gpus.parse_hardware("cpu, 64GB host")).model_copy(update={"chunked_loss": True})
    assert plan.stream is not None
    plan = plan.changed(stream=plan.stream.model_copy(update={"cache_bytes": 0}))
    assert plan_next_attempt(work.recipe, plan, [plans.outcome("out_of_memory", phase="step")]) is None
    larger = plan.changed(micro_batch_size=4)
    following = plan_next_attempt(work.recipe, larger, [plans.outcome("out_of_memory", phase="step")])
    assert following is not None
    assert following.plan.micro_batch_size == 2
    assert following.plan.optim == plan.optim


@pytest.mark.parametrize("phase", ["step", "loading"])
def test_retry_after_running_out_of_memory_first_gives_up_the_cache(shapes: Shapes, phase: Phase) -> None:
    work = task(shapes, "stream", global_batch_size=1)
    plan = make_plan(work, gpus.parse_hardware("cpu, 64GB host"))
    assert plan.stream is not None
    assert plan.stream.cache_bytes > 0
    following = plan_next_attempt(work.recipe, plan, [plans.outcome("out_of_memory", phase=phase)])
    assert following is not None
    assert following.plan.stream == plan.stream.model_copy(update={"cache_bytes": 0})
    assert following.plan.micro_batch_size == plan.micro_batch_size
    assert "no weights stay in memory" in following.reason


@pytest.mark.parametrize(
    ("train", "kept"),
    [
        ({"placement": "stream"}, True),
        ({"placement": "auto"}, True),
        ({"placement": "single"}, False),
        ({"placement": "stream", "stream": {"disk": "/other"}}, False),
    ],
)
def test_started_run_keeps_its_state(train: dict[str, Any], kept: bool, shapes: Shapes) -> None:
    plan, recipe = narrow(shapes), plans.recipe(train=train)
    assert (changed.plan_to_continue(plan, recipe, False) is not None) == kept
    if kept:
        assert changed.plan_to_continue(plan, recipe, True) == plan
    else:
        with pytest.raises(RecipeError, match="this run started with placement: stream and its state in the run"):
            changed.plan_to_continue(plan, recipe, True)


def test_another_limit_gives_a_new_plan_and_others_do_not(shapes: Shapes) -> None:
    plan = narrow(shapes, stream={"host_memory": "2750MiB"})
    for stream, same in (({"host_memory": "2750MiB"}, True), ({"host_memory": "4GiB"}, False), ({}, False)):
        recipe = plans.recipe(train={"placement": "stream", "stream": stream})
        assert changed.has_same_placement(plan, recipe) == same
    assert changed.recipe_for_resuming(plans.recipe(), plan).train.placement == "stream"
