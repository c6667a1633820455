from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from typing import Any

from fulltune.errors import DoesNotFitError
from fulltune.footprint.records import BYTES
from fulltune.plan import budget
from fulltune.plan.savings import MEMORY_SAVINGS, MemorySaving
from fulltune.plan.settings import PLACEMENT, WHERE
from fulltune.plan.workload import Basis
from fulltune.recipe.fields import Recipe
from fulltune.records.plan import Alternative, DiskNeed, MemorySettings, PlacementOption
from fulltune.text import format_bytes, listed, to_yaml

MAX_ALTERNATIVES = 3
MIN_SHARE = 0.1
"""A change that is not enough alone is proposed only if it saves at least this share of the missing bytes."""


def propose_for_memory(
    basis: Basis, smallest: MemorySettings, placements: Sequence[PlacementOption] = ()
) -> tuple[Alternative, ...]:
    """Propose at most three changes that make a process fit in memory. Changes that suffice alone come first.

    `smallest` are the settings with the lowest memory need, which still do not fit. `placements` that fit are also
    proposed.
    """
    recipe, now = basis.recipe, basis.memory_need(smallest).peak
    ways, mild = [], 0
    for saving, changed, settings in _usable_savings(recipe, smallest):
        peak = basis.memory_need(changed).peak
        ways.append(make_alternative(settings, now - peak, peak <= basis.available_bytes, saving.costs))
        mild += saving.same_result
    others = [one for one in placements if one.fits and one.settings.keys() & WHERE]
    if others:
        # Placements come after savings that keep the result: FSDP2 first, which needs no other library and computes in
        # the same types, then the fastest.
        fastest = max(others, key=lambda option: option.tokens_per_second or 0.0)
        own = [one for one in others if one.settings.get(PLACEMENT) == "fsdp2" and one is not fastest][:1]
        ways[mild:mild] = [_propose_placement(one, now) for one in (*own, fastest)]
    least = MIN_SHARE * (now - basis.available_bytes)
    ways = [way for way in ways if way.frees_bytes > 0 and (way.enough or way.frees_bytes >= least)]
    enough = [way for way in ways if way.enough] or _combine_savings(basis, smallest)
    if len(enough) < MAX_ALTERNATIVES and not (recipe.train.zero_enabled_by or smallest.stream):  # on another tier
        need = basis.memory_need(smallest)
        parameters = need.kinds["weights"] / BYTES[smallest.weights_dtype] * basis.available_bytes / need.peak
        size = f"{parameters / 1e9:,.1f} B" if parameters >= 1e9 else f"{parameters / 1e6:,.0f} M"
        model = f"a model with at most about {size} parameters"
        enough.append(make_alternative({}, need.peak - basis.available_bytes, True, "another model", model))
    rest = sorted((way for way in ways if not way.enough), key=lambda way: -way.frees_bytes)
    return tuple([*enough, *rest][:MAX_ALTERNATIVES])


def _propose_placement(placement: PlacementOption, peak_now: int) -> Alternative:
    host = f", {format_bytes(placement.host_bytes)} on the host" if placement.host_bytes else ""
    speed = f"about {placement.tokens_per_second:,.0f} tokens/s{host}" if placement.tokens_per_second else host[2:]
    costs = speed or "results differ in the last digits"
    return make_alternative(placement.settings, peak_now - placement.device_bytes, True, costs, placement.name)


def make_alternative(
    settings: dict[str, Any],
    frees_bytes: int,
    enough: bool,
    costs: str,
    change: str = "",
) -> Alternative:
    """Describe a change that frees memory or disk space. `enough` is True if the run then fits; the description
    `change` defaults to the settings."""
    first, *others = [f"{name}: {to_yaml(value)}" for name, value in settings.items()] or [""]
    words = change or (f"{first} with {listed(others)}" if others else first)
    return Alternative(change=words, frees_bytes=frees_bytes, enough=enough, costs=costs, settings=settings)


def _usable_savings(
    recipe: Recipe, now: MemorySettings
) -> Iterator[tuple[MemorySaving, MemorySettings, dict[str, Any]]]:
    """Yield (saving, resulting memory settings, recipe settings) for each usable memory saving, the least costly
    first."""
    for saving in MEMORY_SAVINGS:
        if saving.is_proposed and not saving.why_unusable(recipe, now):
            changes = saving.apply(recipe, now)[-1]
            yield saving, now.changed(**changes), saving.recipe_settings(recipe, changes)


