"""Bytes of a run on disk."""

from __future__ import annotations

from fulltune import zero
from fulltune.errors import DoesNotFitError
from fulltune.plan import memory, ways_out
from fulltune.plan.memory import Levers
from fulltune.recipe import Recipe
from fulltune.records import DiskNeed
from fulltune.units import in_words

DEEPSPEED_BYTES = 20
"""A parameter in DeepSpeed's checkpoints: weights and moments (12), its copy of the model (4), the Trainer's (4)."""


def need(recipe: Recipe, num_parameters: int, levers: Levers) -> DiskNeed:
    """Checkpoints and models at their fullest: the kept checkpoints, the best one and the one being written; the
    finished model, and the weights before step 1, which are kept until it is saved."""
    state = memory.state_bytes(num_parameters, levers.weights_dtype, levers.optim, levers.bf16_rounding)
    one = num_parameters * DEEPSPEED_BYTES if zero.wanted(recipe) else state.weights + state.optimizer
    return DiskNeed(one_checkpoint=one, num_checkpoints=recipe.train.save_total_limit + 2, model=2 * state.weights)


def refuse_what_cannot_fit(recipe: Recipe, needed: DiskNeed, free_bytes: int) -> None:
    """Before step 1, not when the third checkpoint is half written.

    Raises:
        DoesNotFitError: Naming both sizes.
    """
    if needed.total > free_bytes:
        kept = recipe.train.save_total_limit
        raise DoesNotFitError(
            [
                f"{recipe.output}: checkpoints and model need {in_words(needed.total)} on disk "
                f"({needed.num_checkpoints} x {in_words(needed.one_checkpoint)} and {in_words(needed.model)}), but "
                f"{in_words(free_bytes)} are free",
                *ways_out.in_lines(ways_out.of_disk(needed, free_bytes, kept, recipe.output)),
            ]
        )
