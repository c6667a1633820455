"""Choose what costs memory: of the settings that fit, those that leave the result as it is, and the fastest of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from fulltune.errors import DoesNotFitError, RecipeError
from fulltune.models.shapes import Shapes
from fulltune.plan import ways_out
from fulltune.plan.budget import Room
from fulltune.plan.memory import Levers
from fulltune.plan.reasons import Ledger
from fulltune.recipe.fields import Recipe
from fulltune.recipe.tasks import FACTS
from fulltune.records.data import DataSummary
from fulltune.records.plan import MemoryNeed
from fulltune.system import deepspeed
from fulltune.text import in_words

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
T = TypeVar("T")


@dataclass(frozen=True)
class Chosen:
    """Levers and what they need."""

    levers: Levers
    memory: MemoryNeed
    why_recomputed: str = ""
    """Why activations are recomputed, or are not."""


def possible(recipe: Recipe, shapes: Shapes) -> Recipe:
    """The recipe; for a model that cannot recompute its activations, with that switched off.

    Raises:
        RecipeError: When the recipe asks for it.
    """
    if shapes.can_recompute:
        return recipe
    if recipe.train.activation_checkpointing:
        raise RecipeError(
            f"train.activation_checkpointing: true, but {shapes.model_type} cannot recompute its activations; remove it"
        )
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"activation_checkpointing": False})})


def chunked_loss(recipe: Recipe, shapes: Shapes, own_loss: bool = False) -> bool:
    """On for language models, unless the recipe says otherwise or something needs whole logits."""
    if recipe.train.chunked_loss is not None:
        return recipe.train.chunked_loss
    return FACTS[recipe.task].writes and not needs_whole_logits(recipe, shapes, own_loss)


def needs_whole_logits(recipe: Recipe, shapes: Shapes, own_loss: bool = False) -> str:
    """What keeps a loss from being computed in pieces; empty: nothing does."""
    if own_loss:
        return "your own loss (compute_loss) needs the logits as a whole"
    if deepspeed.wanted(recipe):
        return "DeepSpeed shares out the head, which a loss in pieces needs whole"
    if recipe.train.extra.get("torch_compile"):
        return "torch.compile leaves out the hooks that a loss in pieces needs"
    return "" if shapes.plain_logits else f"{shapes.model_type} scales or caps its logits after the head"


def before_choosing(
    recipe: Recipe,
    shapes: Shapes,
    summary: DataSummary,
    precision: str,
    optim: str,
    rounding: str | None,
    pieces: bool,
) -> Levers:
    """The levers with what is settled; a micro batch of one row, nothing recomputed."""
    return Levers(
        micro_batch_size=1,
        longest_tokens=summary.max_length,
        precision=precision,
        weights_dtype=recipe.model.weights_dtype,
        optim=optim,
        bf16_rounding=rounding,
        can_recompute=shapes.can_recompute,
        chunked_loss=pieces,
        optimizer_in_backward=recipe.train.optimizer_in_backward,
        max_grad_norm=recipe.train.max_grad_norm,
        num_processes=recipe.train.num_processes,
        num_held=shapes.num_held,
        num_trained=shapes.num_trained,
    )


def choose(
    recipe: Recipe, start: Levers, rows_per_process: int, room: Room, speed: Callable[[Levers], float | None]
) -> Chosen:
    """The fastest settings that fit; 8-bit moments, which are other arithmetic, only where nothing fits without them.

    Of settings that are as fast, those that recompute nothing come first, and larger micro batches before smaller ones.
    What the recipe gives stays.

    Args:
        recipe: What is given is not changed.
        start: Everything else about the levers.
        rows_per_process: Share of the global batch of one process; micro batches divide it.
        room: What one process may take, and what settings need of it.
        speed: Tokens a second of settings; None where the hardware's speed is not known.

    Raises:
        DoesNotFitError: When nothing fits, with the nearest ways out.
    """
    for optim in _optimizers(recipe, start):
        for share in (COMFORTABLE, 1.0):
            most = share * room.available_bytes
            tried = [
                _with_eval_batch(recipe, levers, most, room)
                for levers in _candidates(recipe, replace(start, optim=optim), rows_per_process)
            ]
            if fitting := [one for one in tried if one.memory.peak <= most]:
                speeds = [speed(one.levers) for one in fitting]
                found = fastest(fitting, speeds)
                return replace(found, why_recomputed=_why_recomputed(found, tried, most, speed))
    raise _does_not_fit(recipe, smallest(recipe, start, rows_per_process, room), room)


def fastest(options: Sequence[T], speeds: Sequence[float | None]) -> T:
    """The first that is as fast as the fastest one; the first of all where no speed is known."""
    least = max(speed or 0.0 for speed in speeds) / (1 + SAME_SPEED)
    return next(one for one, speed in zip(options, speeds, strict=True) if (speed or 0.0) >= least)


def _why_recomputed(
    chosen: Chosen, tried: Sequence[Chosen], most_bytes: float, speed: Callable[[Levers], float | None]
) -> str:
    """Why activations are recomputed, or not; with what the other choice would have given."""
    if not chosen.levers.can_recompute:
        return "this model cannot recompute them"
    if not chosen.levers.activation_checkpointing:
        return "not needed: it fits without"
    others = [one for one in tried if not one.levers.activation_checkpointing]
    speeds = {one.levers.micro_batch_size: speed(one.levers) or 0.0 for one in others if one.memory.peak <= most_bytes}
    own = speed(chosen.levers)
    if not speeds or not own:
        micro = min((one.levers.micro_batch_size for one in others), default=1)
        return f"without, a micro batch of {micro} needs more than {in_words(int(most_bytes))}"
    micro = max(speeds, key=lambda size: (speeds[size], size))
    return f"{own / speeds[micro]:.2f} times as fast as without, where {micro} at a time fit{'s' * (micro == 1)}"


def smallest(recipe: Recipe, start: Levers, rows_per_process: int, room: Room) -> Chosen:
    """The settings that need least: what to say when nothing fits.

    With accumulation the gradients of earlier passes stay beside the next pass and its copy of the weights in 16 bits,
    so the smallest micro batch does not always need least.
    """
    found = [
        _with_eval_batch(recipe, levers, 0, room)
        for optim in _optimizers(recipe, start)
        for levers in _candidates(recipe, replace(start, optim=optim), rows_per_process)
    ]
    return min(found, key=lambda one: (one.memory.peak, one.memory.phases["step"], one.levers.micro_batch_size))


def _optimizers(recipe: Recipe, start: Levers) -> tuple[str, ...]:
    given = recipe.train.optim is not None or recipe.train.extra.get("deepspeed") is not None
    return (start.optim,) if given or start.bf16_rounding == "nearest" else (start.optim, "adamw_8bit")


def _candidates(recipe: Recipe, start: Levers, rows_per_process: int) -> Iterator[Levers]:
    train = recipe.train
    divisors = [size for size in range(rows_per_process, 0, -1) if rows_per_process % size == 0]
    if start.optimizer_in_backward:  # it cannot accumulate
        divisors = divisors[:1]
    for recomputing in (False, True) if train.activation_checkpointing is None else (train.activation_checkpointing,):
        for micro in divisors if train.micro_batch_size is None else (train.micro_batch_size,):
            yield replace(
                start,
                micro_batch_size=micro,
                accumulation=rows_per_process // micro,
                activation_checkpointing=recomputing,
            )


def _with_eval_batch(recipe: Recipe, levers: Levers, most_bytes: float, room: Room) -> Chosen:
    """Twice the micro batch when evaluating, or as much of it as fits."""
    given = recipe.evaluate.batch_size
    size = given or 2 * levers.micro_batch_size
    while True:
        tried = replace(levers, eval_batch_size=size)
        memory = room.need(tried)
        if memory.phases.get("evaluation", 0) <= max(most_bytes, memory.phases["step"]) or size == 1 or given:
            return Chosen(tried, memory)
        size //= 2


def settle(
    recipe: Recipe, chosen: Chosen, rows_per_process: int, room: Room, plain: str, whole: str, ledger: Ledger
) -> None:
    """Write down what was chosen, and why.

    Args:
        recipe: As given.
        chosen: The levers.
        rows_per_process: Share of the global batch of one process.
        room: What one process may take.
        plain: The optimizer that would have been taken where everything fits.
        whole: Why the loss needs whole logits.
        ledger: Where it is written.
    """
    train, levers, memory = recipe.train, chosen.levers, chosen.memory
    peak = f"{in_words(memory.phases['step'])} of {room.where}"
    if levers.micro_batch_size == rows_per_process:
        why = f"the whole global batch fits: a step needs {peak}"
    else:
        why = f"the largest part of the global batch that fits: a step needs {peak}"
    ledger.settle("train.micro_batch_size", train.micro_batch_size, levers.micro_batch_size, why)
    ledger.settle("gradient accumulation", None, levers.accumulation, "global batch / (micro batch x processes)")
    ledger.settle(
        "train.activation_checkpointing",
        train.activation_checkpointing if levers.can_recompute else None,
        levers.activation_checkpointing,
        chosen.why_recomputed,
    )
    if FACTS[recipe.task].writes:
        pieces = "logits of all tokens never exist at once"
        pieces = pieces if levers.chunked_loss else whole
        ledger.settle("train.chunked_loss", train.chunked_loss, levers.chunked_loss, pieces)
    if levers.optim != plain:
        ledger.replace("train.optim", levers.optim, f"the state of {plain} does not fit into {room.where}")
    why = "twice the micro batch" if levers.eval_batch_size == 2 * levers.micro_batch_size else "what fits"
    ledger.settle("evaluate.batch_size", recipe.evaluate.batch_size, levers.eval_batch_size, why)


def _micro_batch_words(least: Chosen, room: Room) -> str:
    """The micro batch; where a smaller one would need more, also why."""
    levers = least.levers
    words = f"micro batch {levers.micro_batch_size}"
    rows = levers.micro_batch_size * levers.accumulation
    one = room.need(replace(levers, micro_batch_size=1, accumulation=rows)).peak
    if levers.micro_batch_size == 1 or one <= least.memory.peak:
        return words
    return (
        f"{words} (a smaller one needs more, {in_words(one)} with 1: gradients of earlier passes stay beside the next)"
    )


def _does_not_fit(recipe: Recipe, least: Chosen, room: Room) -> DoesNotFitError:
    """What is short, and what would help."""
    levers, need = least.levers, least.memory
    least_words = [_micro_batch_words(least, room), levers.optim]
    least_words += ["activation checkpointing"] if levers.activation_checkpointing else []
    kinds = ", ".join(f"{name} {in_words(size)}" for name, size in need.kinds.items() if size)
    parts = f" ({kinds})" if need.peak_phase == "step" else ""
    ways = ways_out.of_memory(recipe, levers, room.available_bytes, room.need)
    return DoesNotFitError(
        [
            f"{recipe.model.name}: {DOING[need.peak_phase]} needs {in_words(need.peak)}{parts} even with "
            f"{', '.join(least_words)}, but there are {room.where}",
            *ways_out.in_lines(ways),
        ]
    )
