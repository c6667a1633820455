"""The memory of a process that shares a model out with FSDP2, against arithmetic by hand."""

from __future__ import annotations

from typing import Any

import pytest

from fulltune.footprint.records import Footprint
from fulltune.models.shapes import Shapes
from fulltune.models.sharding import Units
from fulltune.plan import fsdp2, memory
from fulltune.records.plan import MemorySettings
from tests.unit.plan import sizes

M = 10**6
ROOT, BLOCK, NUM_BLOCKS = 100 * M, 50 * M, 10
P = ROOT + NUM_BLOCKS * BLOCK
NORM = fsdp2.NORM_VALUES * 4 * 100 * 1000
"""Bytes of 100 tokens of 1,000 numbers."""
SHAPES = Shapes(
    model_type="bert",
    is_decoder=False,
    num_parameters=P,
    num_layers=NUM_BLOCKS,
    hidden_size=1000,
    vocab_size=90_000,
    position_limit=None,
    units=Units(root=ROOT, persistent=0, freed=NUM_BLOCKS * BLOCK, block=BLOCK, apart=0),
)
SETTINGS = MemorySettings(micro_batch_size=1, longest_tokens=100, num_processes=4, device="cuda")


def footprint(
    activations: float, place: str = "backward 0:last", gradients: float = 0.0, logits: float = 0.0
) -> Footprint:
    """So many bytes of activations and logits a token, at that one moment."""
    moment = sizes.moment(place, gradients=gradients, activations=activations, logits=logits)
    return Footprint(
        weights_dtype="fp32",
        largest_tensor=90 * M,
        sequences_per_row=1,
        variants=sizes.variants(moment, moment, ("fp32",)),
        evaluation={"fp32": (moment,)},
        flops_per_token=1.0,
        attention_flops_per_pair=0.0,
    )


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_state_is_shared_out_and_a_block_is_whole_on_a_gpu(processes: int) -> None:
    settings = SETTINGS.changed(num_processes=processes)
    needed = fsdp2.fsdp2_memory_need(SHAPES, footprint(20 * M, gradients=4 * BLOCK / 2), settings)

    part = 4 * P // processes
    assert (needed.kinds["weights"], needed.kinds["optimizer"]) == (part, 2 * part)
    assert needed.kinds["activations"] == 100 * 20 * M
    # No gradient has been reduced yet, and half of one block's are there.
    assert needed.kinds["gradients"] == 4 * BLOCK / 2
    # The root's weights and the block's, the next block as it was received, the gradients of the one before.
    assert needed.kinds["buffers"] == 4 * (ROOT + 3 * BLOCK) + memory.CUDA_CONTEXT_BYTES


def test_what_an_encoder_recomputes_is_gone_when_a_block_ends() -> None:
    """Without a language model's head, the last and the first block tell what blocks keep and what one recomputes."""
    kept, again = 2 * M, 50 * M  # a block's input; what one makes anew
    last, first = (
        footprint((count * kept + again) / 100, f"backward 0:{place}", gradients=done * 4 * BLOCK + 20 * M)
        for place, count, done in (("last", NUM_BLOCKS, 0), ("first", 1, NUM_BLOCKS - 1))
    )
    pairs = zip(last.variants, first.variants, strict=True)
    both = tuple(one.model_copy(update={"first": (*one.first, *other.first)}) for one, other in pairs)
    traced = last.model_copy(update={"variants": both})
    settings = SETTINGS.changed(num_processes=10**6, activation_checkpointing=True)
    needed = fsdp2.fsdp2_memory_need(SHAPES, traced, settings)
    assert needed.kinds["gradients"] == pytest.approx(4 * BLOCK, rel=1e-4)
    assert needed.kinds["activations"] == (NUM_BLOCKS - 1) * kept + NORM


def test_a_blocks_gradients_are_whole_when_its_activations_are_gone() -> None:
    needed = fsdp2.fsdp2_memory_need(
        SHAPES, footprint(M / 2, gradients=4 * BLOCK / 2), SETTINGS.changed(num_processes=10**6)
    )
    # Its share is gone, and its first norm's backward pass holds some numbers of each token.
    assert needed.kinds["activations"] == 100 * M / 2 * (1 - 1 / NUM_BLOCKS) + NORM
    assert needed.kinds["gradients"] == pytest.approx(4 * BLOCK, rel=1e-4)
    # Blocks that differ: nothing tells how many of its gradients are there.
    other = SHAPES.units.model_copy(update={"freed": NUM_BLOCKS * BLOCK - M}) if SHAPES.units else None
    shapes = SHAPES.model_copy(update={"units": other})
    needed = fsdp2.fsdp2_memory_need(shapes, footprint(20 * M, gradients=4 * BLOCK / 2), SETTINGS)
    assert (needed.kinds["gradients"], needed.kinds["activations"]) == (4 * BLOCK, 100 * 20 * M)


