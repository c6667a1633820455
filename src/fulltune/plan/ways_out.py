from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from fulltune.errors import DoesNotFitError
from fulltune.footprint.records import BYTES
from fulltune.plan import budget
from fulltune.plan.levers import LEVERS, Lever
from fulltune.plan.settings import PLACEMENT, WHERE, to_yaml
from fulltune.plan.workload import Basis
from fulltune.recipe.fields import Recipe
from fulltune.records.plan import DiskNeed, MemorySettings, PlacementOption, WayOut
from fulltune.text import format_bytes, listed

MAX_WAYS = 3
MIN_SHARE = 0.1
"""Share of the missing bytes below which an insufficient change is omitted."""


def memory_ways_out(
    basis: Basis, smallest: MemorySettings, placements: Sequence[PlacementOption] = ()
) -> tuple[WayOut, ...]:
    """Propose at most three ways to make a process fit in memory; those that are enough alone come first.

    The `smallest` settings do not fit; other `placements` are proposed if they fit.
    """
    recipe, now = basis.recipe, basis.memory_need(smallest).peak
    ways, mild = [], 0
    for lever, changed, settings in _usable_savings(recipe, smallest):
        peak = basis.memory_need(changed).peak
        ways.append(make_way_out(settings, now - peak, peak <= basis.available_bytes, lever.costs))
        mild += lever.same_result
    others = [one for one in placements if one.fits and one.settings.keys() & WHERE]
    if others:
        # Placements come after levers that keep the result: FSDP2 first, which needs no other library and computes in
        # the same types, then the fastest.
        fastest = max(others, key=lambda option: option.tokens_per_second or 0.0)
        own = [one for one in others if one.settings.get(PLACEMENT) == "fsdp2" and one is not fastest][:1]
        ways[mild:mild] = [_propose_placement(one, now) for one in (*own, fastest)]
    least = MIN_SHARE * (now - basis.available_bytes)
    ways = [way for way in ways if way.frees_bytes > 0 and (way.enough or way.frees_bytes >= least)]
    enough = [way for way in ways if way.enough] or _combine_savings(basis, smallest)
    if len(enough) < MAX_WAYS and not recipe.train.engine_by:  # ZeRO's weights may be offloaded
        enough.append(_propose_smaller_model(basis, smallest))
    rest = sorted((way for way in ways if not way.enough), key=lambda way: -way.frees_bytes)
    return tuple([*enough, *rest][:MAX_WAYS])


def _propose_placement(placement: PlacementOption, peak_now: int) -> WayOut:
    host = f", {format_bytes(placement.host_bytes)} on the host" if placement.host_bytes else ""
    speed = f"about {placement.tokens_per_second:,.0f} tokens/s{host}" if placement.tokens_per_second else host[2:]
    costs = speed or "results differ in the last digits"
    return make_way_out(placement.settings, peak_now - placement.device_bytes, True, costs, placement.name)


def make_way_out(
    settings: dict[str, Any],
    frees_bytes: int,
    enough: bool,
    costs: str,
    change: str = "",
    where: Literal["device", "disk"] = "device",
) -> WayOut:
    """Describe a change that frees memory or disk space; `enough` means that the run then fits."""
    first, *others = [f"{name}: {to_yaml(value)}" for name, value in settings.items()] or [""]
    words = change or (f"{first} with {listed(others)}" if others else first)
    return WayOut(change=words, frees_bytes=frees_bytes, where=where, enough=enough, costs=costs, settings=settings)


def _usable_savings(recipe: Recipe, now: MemorySettings) -> Iterator[tuple[Lever, MemorySettings, dict[str, Any]]]:
    """Yield each usable memory saving with the new memory settings and the recipe's changes, the mildest first."""
    for lever in LEVERS:
        if lever.way_out and not lever.why_unusable(recipe, now):
            changes = lever.apply(recipe, now)[-1]
            yield lever, now.changed(**changes), lever.recipe_settings(recipe, changes)


