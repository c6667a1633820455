"""Choose what costs memory: of the settings that fit, those that leave the result as it is, and the fastest of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from fulltune.errors import DoesNotFitError
from fulltune.plan import ways_out
from fulltune.plan.budget import MemoryBudget
from fulltune.plan.levers import LEVERS, whole_logits
from fulltune.plan.settings import Reasons
from fulltune.recipe.fields import Recipe
from fulltune.recipe.tasks import FACTS
from fulltune.records.plan import MemoryNeed, MemorySettings
from fulltune.text import format_bytes

COMFORTABLE = 0.9
"""Share of the memory that is used while there is a choice: the rest is for what the arithmetic does not know."""
SAME_SPEED = 0.03
"""Less than this is no difference."""
DOING = {
    "loading": "loading the model",
    "step": "a step",
    "evaluation": "an evaluation",
    "saving": "saving",
    "resuming": "going on from a checkpoint",
}
Speed = Callable[[MemorySettings], float | None]
"""Tokens a second of settings; None where the hardware's speed is not known."""


@dataclass(frozen=True)
class Option:
    """Settings that could be taken, and what they need."""

    settings: MemorySettings
    memory: MemoryNeed
    why_recomputed: str = ""
    """Why activations are recomputed, or are not."""


def choose(recipe: Recipe, start: MemorySettings, rows_per_process: int, budget: MemoryBudget, speed: Speed) -> Option:
    """The fastest settings that fit; levers that change the result, as 8-bit moments do, only where nothing else fits.

    What the recipe gives stays. `start` has everything else, with no lever taken.

    Raises:
        DoesNotFitError: When nothing fits, with the nearest ways out.
    """
    for numbers in _with_levers(recipe, start, same_result=False):
        if found := fastest(recipe, numbers, rows_per_process, budget, speed):
            return found
    raise _does_not_fit(recipe, smallest(recipe, start, rows_per_process, budget), budget)


def fastest(
    recipe: Recipe, start: MemorySettings, rows_per_process: int, budget: MemoryBudget, speed: Speed
) -> Option | None:
    """The fastest settings with the same numbers that fit, with some memory to spare if possible; None: none fit.

    Of settings that are as fast, those that recompute nothing come first, and larger micro batches before smaller ones.
    """
    for share in (COMFORTABLE, 1.0):
        most = share * budget.available_bytes
        tried = [
            _with_eval_batch(recipe, settings, most, budget)
            for settings in _candidates(recipe, start, rows_per_process)
        ]
        if fitting := [(one, speed(one.settings) or 0.0) for one in tried if one.memory.peak <= most]:
            least = max(tokens for _, tokens in fitting) / (1 + SAME_SPEED)
            found = next(one for one, tokens in fitting if tokens >= least)
            return replace(found, why_recomputed=_why_recomputed(found, tried, most, speed))
    return None


def smallest(
    recipe: Recipe,
    start: MemorySettings,
    rows_per_process: int,
    budget: MemoryBudget,
    same_numbers: bool = False,
) -> Option:
    """The settings that need least: what to say when nothing fits; `same_numbers`: without levers that change the
    result.

    With accumulation the gradients of earlier passes stay beside the next pass and its copy of the weights in 16 bits,
    so the smallest micro batch does not always need least.
    """
    options = [
        _with_eval_batch(recipe, settings, 0, budget)
        for numbers in ([start] if same_numbers else _with_levers(recipe, start, same_result=False))
        for settings in _candidates(recipe, numbers, rows_per_process)
    ]
    return min(options, key=lambda one: (one.memory.peak, one.memory.phases["step"], one.settings.micro_batch_size))