def _combine_savings(basis: Basis, now: MemorySettings) -> list[Alternative]:
    """Combine memory savings until the run fits. Return one alternative in a list, or an empty list if the run never
    fits."""
    needed = basis.memory_need(now).peak
    costs: list[str] = []
    named: dict[str, Any] = {}
    while step := next(_usable_savings(basis.recipe, now), None):
        saving, now, settings = step
        named |= settings
        costs += [saving.costs] if saving.costs not in costs else []
        peak = basis.memory_need(now).peak
        if peak <= basis.available_bytes:
            return [make_alternative(named, needed - peak, True, "; ".join(costs))]
    return []


def format_alternatives(ways: Sequence[Alternative]) -> list[str]:
    """Describe each alternative on one line that says whether it is enough on its own."""
    lines = []
    for way in ways:
        named = way.hardware or any(name not in way.change for name in way.settings)
        flags = f"; {format_flags(way)}" if named else ""
        costs = f" ({way.costs})" if way.costs != "nothing" else ""
        frees = f": frees {format_bytes(way.frees_bytes)}" if way.settings or way.hardware else ""
        lines.append(f"{'enough' if way.enough else 'not enough alone'}: {way.change}{frees}{costs}{flags}")
    return lines


def format_flags(way: Alternative) -> str:
    """Return an alternative as command-line flags, quoted for a shell."""
    words = ["--for", way.hardware] if way.hardware else []
    for name, value in way.settings.items():
        words += ["--set", f"{name}={to_yaml(value)}"]
    return shlex.join(words)


# ---- a full disk -------------------------------------------------------------------------------------------------


def check_disk_space(
    recipe: Recipe, num_parameters: int, settings: MemorySettings, free_bytes: int | None, folder: str
) -> DiskNeed:
    """Return the disk space that the run needs; raise `DoesNotFitError` with alternatives if it exceeds
    `free_bytes`."""
    needed = budget.disk_need(recipe, num_parameters, settings)
    if free_bytes is not None and needed.total > free_bytes:
        lines = format_alternatives(propose_for_disk(recipe, num_parameters, settings, free_bytes, folder))
        raise DoesNotFitError([budget.disk_full_message(recipe, needed, free_bytes, folder), *lines])
    return needed


def propose_for_disk(
    recipe: Recipe, num_parameters: int, settings: MemorySettings, free_bytes: int, folder: str = ""
) -> tuple[Alternative, ...]:
    """Propose changes that make the run fit on its disk. Changes that suffice alone come first."""
    needed = budget.disk_need(recipe, num_parameters, settings)
    missing = needed.total - free_bytes
    ways: list[Alternative] = []
    # Three always remain: the newest one, the best, and the one being written.
    fewer = max(0, needed.num_checkpoints - 3) * needed.checkpoint_bytes
    if fewer and recipe.train.save_total_limit > 1:
        costs = "fewer checkpoints to roll back to"
        ways.append(make_alternative({"train.save_total_limit": 1}, fewer, fewer >= missing, costs))
    if settings.stream is not None and recipe.train.load_best_model_at_end:
        last, best = {"train.load_best_model_at_end": False}, BYTES[settings.weights_dtype] * num_parameters
        ways.append(make_alternative(last, best, best >= missing, "the last weights instead of the best"))
    # ZeRO has its own optimizer, so nothing is freed there.
    smaller = needed.total - budget.disk_need(recipe, num_parameters, settings.changed(optim="adamw_8bit")).total
    if smaller > 0 and not recipe.train.zero_enabled_by:
        ways.append(make_alternative({"train.optim": "adamw_8bit"}, smaller, smaller >= missing, "8-bit moments"))
    by_hand = f"free {format_bytes(missing)} on the disk of {folder or recipe.output}, or choose another folder"
    ways.append(make_alternative({}, missing, True, "nothing", by_hand))
    return tuple(sorted(ways, key=lambda way: not way.enough))[:MAX_ALTERNATIVES]
