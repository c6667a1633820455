"""What to change when nothing fits: each way with the bytes it frees, the least harmful first."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from fulltune.errors import DoesNotFitError
from fulltune.footprint.records import BYTES
from fulltune.plan import budget
from fulltune.plan.levers import LEVERS, Lever
from fulltune.plan.settings import PLACEMENT, WHERE, in_yaml
from fulltune.plan.workload import Basis
from fulltune.recipe.fields import Recipe
from fulltune.records.plan import DiskNeed, MemorySettings, PlacementOption, WayOut
from fulltune.text import format_bytes, listed

MOST = 3
LEAST_SHARE = 0.1
"""Of what is short: what frees less, and is not enough, helps nobody."""


def of_memory(basis: Basis, smallest: MemorySettings, placements: Sequence[PlacementOption] = ()) -> tuple[WayOut, ...]:
    """The nearest ways to bring a training process under its budget, at most three: first those that are enough, by
    harm, then those that free most.

    Args:
        basis: The recipe, the arithmetic, and what one process may take.
        smallest: The smallest settings that the recipe allows, which do not fit.
        placements: Other ways to place things; those that fit are ways out as well.
    """
    recipe, now = basis.recipe, basis.need(smallest).peak
    found, mild = [], 0
    for lever, changed, settings in _possible(recipe, smallest):
        peak = basis.need(changed).peak
        found.append(way(settings, now - peak, peak <= basis.available_bytes, lever.costs))
        mild += lever.same_result
    others = [one for one in placements if one.fits and one.settings.keys() & WHERE]
    if others:
        # After what leaves the result as it is, before what changes its numbers; of several the fastest, and first what
        # needs no other library and computes in the same types.
        fastest = max(others, key=lambda one: one.tokens_per_second or 0.0)
        own = [one for one in others if one.settings.get(PLACEMENT) == "fsdp2" and one is not fastest][:1]
        found[mild:mild] = [_as_way_out(one, now) for one in (*own, fastest)]
    least = LEAST_SHARE * (now - basis.available_bytes)
    found = [way for way in found if way.frees_bytes > 0 and (way.enough or way.frees_bytes >= least)]
    enough = [way for way in found if way.enough]
    enough = enough or _together(basis, smallest)
    if len(enough) < MOST and not recipe.train.engine_by:  # its weights may lie anywhere
        enough.append(_smaller_model(basis, smallest))
    rest = sorted((way for way in found if not way.enough), key=lambda way: -way.frees_bytes)
    return tuple([*enough, *rest][:MOST])


def _as_way_out(placement: PlacementOption, now: int) -> WayOut:
    host = f", {format_bytes(placement.host_bytes)} on the host" if placement.host_bytes else ""
    speed = f"about {placement.tokens_per_second:,.0f} tokens/s{host}" if placement.tokens_per_second else host[2:]
    costs = speed or "other numbers in the last digits"
    return way(placement.settings, now - placement.device_bytes, True, costs, placement.name)


def way(
    settings: dict[str, Any],
    frees_bytes: int,
    enough: bool,
    costs: str,
    change: str = "",
    where: Literal["device", "disk"] = "device",
) -> WayOut:
    """A way out by settings, named by them unless it has words of its own."""
    first, *others = [f"{name}: {in_yaml(value)}" for name, value in settings.items()] or [""]
    words = change or (f"{first} with {listed(others)}" if others else first)
    return WayOut(change=words, frees_bytes=frees_bytes, where=where, enough=enough, costs=costs, settings=settings)


def _possible(recipe: Recipe, now: MemorySettings) -> Iterator[tuple[Lever, MemorySettings, dict[str, Any]]]:
    """What the recipe or the plan could have otherwise, the mildest first: with the settings after it, and their names
    in the recipe."""
    for lever in LEVERS:
        if lever.way_out and not lever.obstacle(recipe, now):
            changes = lever.apply(recipe, now)[-1]
            yield lever, now.changed(**changes), lever.settings(recipe, changes)


def _together(basis: Basis, now: MemorySettings) -> list[WayOut]:
    """Several changes at once, as few as are enough; none when all of them are not."""
    needed = basis.need(now).peak
    costs: list[str] = []
    named: dict[str, Any] = {}
    while found := next(_possible(basis.recipe, now), None):
        lever, now, settings = found
        named |= settings
        costs += [lever.costs] if lever.costs not in costs else []
        peak = basis.need(now).peak
        if peak <= basis.available_bytes:
            return [way(named, needed - peak, True, "; ".join(costs))]
    return []


def _smaller_model(basis: Basis, settings: MemorySettings) -> WayOut:
    """Everything in proportion to the parameters: rough, but a size to look for."""
    need = basis.need(settings)
    parameters = need.kinds["weights"] / BYTES[settings.weights_dtype] * basis.available_bytes / need.peak
    size = f"{parameters / 1e9:,.1f} B" if parameters >= 1e9 else f"{parameters / 1e6:,.0f} M"
    return way(
        {}, need.peak - basis.available_bytes, True, "another model", f"a model of at most about {size} parameters"
    )


def in_lines(ways: Sequence[WayOut]) -> list[str]:
    """One line for each, for the message of an error."""
    lines = []
    for way in ways:
        named = way.hardware or any(name not in way.change for name in way.settings)
        flags = f"; {as_flags(way)}" if named else ""
        costs = f" ({way.costs})" if way.costs != "nothing" else ""
        lines.append(
            f"{'enough' if way.enough else 'helps'}: {way.change}: frees {format_bytes(way.frees_bytes)}{costs}{flags}"
        )
    return lines


def as_flags(way: WayOut) -> str:
    """What to add to the command, as a shell takes it; empty for what no setting does."""
    words = ["--for", way.hardware] if way.hardware else []
    for name, value in way.settings.items():
        words += ["--set", f"{name}={in_yaml(value)}"]
    return shlex.join(words)


# ---- of a full disk ----------------------------------------------------------------------------------------------


def refuse_full_disk(
    recipe: Recipe, num_parameters: int, settings: MemorySettings, free_bytes: int | None, place: str
) -> DiskNeed:
    """What is needed: before step 1, not when the third checkpoint is half written.

    Args:
        recipe: As given.
        num_parameters: Of the model.
        settings: Of the plan.
        free_bytes: None: not known.
        place: What was measured, a folder; empty: the recipe's output.

    Raises:
        DoesNotFitError: Naming both sizes.
    """
    needed = budget.disk_need(recipe, num_parameters, settings)
    if free_bytes is not None and needed.total > free_bytes:
        lines = in_lines(of_disk(recipe, num_parameters, settings, free_bytes, place))
        raise DoesNotFitError([budget.short_by(recipe, needed, free_bytes, place), *lines])
    return needed


def of_disk(
    recipe: Recipe, num_parameters: int, settings: MemorySettings, free_bytes: int, place: str = ""
) -> tuple[WayOut, ...]:
    """The nearest ways to bring the run onto its disk."""
    needed = budget.disk_need(recipe, num_parameters, settings)
    missing = needed.total - free_bytes
    found: list[WayOut] = []
    # One that is kept, the best one, and the one being written; a short run writes no more anyway.
    fewer = max(0, needed.num_checkpoints - 3) * needed.one_checkpoint
    if fewer and recipe.train.save_total_limit > 1:
        costs = "fewer checkpoints to go back to"
        found.append(way({"train.save_total_limit": 1}, fewer, fewer >= missing, costs, where="disk"))
    # Inside an engine our optimizers cannot run, so nothing is freed.
    smaller = needed.total - budget.disk_need(recipe, num_parameters, settings.changed(optim="adamw_8bit")).total
    if smaller > 0 and not recipe.train.engine_by:
        costs = "moments of 8 bits"
        found.append(way({"train.optim": "adamw_8bit"}, smaller, smaller >= missing, costs, where="disk"))
    by_hand = f"free {format_bytes(missing)} on the disk of {place or recipe.output}, or choose another place"
    found.append(way({}, missing, True, "nothing", by_hand, "disk"))
    return tuple(sorted(found, key=lambda one: not one.enough))[:MOST]
