from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fulltune.errors import DoesNotFitError
from fulltune.plan import alternatives
from fulltune.plan.budget import LIBRARIES_BYTES
from fulltune.plan.savings import MEMORY_SAVINGS, why_loss_not_chunked
from fulltune.plan.settings import Reasons
from fulltune.plan.workload import Basis
from fulltune.recipe.fields import Recipe
from fulltune.recipe.tasks import FACTS
from fulltune.records.plan import MemoryNeed, MemorySettings
from fulltune.text import format_bytes

COMFORTABLE = 0.9
"""Share of the available memory that a plan tries to stay below."""
SAME_SPEED = 0.03
"""Relative difference below which two speeds count as equal."""
PHASE_NAMES = {
    "loading": "loading the model",
    "step": "a step",
    "evaluation": "an evaluation",
    "saving": "saving",
    "resuming": "resuming from a checkpoint",
}


@dataclass(frozen=True)
class SettingsOption:
    settings: MemorySettings
    memory: MemoryNeed
    why_recomputed: str = ""


def choose_settings(basis: Basis) -> SettingsOption:
    """Return the fastest settings that fit in memory, preferring those that do not change the training result.

    Raises `DoesNotFitError`, which lists alternatives, if nothing fits.
    """
    for start in _combine_automatic_savings(basis.recipe, basis.start, same_result=False):
        if option := fastest_fitting_settings(replace(basis, start=start)):
            return option
    raise _does_not_fit_error(basis)


def fastest_fitting_settings(basis: Basis) -> SettingsOption | None:
    """Return the fastest settings that fit in memory without changing the training result, or None if none fit.

    Among equally fast settings, those without checkpointing come first, then larger micro batches.
    """
    for share in (COMFORTABLE, 1.0):
        limit = share * basis.available_bytes
        options = [_choose_eval_batch(basis, settings, limit) for settings in _candidate_settings(basis, basis.start)]
        fits = [option for option in options if option.memory.peak <= limit]
        if fitting := [(option, basis.tokens_per_second(option.settings) or 0.0) for option in fits]:
            slowest = max(tokens for _, tokens in fitting) / (1 + SAME_SPEED)
            option = next(one for one, tokens in fitting if tokens >= slowest)
            return replace(option, why_recomputed=_explain_checkpointing(basis, option, options, limit))
    return None


def lowest_memory_settings(basis: Basis, same_result: bool = False) -> SettingsOption:
    """Return the settings with the lowest peak memory; `same_result` excludes those that change the training result."""
    options = [
        _choose_eval_batch(basis, settings, 0)
        for start in (
            [basis.start] if same_result else _combine_automatic_savings(basis.recipe, basis.start, same_result=False)
        )
        for settings in _candidate_settings(basis, start)
    ]
    return min(options, key=lambda o: (o.memory.peak, o.memory.phases["step"], o.settings.micro_batch_size))


