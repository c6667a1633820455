"""Bytes on a device when ZeRO shards weights, gradients and optimizer state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fulltune.footprint.records import Footprint, Moment
from fulltune.models.shapes import Shapes
from fulltune.plan import memory
from fulltune.records.plan import MemoryKind, MemorySettings, StateBytes
from fulltune.system import sharing
from fulltune.system.sharing import BUCKET_VALUES

IN_ENGINE = (2, 4, 12)
"""Bytes a parameter: bf16 weights, fp32 gradients, fp32 weights with both moments (its own estimators)."""
LIVE_VALUES = 10**9
"""The engine's default: values of gathered weights."""
HOST_BUFFERS = 1.22
"""Of what is offloaded, for pinned buffers: 176 GB were measured for 18 bytes of each of 8.03 B parameters."""
NVME_HOST_BYTES = 6
"""A parameter, for buffers of ZeRO-Infinity: 30 to 60 GB are reported for 7 B."""


def state(num_parameters: int, num_trained: int | None = None) -> StateBytes:
    """Bytes of all of it; None: all parameters are trained."""
    weights, gradients, optimizer = IN_ENGINE
    trained = num_parameters if num_trained is None else num_trained
    return StateBytes(weights=weights * num_parameters, gradients=gradients * trained, optimizer=optimizer * trained)


def host_bytes(shared: sharing.Sharing, num_parameters: int, num_devices: int, num_trained: int | None = None) -> int:
    """Bytes that all processes together take of the host's memory for what is offloaded."""
    buffers = NVME_HOST_BYTES * num_parameters if shared.optimizer_on_disk or shared.weights_on_disk else 0
    held = state(num_parameters, num_trained)
    each = sum(shared.parts_at("host", held, num_devices).values())
    return buffers + round(HOST_BUFFERS * num_devices * each)


def disk_bytes(shared: sharing.Sharing | None, num_parameters: int) -> int:
    """Bytes of what is offloaded to an NVMe disk."""
    if shared is None:
        return 0
    return sum(shared.parts_at("disk", state(num_parameters), 1).values())


def largest_unit(shapes: Shapes) -> int:
    """Parameters that must be whole on a device at a time: of a layer, or of the vocabulary."""
    vocabulary = shapes.vocab_size * shapes.hidden_size
    return max(vocabulary, (shapes.num_parameters - vocabulary) // max(1, shapes.num_layers))


def kinds(
    shared: sharing.Sharing, shapes: Shapes, num_devices: int, passing: Mapping[MemoryKind, int]
) -> dict[MemoryKind, int]:
    """Bytes by kind on each device in a step."""
    held = state(shapes.num_parameters, shapes.num_trained)
    found = shared.parts_at("device", held, num_devices)
    return {**found, **passing, "buffers": _gathered(shared, shapes) + memory.CUDA_CONTEXT_BYTES}


def _gathered(shared: sharing.Sharing, shapes: Shapes) -> int:
    """Weights and gradients that are whole on a device for a moment."""
    unit, parameters = largest_unit(shapes), shapes.num_parameters
    buckets = 2 * 2 * min(parameters, BUCKET_VALUES)
    if shared.stage < 3:
        return buckets
    return buckets + 2 * max(min(parameters, LIVE_VALUES), unit)


def passing(footprint: Footprint, precision: str, settings: MemorySettings) -> dict[MemoryKind, int]:
    """Activations and logits of a micro batch at their highest, in a traced precision."""
    moments = footprint.variant(precision, settings.activation_checkpointing).first
    return _highest(moments, footprint, settings.micro_batch_size, settings)


def scoring(footprint: Footprint, precision: str, settings: MemorySettings) -> dict[MemoryKind, int]:
    """The same of an eval batch, forward alone."""
    return _highest(footprint.evaluation[precision], footprint, settings.eval_batch_size, settings)


def _highest(
    moments: Sequence[Moment], footprint: Footprint, batch_size: int, settings: MemorySettings
) -> dict[MemoryKind, int]:
    rows = batch_size * footprint.sequences_per_row
    part = min(1.0, memory.CHUNK_TOKENS["cuda"] / (rows * settings.longest_tokens)) if settings.chunked_loss else 1.0
    held: list[dict[MemoryKind, int]] = []
    for moment in moments:
        found = moment.bytes(rows, settings.longest_tokens)
        held.append({"activations": found.get("activations", 0), "logits": round(part * found.get("logits", 0))})
    return max(held, key=lambda one: sum(one.values()))
