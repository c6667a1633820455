"""The plan of a run over several machines: what one of them has, what crosses between them, what is said of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from fulltune.cli.show.plan import build_plan_sections
from fulltune.errors import DoesNotFitError, RecipeError
from fulltune.plan import budget, gpus, placements, resolve, time, workload
from fulltune.plan.settings import Reasons
from fulltune.plan.survey import survey_placements
from fulltune.recipe.fields import Recipe
from fulltune.records.plan import MemorySettings, Plan, Survey
from fulltune.report.format import pages
from fulltune.system.hardware import Gpu, Machine
from fulltune.system.parallel_layout import ParallelLayout
from tests.unit.plan import sizes

GB, GIB = 10**9, 2**30
CARD = Gpu(name="NVIDIA A100-SXM4-80GB", memory_bytes=80 * GIB, capability=(8, 0), free_bytes=79 * GIB)
FSDP2 = ParallelLayout(3, False, False, engine="fsdp2")


def machine(gpus: int = 0, **changes: Any) -> Machine:
    values = {"num_cores": 16, "memory_bytes": 64 * GB, "memory_available_bytes": 60 * GB, **changes}
    return Machine(cpu="x", cpu_bf16_speedup=1.0, gpus=(CARD,) * gpus, cpu_flops=1e12, **values)


def planned(hardware: str, task: workload.Workload | None = None) -> tuple[Survey, Plan | None]:
    task, fleet = task or sizes.llama(), gpus.parse_hardware(hardware)
    recipe, spread = workload.set_one_process_per_device(task.recipe, fleet)
    return survey_placements(replace(task, recipe=recipe, spread=spread), fleet)


# ---- in words ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("4x 4x 8x A100, 64GB host", "unknown GPU '8x A100'"),
        ("0x 8x A100-80GB", "'0x 8x A100-80GB': numbers must be greater than 0"),
        ("4x 0x A100-80GB", "numbers must be greater than 0"),
        ("8x L4, 400Gb network", "a network needs several machines, but --for names only one"),
        ("2x 8x L4, 400GB network", "'400GB network' cannot be read; write, for example,"),
        ("2x 8x L4, 0Gb network", "numbers must be greater than 0"),
        ("2x 8x L4, fast network", "'fast network' cannot be read; write, for example,"),
    ],
)
def test_what_cannot_be_read_is_named(words: str, problem: str) -> None:
    with pytest.raises(RecipeError) as raised:
        gpus.parse_hardware(words)
    assert problem in str(raised.value)


@pytest.mark.parametrize(
    ("words", "gigabytes"),
    [
        ("", 12.5),
        (", 400Gb network", 50),
        (", 3200 Gb/s network", 400),
        (", 25Gbps network", 3.125),
    ],
)
def test_network_in_words(words: str, gigabytes: float) -> None:
    fleet = gpus.parse_hardware(f"4x 8x A100-80GB{words}")
    assert (fleet.num_machines, fleet.num_devices, len(fleet.machine.gpus)) == (4, 32, 8)
    assert fleet.network_gb_per_second == pytest.approx(gigabytes)
    assert any("100 Gb/s between machines" in one for one in fleet.assumed) == (not words)
    assert gpus.parse_hardware(str(fleet.named)) == fleet
    assert fleet.name.startswith("4 machines, each 8x A100-80GB, 1024GB host")
    assert gpus.parse_hardware(f"4x 8x A100-80GB, 2TB disk{words}").name == f"{fleet.name}; 2000GB shared disk"


# ---- what one machine has ---------------------------------------------------------------------------------------


def _recipe(processes: int, count: int, **train: Any) -> Recipe:
    return sizes.bert(train={"num_processes": processes, "num_machines": count, **train}).recipe


def test_processes_of_a_machine_take_its_gpus_and_its_cores() -> None:
    reasons = Reasons()
    assert resolve.choose_device(_recipe(16, 2), machine(8), reasons) == "cuda"
    assert reasons.settings[0].reason == "8 GPUs found on each of 2 machines"
    with pytest.raises(RecipeError) as raised:
        resolve.choose_device(_recipe(16, 2), machine(4), Reasons())
    assert "16 (8 on each of 2 machines), but each machine has 4 GPUs available; set at most 8" in str(raised.value)
    assert resolve.choose_device(_recipe(32, 2), machine(), Reasons()) == "cpu"
    with pytest.raises(RecipeError, match=r"each machine has 16 CPU cores available; set at most 32"):
        resolve.choose_device(_recipe(34, 2), machine(), Reasons())
    poor = machine(4, differs="GPUs")
    with pytest.raises(RecipeError, match=r"4 GPUs available; the machines differ in GPUs"):
        resolve.choose_device(_recipe(16, 2), poor, Reasons())
    resolve.choose_device(_recipe(8, 2), poor, reasons := Reasons())
    assert reasons.settings[0].reason.endswith("; the machines differ in GPUs, so the plan is for the weakest")


def test_memory_and_cores_are_shared_by_the_processes_of_one_machine() -> None:
    one, two = (
        budget.usable_memory(_recipe(processes, count), machine(), "cpu")[0] for processes, count in ((4, 1), (8, 2))
    )
    assert one == two == 60 * GB // 4 - budget.LIBRARIES_BYTES
    images = {"model": "m", "task": "image-classification", "data": {"train": "t"}}
    recipe = Recipe.model_validate({**images, "train": {"num_processes": 8, "num_machines": 2}})
    assert resolve.choose_loader_workers(recipe, machine(4), "cuda", Reasons()) == 3
    small = machine(4, shared_memory_bytes=5 * GIB)
    assert resolve.choose_loader_workers(recipe, small, "cuda", Reasons()) == 3, "4 GiB are enough for 4 processes"


def test_host_holds_its_share_of_what_is_offloaded() -> None:
    task, there = sizes.llama(), machine(8, memory_available_bytes=80 * GB)  # 1.22 x 16 P are 131 GB
    zero2 = {"placement": "zero2", "offload": "optimizer", "global_batch_size": 64}
    budget.check_offload_fits(_recipe(16, 2, **zero2), task.shapes, there)
    with pytest.raises(DoesNotFitError):
        budget.check_offload_fits(_recipe(8, 1, **zero2), task.shapes, there)
    poor = machine(8, memory_available_bytes=50 * GB)
    with pytest.raises(DoesNotFitError, match=r"needs 61\.3 GiB of host memory on each of 2 machines"):
        budget.check_offload_fits(_recipe(16, 2, **zero2), task.shapes, poor)


def _rows(hardware: str, **train: Any) -> dict[str, Any]:
    fleet = gpus.parse_hardware(hardware)
    train = {"global_batch_size": 64, "num_processes": fleet.num_devices, "num_machines": fleet.num_machines, **train}
    return {one.name: one for one in placements.placement_table(workload.make_basis(sizes.llama(train=train), fleet))}


def test_table_has_the_host_memory_of_each_machine_and_no_disk() -> None:
    one, two = _rows("1x 8x A100-80GB"), _rows("2x 8x A100-80GB")
    for name in ("ZeRO-2, optimizer on host", "ZeRO-3, all on host"):
        assert two[name].host_bytes == pytest.approx(one[name].host_bytes / 2, rel=1e-6)


# ---- between machines -------------------------------------------------------------------------------------------


def _seconds(hardware: str, settings: MemorySettings, shared: ParallelLayout | None = FSDP2) -> dict[str, float]:
    fleet, task = gpus.parse_hardware(hardware), sizes.llama()
    work = time.work_per_row(task.summary, task.footprint("fp32"), True)
    settings = settings.changed(num_processes=fleet.num_devices, num_machines=fleet.num_machines)
    return time.step_seconds(fleet, task.shapes, work, 64, settings, shared)


def test_over_each_network_goes_what_each_process_sends() -> None:
    settings = MemorySettings(micro_batch_size=1, longest_tokens=512, precision="bf16", num_processes=32)
    sent = sum(time.communication_bytes(sizes.LLAMA, settings, FSDP2))
    seconds = _seconds("4x 8x A100-80GB", settings)
    assert seconds[time.NETWORK] == pytest.approx(sent / (0.8 * 12.5e9))
    assert seconds["other devices"] == pytest.approx(sent / (0.8 * 300e9))
    faster = _seconds("4x 8x A100-80GB, 400Gb network", settings)
    assert faster[time.NETWORK] == pytest.approx(seconds[time.NETWORK] / 4)
    assert time.step_duration(seconds) - time.step_duration(faster) == pytest.approx(seconds[time.NETWORK] * 3 / 4)
    assert _seconds("8x A100-80GB", settings)[time.NETWORK] == 0.0
    assert _seconds("8x 1x A100-80GB", settings)["other devices"] == 0.0, "nothing stays inside a machine"


def test_several_machines_compute_and_update_together() -> None:
    settings = MemorySettings(micro_batch_size=1, longest_tokens=512, precision="bf16")
    offloaded = ParallelLayout(2, True, False)
    one, four = (_seconds(f"{count}x 8x A100-80GB", settings, offloaded) for count in (1, 4))
    assert four["optimizer"] == pytest.approx(one["optimizer"] / 4), "each host updates its share"
    alone, both = (_seconds(f"{count}x 1x cpu, 8 cores", settings, None) for count in (1, 2))
    assert both["computing"] - 0.005 == pytest.approx((alone["computing"] - 0.005) / 2)
    assert both[time.NETWORK] > 0.0 == alone[time.NETWORK]


# ---- the survey -------------------------------------------------------------------------------------------------


def test_four_machines_are_planned_with_their_settings() -> None:
    surveyed, plan = planned("4x 8x A100-80GB")
    assert plan is not None
    assert (plan.num_processes, plan.num_machines, plan.placement) == (32, 4, "zero2")
    assert plan.processes_per_machine == 8
    placed = {"train.num_processes": 32, "train.num_machines": 4, "train.placement": "zero2"}
    assert surveyed.settings == placed
    assert (surveyed.num_devices, surveyed.num_machines) == (32, 4)
    reasons = {one.name: one.reason for one in plan.settings if one.is_automatic}
    assert reasons["train.num_processes"] == reasons["train.num_machines"] == "from --for"


def test_machines_are_shown_in_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    surveyed, plan = planned("4x 8x A100-80GB")
    pages.print_parts(Console(width=80), build_plan_sections(surveyed, plan))
    lines = capsys.readouterr().out.splitlines()
    text = " ".join(" ".join(lines).split())
    assert max(map(len, lines)) <= 80
    assert "4 machines, each 8x A100-80GB, 1024GB host" in text
    assert "100 Gb/s between machines (or write '400Gb network' in --for)" in text
    assert "of each host's memory" in text
    assert "a step waits for the network between machines" in text
    assert (
        "each of 32 processes sends 24.3 GiB per step; each of 4 machines sends as much to the others (zero2)" in text
    )
    assert text.startswith("plan fits yes: full on 4 machines, each 8x A100-80GB, 1024GB host, ZeRO-2, 26.9 of 79.5")


def test_too_few_devices_have_more_machines_as_an_alternative_that_fits() -> None:
    surveyed, plan = planned("8x RTX 3080, 64GB host", sizes.llama(tokens=2048))
    assert plan is None
    way = surveyed.ways_out[0]
    assert (way.hardware, way.costs) == ("2x 8x RTX 3080, 64GB host", "more devices")
    again, plan = planned(way.hardware, sizes.llama(tokens=2048))
    assert again.fits
    assert plan is not None


@pytest.mark.parametrize(
    ("hardware", "train", "problem"),
    [
        (
            "8x A100-80GB",
            {"num_processes": 32, "num_machines": 4},
            'num_machines: 4, but --for names 1 machine; write --for "4x 8x A100-80GB", or add --set '
            "train.num_machines=1 --set train.num_processes=8",
        ),
        ("2x 8x L4", {"num_processes": 32, "num_machines": 4}, '--for names 2 machines; write --for "4x 8x L4"'),
        ("2x cpu, 8 cores", {"num_processes": 4, "num_machines": 4}, 'write --for "4x cpu, 8 cores"'),
        (
            "4x 8x L4",
            {"num_processes": 6, "global_batch_size": 12},
            "num_processes: 6 cannot be spread evenly over the 4 machines of --for; remove it (each of the 32 "
            "devices then gets one process), or set a multiple of 4",
        ),
    ],
)
def test_machines_that_are_not_the_recipes_are_refused(hardware: str, train: dict[str, Any], problem: str) -> None:
    task = sizes.llama(train={"global_batch_size": 64, **train})
    with pytest.raises(RecipeError) as raised:
        workload.set_one_process_per_device(task.recipe, gpus.parse_hardware(hardware))
    assert problem in str(raised.value)


@pytest.mark.parametrize(
    ("blocks", "several"),
    [
        ({"methods": ["full", "lora"]}, "a comparison"),
        ({"method": {"learning_rate": "search"}}, "a search"),
    ],
)
def test_several_runs_stay_on_one_machine(blocks: dict[str, Any], several: str) -> None:
    recipe = Recipe.model_validate({"model": "m", "task": "causal-lm", "data": {"train": "a"}, **blocks})
    with pytest.raises(RecipeError, match=f'{several} runs on one machine, but --for names 2 machines; .*"8x L4"'):
        workload.set_one_process_per_device(recipe, gpus.parse_hardware("2x 8x L4"))
    assert workload.set_one_process_per_device(recipe, gpus.parse_hardware("1x 8x L4"))[0].train.num_processes == 8


def test_given_processes_stay_and_are_spread() -> None:
    task = sizes.llama(train={"global_batch_size": 64, "num_processes": 16})
    fleet = gpus.parse_hardware("2x 8x A100-80GB")
    recipe, spread = workload.set_one_process_per_device(task.recipe, fleet)
    assert (recipe.train.num_processes, recipe.train.num_machines) == (16, 2)
    assert spread == ("train.num_machines",)


def test_machines_like_this_one_are_planned_with_a_usual_network() -> None:
    fleet = gpus.local_hardware(machine(8), 10 * GB, num_machines=2)
    assert fleet.name == "2 machines like this one, each 8x NVIDIA A100-SXM4-80GB, 16 cores, 60 GiB"
    assert fleet.assumed == ("100 Gb/s between machines",)