def test_a_loss_in_pieces_has_the_heads_gradient_before_the_backward_pass() -> None:
    words, hidden = SHAPES.vocab_size, SHAPES.hidden_size
    units = Units(root=0, persistent=words * hidden + 1, freed=P - words * hidden - 1, block=BLOCK, apart=0)
    shapes, settings = SHAPES.model_copy(update={"units": units}), SETTINGS.changed(longest_tokens=1000)
    for dtype, value in (("fp32", 4), ("bf16", 2)):
        chunked = settings.changed(weights_dtype=dtype, chunked_loss=True)
        needed = fsdp2.fsdp2_memory_need(shapes, footprint(20 * M, "backward head", 0, 1), chunked)
        # Summed up in fp32, whatever the weights are.
        assert needed.kinds["logits"] == 1000 * words * 4
        assert needed.kinds["gradients"] == 4 * words * hidden
        assert needed.kinds["buffers"] == value * units.persistent + memory.CUDA_CONTEXT_BYTES


def test_accumulation_holds_parts_of_gradients_alone() -> None:
    one, more = (
        fsdp2.fsdp2_memory_need(SHAPES, footprint(20 * M), SETTINGS.changed(gradient_accumulation_steps=passes)).kinds
        for passes in (1, 16)
    )
    assert more["gradients"] - one["gradients"] == 4 * P // SETTINGS.num_processes
    assert {**more, "gradients": 0} == {**one, "gradients": 0}


def test_one_tensor_of_the_finished_model_is_put_together_at_a_time() -> None:
    on_cpu, on_gpu = (
        fsdp2.fsdp2_memory_need(SHAPES, footprint(0), SETTINGS.changed(device=device)).phases
        for device in ("cpu", "cuda")
    )
    largest = 4 * 90 * M
    assert on_gpu["saving"] == 12 * P / 4 + largest * (1 + 1 / 4) + memory.CUDA_CONTEXT_BYTES
    assert on_cpu["saving"] > 12 * P / 4 + largest * (2 + 1 / 4)
    assert on_cpu["saving"] < 12 * P / 4 + 4 * P


@pytest.mark.parametrize(
    ("types", "weights", "optimizer"),
    [
        ({"optim": "adamw_bf16"}, 4, 4),
        ({"optim": "adamw_8bit"}, 4, 2 * (1 + 4 / 128)),
        ({"optim": "adamw_bf16", "weights_dtype": "bf16", "precision": "bf16"}, 2, 4),
        ({"optim": "adamw_bf16", "weights_dtype": "bf16", "bf16_rounding": "kahan"}, 2, 6),
    ],
)
def test_other_types_of_weights_and_moments(types: dict[str, Any], weights: int, optimizer: float) -> None:
    settings = SETTINGS.changed(**(types | {"precision": "fp32"}))
    needed = fsdp2.fsdp2_memory_need(SHAPES, footprint(20 * M, gradients=weights * BLOCK / 2), settings)
    assert needed.kinds["weights"] == weights * P / 4
    assert needed.kinds["optimizer"] == pytest.approx(optimizer * P / 4)
    # What is gathered and sent has the weights' type.
    assert needed.kinds["gradients"] == weights * BLOCK / 2
    assert needed.kinds["buffers"] == weights * (ROOT + 3 * BLOCK) + memory.CUDA_CONTEXT_BYTES


def test_peak_of_one_process_falls_towards_what_is_whole() -> None:
    peaks = [
        fsdp2.fsdp2_memory_need(SHAPES, footprint(M), SETTINGS.changed(num_processes=count)).phases["step"]
        for count in (2, 4, 8, 10**6)
    ]
    assert peaks == sorted(peaks, reverse=True)
    whole = 4 * (ROOT + 4 * BLOCK) + 100 * M * (1 - 1 / NUM_BLOCKS) + NORM
    assert peaks[-1] == pytest.approx(whole + memory.CUDA_CONTEXT_BYTES, rel=0.01)


def test_units_by_a_rule_where_none_are_known() -> None:
    units = fsdp2.fsdp_units(SHAPES.model_copy(update={"units": None}))
    assert units.root == 90 * M
    assert units.block == (P - 90 * M) // NUM_BLOCKS
    assert units.reduced == P
