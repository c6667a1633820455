"""What is to be planned, and what its settings are judged by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from fulltune import methods
from fulltune.errors import RecipeError
from fulltune.footprint.records import Footprint
from fulltune.models.shapes import Shapes
from fulltune.plan import budget, defaults, resolve, time
from fulltune.plan.gpus import Fleet
from fulltune.plan.levers import whole_logits
from fulltune.plan.settings import Reasons, given, with_settings
from fulltune.recipe.fields import Recipe
from fulltune.records.data import DataSummary
from fulltune.records.plan import MemoryNeed, MemorySettings
from fulltune.system import sharing
from fulltune.text import counted


@dataclass(frozen=True)
class Workload:
    """What is to be planned."""

    recipe: Recipe
    shapes: Shapes
    footprint: Callable[[str], Footprint]
    """The model's memory for a type of weights; each type is traced once, in a few seconds."""
    summary: DataSummary
    spread: tuple[str, ...] = ()
    """Settings that follow from the hardware: see `spread_over`."""


@dataclass(frozen=True)
class Basis:
    """What the settings of a workload on a fleet are judged by: what they need, what there is, how fast they are."""

    recipe: Recipe
    shapes: Shapes
    footprint: Footprint
    fleet: Fleet
    train_rows: int
    """Of an epoch."""
    global_batch_size: int
    steps: resolve.Steps
    head_init: Literal["probe", "random"] | None
    """Where a new head starts; None: it is kept, or the task has none of its own."""
    group_by_length: bool
    start: MemorySettings
    """What is settled, with no lever taken: a micro batch of one row, nothing recomputed."""
    shared: sharing.Sharing | None
    """What processes share out; None: each holds everything."""
    available_bytes: int
    """What one process may take on its device."""
    where: str
    """The same in words, such as `12 GiB of GPU memory`."""
    work: time.Work

    @property
    def rows_per_process(self) -> int:
        """Share of the global batch."""
        return max(1, self.global_batch_size // self.start.num_processes)

    def need(self, settings: MemorySettings) -> MemoryNeed:
        """The memory of one process; a micro batch is never larger than the rows that there are."""
        full = settings.changed(micro_batch_size=min(settings.micro_batch_size, max(1, self.train_rows)))
        return budget.need(self.shapes, self.footprint, full, self.shared)

    def seconds(self, settings: MemorySettings) -> dict[str, float]:
        """Of each part of an optimizer step; empty where the speed of the hardware is not known."""
        return time.step_seconds(self.fleet, self.shapes, self.work, self.global_batch_size, settings, self.shared)

    def speed(self, settings: MemorySettings) -> float | None:
        """Tokens a second over all devices; None where it is not known."""
        seconds = self.seconds(settings)
        return self.global_batch_size * self.work.tokens_per_row / time.together(seconds) if seconds else None


def basis_of(workload: Workload, fleet: Fleet, reasons: Reasons | None = None, own_loss: bool = False) -> Basis:
    """Settle what does not depend on memory, with reasons; `own_loss`: the user's loss needs whole logits.

    Raises:
        RecipeError: When settings contradict each other or the machine.
    """
    recipe, shapes, summary = workload.recipe, workload.shapes, workload.summary
    train, reasons = recipe.train, reasons or Reasons()
    if train.activation_checkpointing and not shapes.can_recompute:
        raise RecipeError(
            f"train.activation_checkpointing: true, but {shapes.model_type} cannot recompute its activations; remove it"
        )
    device = resolve.device(recipe, fleet.machine, reasons)
    precision = resolve.precision(recipe, fleet.machine, device, reasons)
    resolve.refuse_kernels(recipe, fleet.machine, device, precision)
    optim, rounding = resolve.optimizer(recipe, reasons)
    global_batch = resolve.global_batch(recipe, summary, reasons)
    steps = resolve.steps(recipe, summary, global_batch, reasons)
    grouped, why = defaults.group_by_length(summary.length_explained)
    grouped = reasons.add("train.group_by_length", train.group_by_length, grouped, why)
    footprint = workload.footprint(recipe.model.weights_dtype)
    head_init = resolve.head_init(recipe, shapes, reasons)
    plain_logits = shapes.plain_logits and not own_loss
    start = MemorySettings(
        micro_batch_size=1,
        device=device,
        longest_tokens=summary.max_length,
        precision=precision,
        fast_bf16=device == "cpu" or resolve.oldest_gpu(recipe, fleet.machine).bf16,
        weights_dtype=recipe.model.weights_dtype,
        optim=optim,
        bf16_rounding=rounding,
        activation_checkpointing=bool(train.activation_checkpointing),
        can_recompute=shapes.can_recompute,
        plain_logits=plain_logits,
        chunked_loss=takes_pieces(recipe, plain_logits),
        torch_compile=bool(train.torch_compile),
        generic_first=recipe.generic_first,
        num_processes=train.num_processes,
        num_machines=train.num_machines,
        num_all_parameters=shapes.num_all_parameters,
        num_trainable=shapes.num_trainable,
        num_saves=time.occasions(steps.total, steps.between_evaluations, steps.between_saves),
        # scikit-learn works in the host's memory.
        probe_bytes=time.probe_cost(summary, shapes.hidden_size)[1] if (head_init, device) == ("probe", "cpu") else 0,
    )
    available_bytes, where = budget.available(recipe, fleet.machine, device)
    return Basis(
        recipe=recipe,
        shapes=shapes,
        footprint=footprint,
        fleet=fleet,
        train_rows=summary.rows_per_epoch,
        global_batch_size=global_batch,
        steps=steps,
        head_init=head_init,
        group_by_length=grouped,
        start=start,
        shared=sharing.of(recipe),
        available_bytes=available_bytes,
        where=where,
        work=time.work_of(
            summary,
            footprint,
            grouped,
            methods.virtual_tokens(recipe),
            time.backward_of(recipe.method.kind, shapes),
        ),
    )


def takes_pieces(recipe: Recipe, plain_logits: bool) -> bool:
    """Whether the loss is computed in pieces: for tasks that write, unless something needs whole logits."""
    given = recipe.train.chunked_loss
    return not whole_logits(recipe, plain_logits) if given is None else given


SPREAD = (NUM_PROCESSES, NUM_MACHINES) = ("train.num_processes", "train.num_machines")


def spread_over(recipe: Recipe, fleet: Fleet) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe with a process for each device of hardware that is not here, unless it says how many, and with its
    machines; and the settings that it has more now.

    Raises:
        RecipeError: When the recipe's batches cannot be shared by so many, or it names other machines.
    """
    if fleet.here:
        return recipe, ()
    train, devices = recipe.train, fleet.num_devices
    if train.device == ("cuda" if fleet.gpu_model is None else "cpu"):
        names = "a GPU" if fleet.gpu_model else "no GPU"
        raise RecipeError(f"train.device: '{train.device}' but --for names {names}; add --set train.device=auto")
    _refuse_other_machines(recipe, fleet)
    more = {NUM_MACHINES: fleet.num_machines} if fleet.num_machines > 1 else {}
    more |= {NUM_PROCESSES: devices} if devices > 1 else {}
    more = {name: number for name, number in more.items() if given(recipe, name) is None}
    each = (train.micro_batch_size or 1) * devices
    if NUM_PROCESSES in more and train.global_batch_size and train.global_batch_size % each:
        micro = f" x micro batch {train.micro_batch_size}" if (train.micro_batch_size or 1) > 1 else ""
        raise RecipeError(
            f"train.global_batch_size: {train.global_batch_size} cannot be shared by {devices} devices{micro}; set a "
            f"multiple of {each}, or train.num_processes"
        )
    return with_settings(recipe, more), tuple(more)


def _refuse_other_machines(recipe: Recipe, fleet: Fleet) -> None:
    """Refuse a recipe whose machines are not those of the hardware that is named."""
    asked, named = given(recipe, NUM_MACHINES), counted(fleet.num_machines, "machine")
    if asked not in (None, fleet.num_machines):
        raise RecipeError(
            f"{NUM_MACHINES}: {asked}, but --for names {named}; write "
            f'--for "{replace(fleet.asked, machines=asked)}", or add '
            f"--set {NUM_MACHINES}={fleet.num_machines} --set {NUM_PROCESSES}={fleet.num_devices}"
        )
    if fleet.num_machines > 1 and (recipe.methods or recipe.is_searched):
        several = "a comparison" if recipe.methods else "a search"
        one = replace(fleet.asked, machines=1)
        raise RecipeError(f'--for: {several} runs on one machine, but {named} are named; write --for "{one}"')
    processes = recipe.train.num_processes
    if given(recipe, NUM_PROCESSES) is not None and processes % fleet.num_machines:
        raise RecipeError(
            f"{NUM_PROCESSES}: {processes} cannot be spread evenly over the {named} of --for; leave it out (a process "
            f"for each device: {fleet.num_devices}), or set a multiple of {fleet.num_machines}"
        )
