"""Choose what costs memory: of the settings that fit, those that leave the result as it is, and the fastest of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fulltune.errors import DoesNotFitError
from fulltune.plan import ways_out
from fulltune.plan.levers import LEVERS, whole_logits
from fulltune.plan.settings import Reasons
from fulltune.plan.workload import Basis
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


@dataclass(frozen=True)
class Option:
    """Settings that could be taken, and what they need."""

    settings: MemorySettings
    memory: MemoryNeed
    why_recomputed: str = ""
    """Why activations are recomputed, or are not."""


def choose(basis: Basis) -> Option:
    """The fastest settings that fit; levers that change the result, as 8-bit moments do, only where nothing else fits.

    What the recipe gives stays.

    Raises:
        DoesNotFitError: When nothing fits, with the nearest ways out.
    """
    for numbers in _with_levers(basis.recipe, basis.start, same_result=False):
        if found := fastest(replace(basis, start=numbers)):
            return found
    raise _does_not_fit(basis)


def fastest(basis: Basis) -> Option | None:
    """The fastest settings with the same numbers that fit, with some memory to spare if possible; None: none fit.

    Of settings that are as fast, those that recompute nothing come first, and larger micro batches before smaller ones.
    """
    for share in (COMFORTABLE, 1.0):
        most = share * basis.available_bytes
        tried = [_with_eval_batch(basis, settings, most) for settings in _candidates(basis, basis.start)]
        if fitting := [(one, basis.speed(one.settings) or 0.0) for one in tried if one.memory.peak <= most]:
            least = max(tokens for _, tokens in fitting) / (1 + SAME_SPEED)
            found = next(one for one, tokens in fitting if tokens >= least)
            return replace(found, why_recomputed=_why_recomputed(basis, found, tried, most))
    return None


def smallest(basis: Basis, same_numbers: bool = False) -> Option:
    """The settings that need least: what to say when nothing fits; `same_numbers`: without levers that change the
    result.

    With accumulation the gradients of earlier passes stay beside the next pass and its copy of the weights in 16 bits,
    so the smallest micro batch does not always need least.
    """
    options = [
        _with_eval_batch(basis, settings, 0)
        for numbers in ([basis.start] if same_numbers else _with_levers(basis.recipe, basis.start, same_result=False))
        for settings in _candidates(basis, numbers)
    ]
    return min(options, key=lambda one: (one.memory.peak, one.memory.phases["step"], one.settings.micro_batch_size))


def _candidates(basis: Basis, start: MemorySettings) -> list[MemorySettings]:
    """Every micro batch that the recipe allows, without and with the levers that leave the result as it is."""
    rows, given = basis.rows_per_process, basis.recipe.train.micro_batch_size
    sizes = [given] if given is not None else [size for size in range(rows, 0, -1) if rows % size == 0]
    return [
        settings.changed(micro_batch_size=size, gradient_accumulation_steps=max(1, rows // size))
        for settings in _with_levers(basis.recipe, start, same_result=True)
        for size in sizes
    ]


def _with_levers(recipe: Recipe, start: MemorySettings, same_result: bool) -> list[MemorySettings]:
    """The settings, and again with each lever that may be taken without asking."""
    found = [start]
    for lever in LEVERS:
        if lever.searched and lever.same_result == same_result and not lever.refusal(recipe, start):
            found += [one.changed(**lever.apply(recipe, one)[-1]) for one in found]
    return found


def _with_eval_batch(basis: Basis, settings: MemorySettings, most_bytes: float) -> Option:
    """Twice the micro batch when evaluating, or as much of it as fits."""
    given = basis.recipe.evaluate.batch_size
    size = given or 2 * settings.micro_batch_size
    while True:
        tried = settings.changed(eval_batch_size=size)
        memory = basis.need(tried)
        if memory.phases.get("evaluation", 0) <= max(most_bytes, memory.phases["step"]) or size == 1 or given:
            return Option(tried, memory)
        size //= 2


def _why_recomputed(basis: Basis, chosen: Option, tried: Sequence[Option], most_bytes: float) -> str:
    """Why activations are recomputed, or not; with what the other choice would have given."""
    if not chosen.settings.can_recompute:
        return "this model cannot recompute them"
    if not chosen.settings.activation_checkpointing:
        return "not needed: it fits without"
    others = [one for one in tried if not one.settings.activation_checkpointing]
    plain = [basis.speed(one.settings) or 0.0 for one in others if one.memory.peak <= most_bytes]
    if plain and (own := basis.speed(chosen.settings)):
        return f"{own / max(plain):.2f} times as fast as without it, where micro batches are smaller"
    micro = min((one.settings.micro_batch_size for one in others), default=1)
    return f"without it, a micro batch of {micro} needs more than {format_bytes(int(most_bytes))}"


def note(basis: Basis, chosen: Option, own_loss: bool, reasons: Reasons) -> None:
    """Write down what was chosen for the memory, and why."""
    recipe, train, settings = basis.recipe, basis.recipe.train, chosen.settings
    whole = settings.micro_batch_size == basis.rows_per_process
    part = "the whole global batch fits" if whole else "the largest part of the global batch that fits"
    why = f"{part}: a step needs {format_bytes(chosen.memory.phases['step'])} of {basis.where}"
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
    if settings.optim != basis.start.optim:
        why = f"the state of {basis.start.optim} does not fit into {basis.where}"
        reasons.replace("train.optim", settings.optim, why)
    why = "twice the micro batch" if settings.eval_batch_size == 2 * settings.micro_batch_size else "what fits"
    reasons.add("evaluate.batch_size", recipe.evaluate.batch_size, settings.eval_batch_size, why)


def _does_not_fit(basis: Basis) -> DoesNotFitError:
    """What is short, and what would help."""
    recipe, least = basis.recipe, smallest(basis)
    settings, need = least.settings, least.memory
    least_words = [f"micro batch {settings.micro_batch_size}", settings.optim]
    if settings.micro_batch_size > 1 and recipe.train.micro_batch_size is None:
        least_words[0] += " (a smaller one needs more: gradients of earlier passes stay)"
    least_words += ["activation checkpointing"] if settings.activation_checkpointing else []
    kinds = ", ".join(f"{name} {format_bytes(size)}" for name, size in need.kinds.items() if size)
    parts = f" ({kinds})" if need.peak_phase == "step" else ""
    return DoesNotFitError(
        [
            f"{recipe.model.name}: {DOING[need.peak_phase]} needs {format_bytes(need.peak)}{parts} even with "
            f"{', '.join(least_words)}, but there are {basis.where}",
            *ways_out.in_lines(ways_out.of_memory(basis, settings)),
        ]
    )