def _combine_savings(basis: Basis, now: MemorySettings) -> list[WayOut]:
    """Return a way to fit that combines as few memory savings as are enough, or an empty list."""
    needed = basis.memory_need(now).peak
    costs: list[str] = []
    named: dict[str, Any] = {}
    while step := next(_usable_savings(basis.recipe, now), None):
        lever, now, settings = step
        named |= settings
        costs += [lever.costs] if lever.costs not in costs else []
        peak = basis.memory_need(now).peak
        if peak <= basis.available_bytes:
            return [make_way_out(named, needed - peak, True, "; ".join(costs))]
    return []


def _propose_smaller_model(basis: Basis, settings: MemorySettings) -> WayOut:
    need = basis.memory_need(settings)
    parameters = need.kinds["weights"] / BYTES[settings.weights_dtype] * basis.available_bytes / need.peak
    size = f"{parameters / 1e9:,.1f} B" if parameters >= 1e9 else f"{parameters / 1e6:,.0f} M"
    return make_way_out(
        {}, need.peak - basis.available_bytes, True, "another model", f"a model of at most about {size} parameters"
    )


def format_ways_out(ways: Sequence[WayOut]) -> list[str]:
    """Format ways to make a run fit as lines of an error message."""
    lines = []
    for way in ways:
        named = way.hardware or any(name not in way.change for name in way.settings)
        flags = f"; {format_flags(way)}" if named else ""
        costs = f" ({way.costs})" if way.costs != "nothing" else ""
        lines.append(
            f"{'enough' if way.enough else 'helps'}: {way.change}: frees {format_bytes(way.frees_bytes)}{costs}{flags}"
        )
    return lines


def format_flags(way: WayOut) -> str:
    """Return a way out as command-line flags, quoted for a shell."""
    words = ["--for", way.hardware] if way.hardware else []
    for name, value in way.settings.items():
        words += ["--set", f"{name}={to_yaml(value)}"]
    return shlex.join(words)


# ---- a full disk -------------------------------------------------------------------------------------------------


def check_disk_space(
    recipe: Recipe, num_parameters: int, settings: MemorySettings, free_bytes: int | None, folder: str
) -> DiskNeed:
    """Return the run's disk need; raise `DoesNotFitError` with ways out if it exceeds `free_bytes`."""
    needed = budget.disk_need(recipe, num_parameters, settings)
    if free_bytes is not None and needed.total > free_bytes:
        lines = format_ways_out(disk_ways_out(recipe, num_parameters, settings, free_bytes, folder))
        raise DoesNotFitError([budget.disk_full_message(recipe, needed, free_bytes, folder), *lines])
    return needed


def disk_ways_out(
    recipe: Recipe, num_parameters: int, settings: MemorySettings, free_bytes: int, folder: str = ""
) -> tuple[WayOut, ...]:
    """Propose ways to make the run fit on its disk; those that are enough alone come first."""
    needed = budget.disk_need(recipe, num_parameters, settings)
    missing = needed.total - free_bytes
    ways: list[WayOut] = []
    # Three always remain: the newest one, the best, and the one being written.
    fewer = max(0, needed.num_checkpoints - 3) * needed.checkpoint_bytes
    if fewer and recipe.train.save_total_limit > 1:
        costs = "fewer checkpoints to roll back to"
        ways.append(make_way_out({"train.save_total_limit": 1}, fewer, fewer >= missing, costs, where="disk"))
    # ZeRO has its own optimizer, so nothing is freed there.
    smaller = needed.total - budget.disk_need(recipe, num_parameters, settings.changed(optim="adamw_8bit")).total
    if smaller > 0 and not recipe.train.engine_by:
        ways.append(
            make_way_out({"train.optim": "adamw_8bit"}, smaller, smaller >= missing, "8-bit moments", where="disk")
        )
    by_hand = f"free {format_bytes(missing)} on the disk of {folder or recipe.output}, or choose another folder"
    ways.append(make_way_out({}, missing, True, "nothing", by_hand, "disk"))
    return tuple(sorted(ways, key=lambda way: not way.enough))[:MAX_WAYS]