def _candidate_settings(basis: Basis, start: MemorySettings) -> list[MemorySettings]:
    """Return `start` with every allowed micro batch size and every set of memory savings that does not change the
    result."""
    rows, size = basis.rows_per_process, basis.recipe.train.micro_batch_size
    sizes = [size] if size is not None else [divisor for divisor in range(rows, 0, -1) if rows % divisor == 0]
    return [
        settings.changed(micro_batch_size=size, gradient_accumulation_steps=max(1, rows // size))
        for settings in _combine_automatic_savings(basis.recipe, start, same_result=True)
        for size in sizes
    ]


def _combine_automatic_savings(recipe: Recipe, start: MemorySettings, same_result: bool) -> list[MemorySettings]:
    """Return `start` with each combination of automatic memory savings; `same_result` excludes those that change the
    training result."""
    combinations = [start]
    for saving in MEMORY_SAVINGS:
        if saving.is_automatic and saving.same_result == same_result and not saving.why_not_automatic(recipe, start):
            combinations += [one.changed(**saving.apply(recipe, one)[-1]) for one in combinations]
    return combinations


def _choose_eval_batch(basis: Basis, settings: MemorySettings, limit_bytes: float) -> SettingsOption:
    """Return the settings with an eval batch size: the recipe's, or else twice the micro batch size, halved until it
    fits."""
    fixed = basis.recipe.evaluate.batch_size
    size = fixed or 2 * settings.micro_batch_size
    while True:
        settings = settings.changed(eval_batch_size=size)
        memory = basis.memory_need(settings)
        if memory.phases.get("evaluation", 0) <= max(limit_bytes, memory.phases["step"]) or size == 1 or fixed:
            return SettingsOption(settings, memory)
        size //= 2


def _explain_checkpointing(
    basis: Basis, option: SettingsOption, options: Sequence[SettingsOption], limit_bytes: float
) -> str:
    """Return why the chosen `option` does or does not use activation checkpointing."""
    if option.settings.stream is not None:
        return "every block is recomputed in the backward pass (placement: stream)"
    if not option.settings.can_recompute:
        return "this model does not support checkpointing"
    if not option.settings.activation_checkpointing:
        return "the run fits without checkpointing"
    others = [one for one in options if not one.settings.activation_checkpointing]
    plain = [basis.tokens_per_second(one.settings) or 0.0 for one in others if one.memory.peak <= limit_bytes]
    if plain and (own := basis.tokens_per_second(option.settings)):
        return f"{own / max(plain):.2f} times as fast as without checkpointing, because micro batches are larger"
    micro = min((one.settings.micro_batch_size for one in others), default=1)
    return f"without checkpointing, a micro batch of {micro} needs more than {format_bytes(int(limit_bytes))}"


def record_choice(basis: Basis, option: SettingsOption, own_loss: bool, reasons: Reasons) -> None:
    """Add the chosen batch sizes, checkpointing, chunked loss and optimizer to `reasons`. `own_loss` is True if the
    user passed `compute_loss`."""
    recipe, train, settings = basis.recipe, basis.recipe.train, option.settings
    fits_whole_batch = settings.micro_batch_size == basis.rows_per_process
    part = "the whole global batch fits" if fits_whole_batch else "the largest part of the global batch that fits"
    why = f"{part}: a step needs {format_bytes(option.memory.phases['step'])} of {basis.where}"
    reasons.add("train.micro_batch_size", train.micro_batch_size, settings.micro_batch_size, why)
    why = "global batch / (micro batch x processes)"
    reasons.add("gradient accumulation", None, settings.gradient_accumulation_steps, why)
    reasons.add(
        "train.activation_checkpointing",
        train.activation_checkpointing if settings.can_recompute else None,
        settings.activation_checkpointing,
        option.why_recomputed,
    )
    if FACTS[recipe.task].writes:
        why_whole = why_loss_not_chunked(recipe, settings.plain_logits, own_loss=own_loss)
        why = "the logits of all tokens are never in memory at once" if settings.chunked_loss else why_whole or ""
        reasons.add("train.chunked_loss", train.chunked_loss, settings.chunked_loss, why)
    if settings.optim != basis.start.optim:
        why = f"the optimizer state of {basis.start.optim} does not fit in {basis.where}"
        reasons.replace("train.optim", settings.optim, why)
    why = (
        "twice the micro batch"
        if settings.eval_batch_size == 2 * settings.micro_batch_size
        else "the largest that fits"
    )
    reasons.add("evaluate.batch_size", recipe.evaluate.batch_size, settings.eval_batch_size, why)


def _does_not_fit_error(basis: Basis) -> DoesNotFitError:
    recipe, least = basis.recipe, lowest_memory_settings(basis)
    settings, need = least.settings, least.memory
    words = [f"micro batch {settings.micro_batch_size}", settings.optim]
    if settings.micro_batch_size > 1 and recipe.train.micro_batch_size is None:
        words[0] += " (a smaller micro batch needs more memory to accumulate gradients)"
    words += ["activation checkpointing"] if settings.activation_checkpointing else []
    kinds = ", ".join(f"{name} {format_bytes(size)}" for name, size in need.kinds.items() if size)
    parts = f" ({kinds})" if need.peak_phase == "step" else ""
    largest = ""
    if settings.stream is not None:
        limit = 1.01 * need.peak + (LIBRARIES_BYTES if settings.device == "cpu" else 0)  # so that rounding is no matter
        largest = f"; {settings.stream.unit_in_words}; {format_bytes(limit)} would do"
    return DoesNotFitError(
        [
            f"{recipe.model.name}: {PHASE_NAMES[need.peak_phase]} needs {format_bytes(need.peak)}{parts}, even with "
            f"{', '.join(words)}, but only {basis.where} is available{largest}",
            *alternatives.format_alternatives(alternatives.propose_for_memory(basis, settings)),
        ]
    )
