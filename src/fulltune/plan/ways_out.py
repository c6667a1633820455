"""What to change when nothing fits: each way with the bytes it frees, the least harmful first."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fulltune.plan.memory import Levers
from fulltune.recipe.fields import Recipe
from fulltune.records.plan import DiskNeed, MemoryNeed
from fulltune.records.survey import Placement, WayOut
from fulltune.system import deepspeed
from fulltune.text import in_words

MOST = 3
LEAST_SHARE = 0.1
"""Of what is short: what frees less, and is not enough, helps nobody."""
SHORTEST = 128
"""Rows are not cut below so many tokens."""
_LENGTH = "data.max_length: "


@dataclass(frozen=True)
class _Change:
    """A change of the levers; changes are tried in the order of their harm."""

    words: str
    costs: str
    levers: Levers
    settings: dict[str, Any]
    """What the recipe has to say for it."""
    harmless: bool = False
    """The result stays what it is."""


def of_memory(
    recipe: Recipe,
    levers: Levers,
    budget_bytes: int,
    need: Callable[[Levers], MemoryNeed],
    placements: Sequence[Placement] = (),
) -> tuple[WayOut, ...]:
    """The nearest ways to bring a training process under its budget.

    Args:
        recipe: As given.
        levers: The smallest settings that the recipe allows, which do not fit.
        budget_bytes: What one process may take.
        need: The arithmetic.
        placements: Other ways to place things; those that fit and run are ways out as well.

    Returns:
        At most three: first those that are enough, by harm, then those that free most.
    """
    now = need(levers).peak
    found = []
    for change in _changes(recipe, levers):
        peak = need(change.levers).peak
        way = WayOut(
            change=change.words,
            frees_bytes=now - peak,
            where="device",
            enough=peak <= budget_bytes,
            costs=change.costs,
            settings=change.settings,
        )
        found.append(way)
    others = [one for one in placements if _is_another(one)]
    if others:
        # After what leaves the result as it is, before what changes its numbers.
        fastest = max(others, key=lambda one: one.tokens_per_second or 0.0)
        place = sum(change.harmless for change in _changes(recipe, levers))
        found.insert(place, _as_way_out(fastest, now))
    least = LEAST_SHARE * (now - budget_bytes)
    found = [way for way in found if way.frees_bytes > 0 and (way.enough or way.frees_bytes >= least)]
    enough = [way for way in found if way.enough]
    if not enough:
        enough = _together(recipe, levers, budget_bytes, need, now)
    if len(enough) < MOST and not deepspeed.wanted(recipe):  # its weights may lie anywhere
        enough.append(_smaller_model(now, budget_bytes, levers, need))
    rest = sorted((way for way in found if not way.enough), key=lambda way: -way.frees_bytes)
    return tuple([*enough, *rest][:MOST])


def _is_another(placement: Placement) -> bool:
    return placement.fits and placement.runs and "train.extra.deepspeed" in placement.settings


def _as_way_out(placement: Placement, now: int) -> WayOut:
    host = f", {in_words(placement.host_bytes)} on the host" if placement.host_bytes else ""
    needs = f", {placement.needs}" if placement.needs else ""
    if placement.disk_bytes:
        host += f", {in_words(placement.disk_bytes)} on disk"
    speed = f"about {placement.tokens_per_second:,.0f} tokens/s{host}" if placement.tokens_per_second else host[2:]
    return WayOut(
        change=f"{placement.name}{needs}",
        frees_bytes=now - placement.device_bytes,
        where="device",
        enough=True,
        costs=speed or "other numbers in the last digits",
        settings=placement.settings,
    )


def _changes(recipe: Recipe, now: Levers) -> Iterator[_Change]:
    """What the recipe or the plan could have otherwise, the least harmful first."""
    if now.micro_batch_size > 1:
        lower = replace(now, micro_batch_size=1, accumulation=now.accumulation * now.micro_batch_size)
        named = {"train.micro_batch_size": 1}
        yield _Change("train.micro_batch_size: 1", "nothing but some speed", lower, named, harmless=True)
    if not now.chunked_loss and recipe.train.chunked_loss is False and not deepspeed.wanted(recipe):
        chunked = replace(now, chunked_loss=True)
        named = {"train.chunked_loss": True}
        yield _Change("train.chunked_loss: true", "nothing but some speed", chunked, named, harmless=True)
    if not now.activation_checkpointing and now.can_recompute:
        recomputed = replace(now, activation_checkpointing=True)
        named = {"train.activation_checkpointing": True}
        words = "train.activation_checkpointing: true"
        yield _Change(words, "a third more operations", recomputed, named, harmless=True)
    small, eighth = replace(now, optim="adamw_8bit"), {"train.optim": "adamw_8bit"}
    # DeepSpeed keeps weights in fp32 and cannot take our optimizers.
    free = not deepspeed.wanted(recipe)
    if free and now.optim != small.optim:
        yield _Change("train.optim: adamw_8bit", "moments of 8 bits", small, eighth)
    if free and now.weights_dtype == "fp32" and now.precision != "fp16":
        narrow = replace(now, weights_dtype="bf16", precision="bf16", optim="adamw_bf16", bf16_rounding="stochastic")
        sixteen = {"model.weights_dtype": "bf16"}
        # Those that the recipe names would contradict it.
        sixteen |= {"train.optim": "adamw_bf16"} if recipe.train.optim is not None else {}
        sixteen |= {"train.precision": "bf16"} if recipe.train.precision == "fp32" else {}
        yield _Change("model.weights_dtype: bf16", "weights of 16 bits, rounded at random", narrow, sixteen)
        both = replace(narrow, optim="adamw_8bit")
        words = "model.weights_dtype: bf16 with train.optim: adamw_8bit"
        yield _Change(words, "weights of 16 bits, moments of 8", both, sixteen | eighth)
    if now.longest_tokens >= 2 * SHORTEST:
        half = now.longest_tokens // 2
        shorter = replace(now, longest_tokens=half)
        yield _Change(f"{_LENGTH}{half}", "longer rows are cut", shorter, {"data.max_length": half})


def _together(
    recipe: Recipe, levers: Levers, budget_bytes: int, need: Callable[[Levers], MemoryNeed], now: int
) -> list[WayOut]:
    """Several changes at once, as few as are enough; none when all of them are not."""
    words: list[str] = []
    costs: list[str] = []
    named: dict[str, Any] = {}
    while change := next(_changes(recipe, levers), None):
        levers = change.levers
        named |= change.settings
        if words and words[-1].startswith(_LENGTH) and change.words.startswith(_LENGTH):  # shorter still
            words[-1] = change.words
        else:
            words.append(change.words)
            costs.append(change.costs)
        freed = now - need(levers).peak
        if freed >= now - budget_bytes:
            way = WayOut(
                change=" with ".join(words),
                frees_bytes=freed,
                where="device",
                enough=True,
                costs="; ".join(costs),
                settings=named,
            )
            return [way]
    return []


def _smaller_model(now: int, budget_bytes: int, levers: Levers, need: Callable[[Levers], MemoryNeed]) -> WayOut:
    """Everything in proportion to the parameters: rough, but a size to look for."""
    weights = need(levers).kinds["weights"]
    parameters = weights / (4 if levers.weights_dtype == "fp32" else 2) * budget_bytes / now
    size = f"{parameters / 1e9:,.1f} B" if parameters >= 1e9 else f"{parameters / 1e6:,.0f} M"
    return WayOut(
        change=f"a model of at most about {size} parameters",
        frees_bytes=now - budget_bytes,
        where="device",
        enough=True,
        costs="another model",
    )


def of_disk(need: DiskNeed, free_bytes: int, kept: int, output: str, freed_by_8bit: int) -> tuple[WayOut, ...]:
    """The nearest ways to bring a run onto its disk.

    Args:
        need: What the run takes.
        free_bytes: What there is.
        kept: `train.save_total_limit`.
        output: The recipe's output folder.
        freed_by_8bit: What 8-bit moments would free; 0 where they cannot be.
    """
    missing = need.total - free_bytes
    ways: list[tuple[str, int, str, dict[str, Any]]] = []
    # One that is kept, the best one, and the one being written; a short run writes no more anyway.
    freed = max(0, need.num_checkpoints - 3) * need.one_checkpoint if kept > 1 else 0
    if freed:
        ways.append(
            ("train.save_total_limit: 1", freed, "fewer checkpoints to go back to", {"train.save_total_limit": 1})
        )
    if freed_by_8bit > 0:
        ways.append(("train.optim: adamw_8bit", freed_by_8bit, "moments of 8 bits", {"train.optim": "adamw_8bit"}))
    ways.append((f"free {in_words(missing)} under {output}, or choose another output", missing, "nothing", {}))
    found = [
        WayOut(change=words, frees_bytes=freed, where="disk", enough=freed >= missing, costs=costs, settings=settings)
        for words, freed, costs, settings in ways
    ]
    return tuple(sorted(found, key=lambda way: not way.enough))[:MOST]


def in_lines(ways: Sequence[WayOut]) -> list[str]:
    """One line for each, for the message of an error."""
    lines = []
    for way in ways:
        named = way.hardware or any(name not in way.change for name in way.settings)
        flags = f"; {as_flags(way)}" if named else ""
        start = "enough" if way.enough else "helps"
        lines.append(f"{start}: {way.change}: frees {in_words(way.frees_bytes)} ({way.costs}){flags}")
    return lines


def as_flags(way: WayOut) -> str:
    """What to add to the command, as a shell takes it; empty for what no setting does."""
    words = ["--for", way.hardware] if way.hardware else []
    for name, value in way.settings.items():
        words += ["--set", f"{name}={in_yaml(value)}"]
    return shlex.join(words)


def in_yaml(value: Any) -> str:
    """As a recipe or `--set` has it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {in_yaml(inner)}" for name, inner in value.items()) + "}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
