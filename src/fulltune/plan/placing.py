"""Where weights, gradients and optimizer state lie when the recipe leaves it open.

One process holds everything. Several hold everything each (ddp) where that fits, because it sends least; else they
share it out (fsdp2). Both compute the same numbers, so moments in 8 bits come only after them, and ZeRO never by
itself: it computes in other types, and has to be installed. (Plans for other hardware may: `survey`.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from fulltune.errors import DoesNotFitError
from fulltune.models.shapes import Shapes
from fulltune.plan import choose, resolve, ways_out
from fulltune.plan.dotted import PLACEMENT
from fulltune.plan.gpus import Fleet
from fulltune.plan.workload import Workload, basis_of
from fulltune.recipe.fields import Recipe, with_placement
from fulltune.recipe.training import SHARED_OUT
from fulltune.system.hardware import Machine
from fulltune.text import format_bytes

Whole = Literal["ddp", "fsdp2"]


@dataclass(frozen=True)
class Least:
    """A placement, and the least that it needs."""

    peak: int
    """Of the settings that compute the same numbers."""
    other_peak: int
    """With the levers that change numbers."""
    available: int


def settle(workload: Workload, fleet: Fleet, own_loss: bool = False) -> tuple[Recipe, str]:
    """The recipe with its placement, and why it has this one; a placement that is given stays, without a reason.

    Raises:
        RecipeError: When settings contradict each other or the machine.
    """
    recipe = workload.recipe
    resolve.refuse_fsdp2_beside_gpus(recipe, fleet.machine)
    if recipe.train.placement != "auto" or recipe.train.engine_settings is not None:
        return recipe, ""
    if recipe.train.num_processes == 1:
        return with_placement(recipe, "single"), "one process"
    ddp = _tried(workload, fleet, "ddp", own_loss)
    against = obstacle(recipe, workload.shapes, fleet.machine)
    fsdp2 = None if against or ddp.peak <= ddp.available else _tried(workload, fleet, "fsdp2", own_loss)
    placement, why = decided(ddp, fsdp2, against)
    return with_placement(recipe, placement), why


def decided(ddp: Least, fsdp2: Least | None, against: str = "") -> tuple[Whole, str]:
    """DDP or FSDP2 by the memory that each needs, and why; FSDP2 is None where `against` says why it cannot be
    taken."""
    if ddp.peak <= ddp.available:
        return "ddp", "it fits in each process"
    short = f"ddp needs {format_bytes(ddp.peak)} in each process, {format_bytes(ddp.available)} are free"
    if fsdp2 is None:
        return "ddp", f"{short}; fsdp2 is not possible: {against}"
    if fsdp2.peak <= fsdp2.available:
        return "fsdp2", short
    both = f"{short}, fsdp2 needs {format_bytes(fsdp2.peak)}"
    if ddp.other_peak <= ddp.available:
        return "ddp", f"{both}; it fits with other numbers"
    return ("fsdp2" if fsdp2.peak < ddp.other_peak else "ddp"), both


def _tried(workload: Workload, fleet: Fleet, placement: Whole, own_loss: bool) -> Least:
    recipe = with_placement(workload.recipe, placement)
    basis = basis_of(replace(workload, recipe=recipe), fleet, own_loss=own_loss)
    limits = basis.budget.for_rows(workload.summary.rows_per_epoch)
    exact, other = (
        choose.smallest(recipe, basis.start, basis.rows_per_process, limits, same_numbers=same).memory.peak
        for same in (True, False)
    )
    return Least(exact, other, limits.available_bytes)


def obstacle(recipe: Recipe, shapes: Shapes, machine: Machine) -> str:
    """Why FSDP2 is not taken without asking; empty when it may be."""
    train = recipe.train
    if train.device == "cpu" and machine.gpus:
        return "it would take the GPUs"
    if train.optim not in (None, *SHARED_OUT):
        return f"{train.optim} needs whole tensors"
    if train.use_liger_kernel:
        return "Liger's kernels were never tried with it"
    if shapes.num_trained is not None:
        return "its memory is planned for full fine-tuning alone"
    return "" if shapes.units is not None else "this model has no repeated blocks"


@contextlib.contextmanager
def explaining(workload: Workload, fleet: Fleet, own_loss: bool, why: str) -> Iterator[None]:
    """Give a refusal what both placements need where one was chosen (`why` is not empty), and FSDP2 as a way out of a
    given DDP.

    Raises:
        DoesNotFitError: The refusal.
    """
    try:
        yield
    except DoesNotFitError as error:
        raise DoesNotFitError(_explained(error.problems, workload, fleet, own_loss, why)) from None


def _explained(problems: Sequence[str], workload: Workload, fleet: Fleet, own_loss: bool, why: str) -> list[str]:
    first, *ways = problems
    recipe = workload.recipe
    if why and recipe.train.num_processes > 1:
        first += f" ({PLACEMENT}: {why})"
    if recipe.train.placement != "ddp" or obstacle(recipe, workload.shapes, fleet.machine):
        return [first, *ways]
    left_open = recipe.model_copy(update={"train": recipe.train.model_copy(update={"placement": "auto"})})
    ddp, fsdp2 = (_tried(replace(workload, recipe=left_open), fleet, one, own_loss) for one in get_args(Whole))
    if fsdp2.peak <= fsdp2.available:
        way = ways_out.way({PLACEMENT: "fsdp2"}, ddp.peak - fsdp2.peak, True, "more is sent between the processes")
        ways = [*ways_out.in_lines([way]), *ways]
    return [first, *ways]
