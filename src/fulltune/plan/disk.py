"""Bytes of a run on disk."""

from __future__ import annotations

from typing import Any

from fulltune.errors import DoesNotFitError
from fulltune.footprint.records import BYTES
from fulltune.plan import memory, sharded, ways_out
from fulltune.recipe.fields import Recipe
from fulltune.records.plan import DiskNeed, MemorySettings
from fulltune.records.survey import WayOut
from fulltune.system import sharing
from fulltune.text import format_bytes

ENGINE_BYTES = 16
"""A parameter in ZeRO's checkpoints: weights and moments in fp32 (12), what passes compute with (4)."""
MOMENTS_BYTES = 8
"""A parameter's two moments in fp32."""

SMALL_FILES_BYTES = 16 * 2**20
"""In each checkpoint and in the model's folder beside the tensors: a tokenizer of 1 MB (30,000 words) to 17 MB (128,000
words), config, random state, log."""


def need(recipe: Recipe, num_parameters: int, settings: MemorySettings) -> DiskNeed:
    """Checkpoints and models at their fullest: the kept checkpoints, the best one and the one being written; the
    finished model, and the weights before step 1, which are kept until it is saved. All hold what is trained. A
    run that is stopped in between writes one checkpoint more."""
    state = memory.state_of(num_parameters, settings)
    weights = memory.num_trained(num_parameters, settings) * BYTES[memory.trained_dtype(settings)]
    one = weights + state.optimizer
    if recipe.train.placement == "fsdp2":  # moments are in fp32 there, however they are kept
        one = weights + max(state.optimizer, MOMENTS_BYTES * memory.num_trained(num_parameters, settings))
    if recipe.train.engine_by:
        one = num_parameters * ENGINE_BYTES
    return DiskNeed(
        one_checkpoint=one + SMALL_FILES_BYTES,
        num_checkpoints=min(recipe.train.save_total_limit + 2, settings.num_saves or 10**9),
        model=2 * weights + SMALL_FILES_BYTES,
        offloaded=sharded.disk_bytes(sharing.of(recipe), num_parameters),
    )


def refuse_what_cannot_fit(
    recipe: Recipe, num_parameters: int, settings: MemorySettings, free_bytes: int, place: str
) -> None:
    """Before step 1, not when the third checkpoint is half written. `place` is what was measured, a folder; empty: the
    recipe's output.

    Raises:
        DoesNotFitError: Naming both sizes.
    """
    needed = need(recipe, num_parameters, settings)
    if needed.total > free_bytes:
        lines = ways_out.in_lines(ways(recipe, num_parameters, settings, free_bytes, place))
        raise DoesNotFitError([short_by(recipe, needed, free_bytes, place), *lines])


def short_by(recipe: Recipe, needed: DiskNeed, free_bytes: int, place: str) -> str:
    parts = f"{needed.num_checkpoints} x {format_bytes(needed.one_checkpoint)} and {format_bytes(needed.model)}"
    parts += f", {format_bytes(needed.offloaded)} offloaded" if needed.offloaded else ""
    return (
        f"{place or recipe.output}: checkpoints and model need {format_bytes(needed.total)} on disk ({parts}), but "
        f"{format_bytes(free_bytes)} are free"
    )


def ways(
    recipe: Recipe, num_parameters: int, settings: MemorySettings, free_bytes: int, place: str = ""
) -> tuple[WayOut, ...]:
    """The nearest ways to bring the run onto its disk."""
    needed = need(recipe, num_parameters, settings)
    missing = needed.total - free_bytes
    found: list[tuple[dict[str, Any], int, str]] = []
    # One that is kept, the best one, and the one being written; a short run writes no more anyway.
    fewer = max(0, needed.num_checkpoints - 3) * needed.one_checkpoint
    if fewer and recipe.train.save_total_limit > 1:
        found.append(({"train.save_total_limit": 1}, fewer, "fewer checkpoints to go back to"))
    # Inside an engine our optimizers cannot run, so nothing is freed.
    smaller = needed.total - need(recipe, num_parameters, settings.changed(optim="adamw_8bit")).total
    if smaller > 0 and not recipe.train.engine_by:
        found.append(({"train.optim": "adamw_8bit"}, smaller, "moments of 8 bits"))
    found.append(({}, missing, "nothing"))
    by_hand = f"free {format_bytes(missing)} on the disk of {place or recipe.output}, or choose another place"
    ways = [
        ways_out.way(named, freed, freed >= missing, costs, change="" if named else by_hand, where="disk")
        for named, freed, costs in found
    ]
    return tuple(sorted(ways, key=lambda way: not way.enough))[: ways_out.MOST]
