"""The memory of a step, phase by phase, against arithmetic by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from fulltune.errors import SetupError
from fulltune.footprint.records import Footprint, LiveMemory, Variant
from fulltune.models.shapes import Shapes
from fulltune.plan import memory
from fulltune.plan.memory import trained_bytes, unsharded_need
from fulltune.records.plan import MemorySettings
from tests.unit.plan.sizes import moment

ZERO = (0.0,) * 6
SHAPES = Shapes(
    model_type="llama",
    is_decoder=True,
    num_parameters=1_000_000,
    num_layers=2,
    hidden_size=100,
    vocab_size=2_000,
    position_limit=None,
)


FOOTPRINT = Footprint(
    weights_dtype="fp32",
    largest_tensor=200_000,
    sequences_per_row=1,
    variants=(
        Variant(
            precision="fp32",
            activation_checkpointing=False,
            first=(
                moment("backward head", activations=10_000, logits=24_000),
                moment("backward 0:below", gradients=4_000_000),
            ),
            later=(moment("backward head", gradients=4_000_000, activations=10_000, logits=24_000),),
        ),
    ),
    evaluation={"fp32": (moment("forward loss", activations=100, logits=16_000),)},
    flops_per_token=2e6,
    attention_flops_per_pair=100.0,
)
SETTINGS = MemorySettings(micro_batch_size=4, longest_tokens=100, eval_batch_size=8)
ON_GPU = SETTINGS.changed(device="cuda")


def test_footprint_of_an_earlier_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "footprint.json").write_text(FOOTPRINT.model_dump_json(exclude={"weights_dtype"}))
    with pytest.raises(SetupError, match="from another version of fulltune; delete it and run the command again"):
        Footprint.load(tmp_path / "footprint.json")


def tensors(settings: MemorySettings) -> dict[str, int]:
    """What is alive, without what a process holds beyond it."""
    needed = unsharded_need(SHAPES, FOOTPRINT, settings.changed(device="cuda")).kinds
    return {**needed, "buffers": needed["buffers"] - memory.CUDA_CONTEXT_BYTES}


@pytest.mark.parametrize(
    ("optim", "dtype", "rounding", "optimizer"),
    [
        ("adamw_torch_fused", "fp32", None, 8_000_000),
        ("adamw_torch", "bf16", "nearest", 4_000_000),
        ("adamw_8bit", "fp32", None, 2_062_500),
        ("adamw_bf16", "bf16", "stochastic", 4_000_000),
        ("adamw_bf16", "bf16", "kahan", 6_000_000),
        ("adamw_8bit", "bf16", "kahan", 4_062_500),
        ("adafactor", "fp32", None, 20_000),
        ("sgd", "fp32", None, 0),
        ("grokadamw", "fp32", None, 8_000_000),
    ],
)
def test_state_of_an_optimizer(optim: str, dtype: str, rounding: str | None, optimizer: int) -> None:
    state = trained_bytes(1_000_000, dtype, optim, rounding)
    size = {"fp32": 4, "bf16": 2}[dtype]
    assert state == {"weights": size * 10**6, "gradients": size * 10**6, "optimizer": optimizer}


def test_the_highest_moment_is_at_the_head() -> None:
    # 400 tokens: 4.0 MB of activations, 9.6 MB of logits.
    assert tensors(SETTINGS) == {
        "weights": 4_000_000,
        "optimizer": 8_000_000,
        "gradients": 0,
        "activations": 4_000_000,
        "logits": 9_600_000,
        "buffers": 0,
    }


def test_a_small_batch_peaks_at_the_update() -> None:
    kinds = tensors(SETTINGS.changed(micro_batch_size=1, longest_tokens=10))
    assert (kinds["gradients"], kinds["activations"], kinds["logits"]) == (4_000_000, 0, 0)


def test_accumulation_adds_the_gradients_of_the_micro_batch_before() -> None:
    assert tensors(SETTINGS.changed(gradient_accumulation_steps=2))["gradients"] == 4_000_000


def test_generic_text_that_is_trained_along_leaves_its_gradients_as_accumulation_does() -> None:
    assert tensors(SETTINGS.changed(generic_first=True)) == tensors(SETTINGS.changed(gradient_accumulation_steps=2))
    assert tensors(SETTINGS.changed(generic_first=True)) != tensors(SETTINGS)


def test_a_chunked_loss_holds_a_piece_and_the_heads_gradient() -> None:
    needed = unsharded_need(SHAPES, FOOTPRINT, SETTINGS.changed(chunked_loss=True)).kinds
    # 256 tokens x 2,000 words x 4 bytes; 2,000 x 100 x 4 bytes.
    assert (needed["logits"], needed["gradients"]) == (2_048_000, 800_000)


def test_several_processes_have_buckets() -> None:
    needed = unsharded_need(SHAPES, FOOTPRINT, ON_GPU.changed(num_processes=2)).kinds
    assert needed["buffers"] == memory.CUDA_CONTEXT_BYTES + 4_000_000


def test_without_a_scratch_a_step_of_adafactor_is_smaller() -> None:
    small = SETTINGS.changed(micro_batch_size=1, longest_tokens=10, optim="adafactor")
    assert tensors(small)["buffers"] == 3 * 4 * 200_000


def test_phases() -> None:
    needed = unsharded_need(SHAPES, FOOTPRINT, ON_GPU)
    base = memory.CUDA_CONTEXT_BYTES
    assert needed.phases == {
        "loading": 4_000_000 + base,
        "step": 25_600_000 + base,
        # 800 tokens: 0.08 MB and 12.8 MB beside weights and moments.
        "evaluation": 12_000_000 + 80_000 + 12_800_000 + base,
        "saving": 12_000_000 + base,
        "resuming": 12_000_000 + base,
    }
    assert (needed.peak_phase, needed.largest) == ("step", "buffers")


def test_a_linear_probe_lies_beside_weights_alone() -> None:
    passing, base = 80_000 + 12_800_000, memory.CUDA_CONTEXT_BYTES
    for probe_bytes, kept in ((7_000_000, 12_000_000), (9_000_000, 13_000_000)):
        needed = unsharded_need(SHAPES, FOOTPRINT, ON_GPU.changed(probe_bytes=probe_bytes))
        assert needed.phases["evaluation"] == kept + passing + base


AROUND = round(memory.STATE_SHARE * 12_000_000)
"""Gaps beside weights and moments."""


def test_on_a_cpu_what_the_heap_kept_is_there_when_saving() -> None:
    needed = unsharded_need(SHAPES, FOOTPRINT, SETTINGS).phases
    # 13.6 MB of small blocks; one tensor of 200,000 values is compared with what it was.
    assert needed["saving"] == 12_000_000 + memory.FIRST_CALLS_BYTES + AROUND + 13_600_000 + 800_000


def test_on_a_cpu_freed_blocks_stay() -> None:
    needed = unsharded_need(SHAPES, FOOTPRINT, SETTINGS)
    # 4.0 MB of activations and 9.6 MB of logits, all in small blocks.
    assert needed.kinds["buffers"] == memory.FIRST_CALLS_BYTES + AROUND + round(memory.GAP_SHARE * 13_600_000)
    assert needed.phases["step"] == sum(needed.kinds.values())


def test_on_a_cpu_large_logits_come_on_top_of_what_small_blocks_left() -> None:
    # 6,400 tokens: 51 MB of logits are a large block, 64 MB of activations are taken to be small ones.
    needed = unsharded_need(SHAPES, FOOTPRINT, SETTINGS.changed(micro_batch_size=64)).kinds
    assert needed["buffers"] == memory.FIRST_CALLS_BYTES + AROUND + round(memory.GAP_SHARE * 64_000_000)


def test_bf16_weights_are_made_beside_the_file() -> None:
    needed = unsharded_need(SHAPES, FOOTPRINT, SETTINGS.changed(weights_dtype="bf16"))
    assert needed.phases["loading"] == 2_000_000 + 4_000_000 + memory.FIRST_CALLS_BYTES
    # For a GPU both lie in the host's memory.
    needed = unsharded_need(SHAPES, FOOTPRINT, ON_GPU.changed(weights_dtype="bf16"))
    assert needed.phases["loading"] == 2_000_000 + memory.CUDA_CONTEXT_BYTES


def test_moment_is_a_sum_of_six_terms() -> None:
    one = LiveMemory(
        place="x",
        coefficients={"gradients": ZERO, "activations": (1, 2, 3, 4, 5, 6), "logits": ZERO, "buffers": ZERO},
    )
    # 1 + 2x2 + 3x2x10 + 4x2x100 + 5x10 + 6x100
    assert one.bytes(2, 10)["activations"] == 1515