def _candidates(recipe: Recipe, start: MemorySettings, rows_per_process: int) -> list[MemorySettings]:
    """Every micro batch that the recipe allows, without and with the levers that leave the result as it is."""
    sizes = [size for size in range(rows_per_process, 0, -1) if rows_per_process % size == 0]
    if recipe.train.micro_batch_size is not None:
        sizes = [recipe.train.micro_batch_size]
    return [
        settings.changed(micro_batch_size=size, gradient_accumulation_steps=max(1, rows_per_process // size))
        for settings in _with_levers(recipe, start, same_result=True)
        for size in sizes
    ]


def _with_levers(recipe: Recipe, start: MemorySettings, same_result: bool) -> list[MemorySettings]:
    """The settings, and again with each lever that may be taken without asking."""
    found = [start]
    for lever in LEVERS:
        if lever.searched and lever.same_result == same_result and not lever.refusal(recipe, start):
            found += [one.changed(**lever.apply(recipe, one)[-1]) for one in found]
    return found


def _with_eval_batch(recipe: Recipe, settings: MemorySettings, most_bytes: float, budget: MemoryBudget) -> Option:
    """Twice the micro batch when evaluating, or as much of it as fits."""
    given = recipe.evaluate.batch_size
    size = given or 2 * settings.micro_batch_size
    while True:
        tried = settings.changed(eval_batch_size=size)
        memory = budget.need(tried)
        if memory.phases.get("evaluation", 0) <= max(most_bytes, memory.phases["step"]) or size == 1 or given:
            return Option(tried, memory)
        size //= 2


def _why_recomputed(chosen: Option, tried: Sequence[Option], most_bytes: float, speed: Speed) -> str:
    """Why activations are recomputed, or not; with what the other choice would have given."""
    if not chosen.settings.can_recompute:
        return "this model cannot recompute them"
    if not chosen.settings.activation_checkpointing:
        return "not needed: it fits without"
    others = [one for one in tried if not one.settings.activation_checkpointing]
    own, plain = speed(chosen.settings), [speed(one.settings) or 0.0 for one in others if one.memory.peak <= most_bytes]
    if own and plain:
        return f"{own / max(plain):.2f} times as fast as without it, where micro batches are smaller"
    micro = min((one.settings.micro_batch_size for one in others), default=1)
    return f"without it, a micro batch of {micro} needs more than {format_bytes(int(most_bytes))}"


def note(
    recipe: Recipe, chosen: Option, rows_per_process: int, budget: MemoryBudget, own_loss: bool, reasons: Reasons
) -> None:
    """Write down what was chosen for the memory, and why."""
    train, settings, memory = recipe.train, chosen.settings, chosen.memory
    whole = settings.micro_batch_size == rows_per_process
    part = "the whole global batch fits" if whole else "the largest part of the global batch that fits"
    why = f"{part}: a step needs {format_bytes(memory.phases['step'])} of {budget.where}"
    reasons.add("train.micro_batch_size", train.micro_batch_size, settings.micro_batch_size, why)
    why = "global batch / (micro batch x processes)"
    reasons.add("gradient accumulation", None, settings.gradient_accumulation_steps, why)
    reasons.add(
        "train.activation_checkpointing",
        train.activation_checkpointing if settings.can_recompute else None,
        settings.activation_checkpointing,
        chosen.why_recomputed,
    )
    if FACTS[recipe.task].writes:
        why = "logits of all tokens never exist at once"
        if not settings.chunked_loss:
            why = whole_logits(recipe, settings.plain_logits, own_loss=own_loss)
        reasons.add("train.chunked_loss", train.chunked_loss, settings.chunked_loss, why)
    optim = next(one for one in reasons.settings if one.name == "train.optim").value
    if settings.optim != optim:
        reasons.replace("train.optim", settings.optim, f"the state of {optim} does not fit into {budget.where}")
    why = "twice the micro batch" if settings.eval_batch_size == 2 * settings.micro_batch_size else "what fits"
    reasons.add("evaluate.batch_size", recipe.evaluate.batch_size, settings.eval_batch_size, why)


def _does_not_fit(recipe: Recipe, least: Option, budget: MemoryBudget) -> DoesNotFitError:
    """What is short, and what would help."""
    settings, need = least.settings, least.memory
    least_words = [f"micro batch {settings.micro_batch_size}", settings.optim]
    if settings.micro_batch_size > 1 and recipe.train.micro_batch_size is None:
        least_words[0] += " (a smaller one needs more: gradients of earlier passes stay)"
    least_words += ["activation checkpointing"] if settings.activation_checkpointing else []
    kinds = ", ".join(f"{name} {format_bytes(size)}" for name, size in need.kinds.items() if size)
    parts = f" ({kinds})" if need.peak_phase == "step" else ""
    ways = ways_out.of_memory(recipe, settings, budget.available_bytes, budget.need)
    return DoesNotFitError(
        [
            f"{recipe.model.name}: {DOING[need.peak_phase]} needs {format_bytes(need.peak)}{parts} even with "
            f"{', '.join(least_words)}, but there are {budget.where}",
            *ways_out.in_lines(ways),
        ]
    )
