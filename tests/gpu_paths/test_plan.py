"""What a plan decides by the device and by fp16; more tables of numbers are in `tests/unit/plan`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from fulltune.cli.show import plan as shown
from fulltune.errors import RecipeError
from fulltune.plan import budget, fsdp2, gpus, memory, resolve, savings, workload
from fulltune.plan.settings import Reasons
from fulltune.recipe.fields import Recipe
from fulltune.records.plan import MemoryNeed, MemorySettings
from fulltune.system import parallel_layout
from fulltune.system.hardware import Gpu, Machine
from fulltune.system.parallel_layout import ParallelLayout
from tests.plans import plan, recipe
from tests.unit.plan import sizes
from tests.unit.plan.test_placements import table

pytestmark = pytest.mark.stand_in("records of machines and models", card="whether the bytes are right")
GIB = 2**30
SHAPES, FOOTPRINT = sizes.LLAMA, sizes.footprint(sizes.LLAMA)
SETTINGS = MemorySettings(micro_batch_size=4, longest_tokens=512, eval_batch_size=4)
HOST = Machine(
    cpu="c", num_cores=8, memory_bytes=64 * GIB, memory_available_bytes=60 * GIB, cpu_bf16_speedup=1.0
)  # fmt: skip


def with_card(name: str) -> Machine:
    """That host with a card, all but 1 GiB of which is free."""
    size = {"H100": 80 * GIB, "T4": 16 * GIB, "P100": 16 * GIB}[name]
    capability = {"H100": (9, 0), "T4": (7, 5), "P100": (6, 0)}[name]
    card = Gpu(name=name, memory_bytes=size, capability=capability, free_bytes=size - GIB)
    return HOST.model_copy(update={"gpus": (card,)})


# ---- the device, and what is free on it ------------------------------------------------------------------------------


def test_card_is_taken_where_there_is_one() -> None:
    def found(machine: Machine, device: str = "auto", processes: int = 1) -> str:
        return resolve.choose_device(recipe(train={"device": device, "num_processes": processes}), machine, Reasons())

    assert [found(with_card("H100")), found(HOST), found(with_card("H100"), "cpu")] == ["cuda", "cpu", "cpu"]
    assert found(HOST, "cpu", 4) == "cpu"
    with pytest.raises(RecipeError, match="torch sees no GPU here"):
        found(HOST, "cuda")
    with pytest.raises(RecipeError, match="has 1 GPU available"):
        found(with_card("H100"), processes=2)


def test_memory_is_the_cards_alone_and_the_hosts_beside_the_libraries() -> None:
    def found(machine: Machine, device: str, **train: Any) -> int:
        return budget.usable_memory(recipe(train=train), machine, device)[0]

    assert found(with_card("T4"), "cuda") == 15 * GIB
    assert found(with_card("T4"), "cuda", memory_limit="10GiB") == 10 * GIB
    assert found(HOST, "cpu") == 60 * GIB - budget.LIBRARIES_BYTES
    assert found(HOST, "cpu", memory_limit="10GiB") == 10 * GIB - budget.LIBRARIES_BYTES


@pytest.mark.parametrize(("device", "beyond"), [("cuda", memory.CUDA_CONTEXT_BYTES), ("cpu", memory.FIRST_CALLS_BYTES)])
def test_beside_tensors_a_process_holds_what_its_device_takes(device: str, beyond: int) -> None:
    found = memory.unsharded_need(SHAPES, FOOTPRINT, SETTINGS.changed(device=device))
    assert found.phases["loading"] == 4 * SHAPES.num_parameters + beyond
    kept = round(memory.STATE_SHARE * 12 * SHAPES.num_parameters)
    if device == "cuda":
        assert found.kinds["buffers"] == memory.CUDA_CONTEXT_BYTES
    else:
        assert found.kinds["buffers"] > kept
        assert found.kinds["buffers"] != kept + memory.CUDA_CONTEXT_BYTES


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_another_type_is_reckoned_with_what_its_device_takes(device: str) -> None:
    settings = SETTINGS.changed(device=device, weights_dtype="bf16", precision="bf16")
    found = budget.memory_need(SHAPES, FOOTPRINT, settings, None).kinds["buffers"]
    assert (found == memory.CUDA_CONTEXT_BYTES) == (device == "cuda")


@pytest.mark.parametrize(("device", "host"), [("cuda", True), ("cpu", False)])
def test_what_zero_offloads_lies_on_the_host_of_a_card_and_in_the_same_memory_without(device: str, host: bool) -> None:
    found = budget.memory_need(SHAPES, FOOTPRINT, SETTINGS.changed(device=device), ParallelLayout(3, True, True))
    assert (found.host > 10 * SHAPES.num_parameters) == host
    assert (found.kinds["optimizer"] == 0) == host


def test_gradients_are_sent_from_one_buffer_on_a_card_and_from_two_by_gloo() -> None:
    settings = SETTINGS.changed(num_processes=4, activation_checkpointing=True, micro_batch_size=1, longest_tokens=8)
    sent = {
        device: fsdp2.fsdp2_memory_need(SHAPES, FOOTPRINT, settings.changed(device=device)).kinds["buffers"]
        for device in ("cuda", "cpu")
    }
    units = fsdp2.fsdp_units(SHAPES)
    assert sent["cuda"] - memory.CUDA_CONTEXT_BYTES < 4 * 4 * (units.apart + 4 * units.block)
    assert fsdp2.NUM_SEND_BUFFERS["cuda"] < fsdp2.NUM_SEND_BUFFERS["cpu"]
    assert sent["cpu"] > sent["cuda"]


def test_pieces_of_a_chunked_loss_are_those_of_a_card() -> None:
    whole, pieces = (
        budget.peak_activation_bytes(FOOTPRINT, SETTINGS.changed(chunked_loss=chunked))["logits"]
        for chunked in (False, True)
    )
    assert pieces == pytest.approx(whole * 1024 / (4 * 512))


def test_pieces_on_a_card_have_their_share_of_the_heads_gradient_beside_them() -> None:
    settings, head = (
        SETTINGS.changed(chunked_loss=True, precision="bf16"),
        SHAPES.vocab_size * SHAPES.hidden_size,
    )
    whole: Any = {"logits": 1, "gradients": 0}
    pieces = {
        device: memory.with_chunked_loss(whole, SHAPES, settings.changed(device=device), 1, 0)["logits"]
        for device in ("cuda", "cpu")
    }
    assert pieces["cuda"] == pieces["cpu"] + 2 * head


def test_table_of_memory_calls_a_card_a_device() -> None:
    placed = SimpleNamespace(name="one device", kinds={"weights": GIB}, host_bytes=0)
    survey: Any = SimpleNamespace(
        placement="one device", placements=(placed,), device_free_bytes=GIB, host_free_bytes=GIB, disk_free_bytes=None
    )

    def first_cell(device: str) -> str:
        need = MemoryNeed(kinds={"weights": GIB}, phases={"step": GIB})
        [table, *_] = shown._build_memory_blocks(survey, plan(device=device, memory=need))
        return str(table.rows[0][0])

    assert (first_cell("cuda"), first_cell("cpu")) == ("device", "memory")


def test_hardware_without_a_card_cannot_be_asked_for_one() -> None:
    on_card, anywhere = (recipe(train={"device": device}) for device in ("cuda", "auto"))
    with pytest.raises(RecipeError, match="'cuda', but --for names no GPU"):
        workload.set_one_process_per_device(on_card, gpus.parse_hardware("cpu"))
    assert workload.set_one_process_per_device(anywhere, gpus.parse_hardware("cpu")) == (anywhere, ())
    assert workload.set_one_process_per_device(on_card, gpus.parse_hardware("2x H100"))[0].train.num_processes == 2


# ---- fp16 ------------------------------------------------------------------------------------------------------------


def test_kernels_that_triton_makes_are_refused_on_cards_that_it_does_not_know() -> None:
    for name in ("torch_compile", "use_liger_kernel"):
        asked = recipe(train={name: True})
        resolve.check_kernels(asked, with_card("T4"), "cuda", "fp16")
        with pytest.raises(RecipeError, match=rf"train\.{name} needs .* 7\.0 .* this is P100"):
            resolve.check_kernels(asked, with_card("P100"), "cuda", "fp32")
    resolve.check_kernels(recipe(train={"torch_compile": True}), HOST, "cpu", "fp32")


def test_precision_is_what_the_card_computes_fast() -> None:
    def found(machine: Machine, device: str, precision: str = "auto", **blocks: Any) -> str:
        return str(
            resolve.choose_precision(recipe(train={"precision": precision}, **blocks), machine, device, Reasons())
        )

    assert found(with_card("H100"), "cuda") == "bf16"
    assert found(with_card("T4"), "cuda") == "fp16"
    assert found(with_card("H100"), "cuda", "fp16") == "fp16"
    assert found(HOST, "cpu") == found(HOST, "cpu", "fp32") == "fp32"


def test_fp16_that_is_no_faster_is_said_to_be_so_and_on_a_cpu_it_is_refused() -> None:
    def reason(name: str, wanted: str) -> str:
        resolve.choose_precision(recipe(train={"precision": wanted}), with_card(name), "cuda", reasons := Reasons())
        return reasons.settings[0].reason

    assert reason("P100", "fp16").endswith("has no tensor cores, so fp16 is no faster than fp32 and less exact")
    assert reason("T4", "fp16") == reason("P100", "fp32") == "from the recipe"
    assert "emulates" in reason("P100", "bf16")
    with pytest.raises(RecipeError, match="fp16 is not possible on a CPU"):
        resolve.choose_precision(recipe(train={"precision": "fp16"}), HOST, "cpu", Reasons())
    assert resolve.choose_precision(recipe(train={"precision": "bf16"}), HOST, "cpu", Reasons()) == "bf16"


def test_card_without_fast_bf16_is_offered_no_narrow_weights() -> None:
    assert "one device, bf16 weights" in table("1x L4")
    assert "one device, bf16 weights" not in table("1x T4")
    assert "one device, bf16 weights" not in table("1x L4", precision="fp16")


def test_levers_stay_in_the_format_of_a_card_without_fast_bf16() -> None:
    old, new = (plan(device="cuda", precision="fp32", fast_bf16=fast) for fast in (False, True))
    lever = next(one for one in savings.MEMORY_SAVINGS if one.name == "16-bit computations")
    assert lever.options(recipe(), old) == [{"precision": "fp16"}]
    assert lever.options(recipe(), new) == [{"precision": "bf16"}]
    assert savings._why_no_bf16_weights(recipe(), old) == "this GPU has no fast bf16"
    assert savings._why_no_bf16_weights(recipe(), new) is None


def in_engine(**settings: Any) -> Recipe:
    extra = {"deepspeed": {"zero_optimization": {"stage": 2}, **settings}}
    return recipe(method={"kind": "full"}, train={"extra": extra})


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_deepspeed_is_told_the_plans_format(precision: str) -> None:
    found = parallel_layout.resolve_settings(in_engine(), plan(precision=precision))
    assert (found["fp16"]["enabled"], found["bf16"]["enabled"]) == (precision == "fp16", precision == "bf16")


def test_block_of_deepspeed_for_fp16_is_filled_in_or_refused() -> None:
    assert parallel_layout.zero_settings(in_engine(fp16={"initial_scale_power": 12}))["fp16"] == {
        "initial_scale_power": 12,
        "enabled": "auto",
    }
    assert parallel_layout.zero_settings(in_engine())["fp16"] == {"enabled": "auto"}
    with pytest.raises(RecipeError) as raised:
        parallel_layout.zero_settings(in_engine(fp16=True))
    assert raised.value.problems == (
        'train.extra.deepspeed: fp16: expected a block such as {"enabled": "auto"}, found true',
    )
