from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from fulltune import methods
from fulltune.errors import RecipeError
from fulltune.footprint.records import Footprint
from fulltune.models.shapes import Shapes
from fulltune.plan import budget, defaults, resolve, stream, time
from fulltune.plan.gpus import Fleet
from fulltune.plan.savings import why_loss_not_chunked
from fulltune.plan.settings import Reasons, recipe_value, with_settings
from fulltune.recipe.fields import Recipe
from fulltune.recipe.tasks import FACTS
from fulltune.records.data import DataSummary
from fulltune.records.plan import MemoryNeed, MemorySettings
from fulltune.system import parallel_layout
from fulltune.system.parallel_layout import ParallelLayout
from fulltune.text import counted


@dataclass(frozen=True)
class Workload:
    """The recipe, model and data to plan for."""

    recipe: Recipe
    shapes: Shapes
    footprint: Callable[[str], Footprint]
    """Returns the model's footprint for a weight type. Tracing takes seconds."""
    summary: DataSummary
    spread: tuple[str, ...] = ()
    """Settings that `set_one_process_per_device` added."""
    may_stream: bool = True
    """False if several trials share the disk, each of which would keep a whole training state there."""


@dataclass(frozen=True)
class Basis:
    """A workload, its hardware and all choices that do not depend on memory."""

    recipe: Recipe
    shapes: Shapes
    footprint: Footprint
    fleet: Fleet
    train_rows: int
    global_batch_size: int
    steps: resolve.Steps
    head_init: Literal["probe", "random"] | None
    group_by_length: bool
    packing: bool
    start: MemorySettings
    """Starting point of the search: a micro batch of one row, and no memory savings."""
    layout: ParallelLayout | None
    """How the training state is sharded, or None if unsharded."""
    available_bytes: int
    where: str
    work: time.Work

    @property
    def rows_per_process(self) -> int:
        return max(1, self.global_batch_size // self.start.num_processes)

    def memory_need(self, settings: MemorySettings) -> MemoryNeed:
        """Compute the memory of one process. Its micro batch never exceeds the number of train rows."""
        full = settings.changed(micro_batch_size=min(settings.micro_batch_size, max(1, self.train_rows)))
        return budget.memory_need(self.shapes, self.footprint, full, self.layout)

    def step_seconds(self, settings: MemorySettings) -> dict[str, float]:
        reads_twice = FACTS[self.recipe.task].contrasts and settings.gradient_accumulation_steps > 1
        work = replace(self.work, backward=self.work.backward + reads_twice)
        return time.step_seconds(self.fleet, self.shapes, work, self.global_batch_size, settings, self.layout)

    def tokens_per_second(self, settings: MemorySettings) -> float | None:
        """Estimate tokens per second over all devices, or return None if the speed is unknown."""
        seconds = self.step_seconds(settings)
        return self.global_batch_size * self.work.tokens_per_row / time.step_duration(seconds) if seconds else None


def make_basis(workload: Workload, fleet: Fleet, reasons: Reasons | None = None, own_loss: bool = False) -> Basis:
    """Choose all settings that do not depend on memory, and add them to `reasons`; `own_loss` is set for a user's
    `compute_loss`."""
    recipe, shapes, summary = workload.recipe, workload.shapes, workload.summary
    train, reasons = recipe.train, reasons or Reasons()
    if train.activation_checkpointing and not shapes.can_recompute:
        raise RecipeError(
            f"train.activation_checkpointing: true, but {shapes.model_type} models do not support it; remove it"
        )
    device = resolve.choose_device(recipe, fleet.machine, reasons)
    precision = resolve.choose_precision(recipe, fleet.machine, device, reasons)
    resolve.check_kernels(recipe, fleet.machine, device, precision)
    optim, rounding = resolve.choose_optimizer(recipe, reasons)
    global_batch = resolve.choose_global_batch_size(recipe, summary, reasons)
    steps = resolve.choose_steps(recipe, summary, global_batch, reasons)
    packing = resolve.choose_packing(recipe, summary, reasons, own_loss)
    grouped, why = defaults.should_group_by_length(summary.length_explained, FACTS[recipe.task].contrasts)
    grouped, why = (False, "packing leaves little padding") if packing else (grouped, why)
    grouped = reasons.add("train.group_by_length", train.group_by_length, grouped, why)
    footprint = workload.footprint(recipe.model.weights_dtype)
    head_init = resolve.choose_head_init(recipe, shapes, reasons)
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
        has_experts=shapes.has_experts,
        chunked_loss=is_loss_chunked(recipe, plain_logits),
        torch_compile=bool(train.torch_compile),
        generic_first=recipe.preserve.budget is not None and recipe.preserve.replay is not None,
        num_processes=train.num_processes,
        num_machines=train.num_machines,
        num_all_parameters=shapes.num_all_parameters,
        num_trainable=shapes.num_trainable,
        saves_all=recipe.method.kind == "full" and not recipe.method.trains_all,
        num_saves=time.count_interval_steps(steps.total, steps.between_evaluations, steps.between_saves),
        # scikit-learn works in the host's memory.
        probe_bytes=time.linear_probe_cost(summary, shapes.hidden_size)[1]
        if (head_init, device) == ("probe", "cpu")
        else 0,
        stream=stream.start_of(recipe, shapes, fleet, optim),
    )
    available_bytes, where = budget.usable_memory(recipe, fleet.machine, device)
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
        packing=packing,
        start=start,
        layout=parallel_layout.layout_of(recipe),
        available_bytes=available_bytes,
        where=where,
        work=time.work_per_row(
            summary,
            footprint,
            grouped or packing,
            methods.max_virtual_tokens(recipe),
            time.backward_cost(recipe.method.kind, shapes),
        ),
    )


def is_loss_chunked(recipe: Recipe, plain_logits: bool) -> bool:
    """Return the recipe's `train.chunked_loss` or, if unset, whether the loss can be chunked. `plain_logits` means
    unscaled logits."""
    wanted = recipe.train.chunked_loss
    return why_loss_not_chunked(recipe, plain_logits) is None if wanted is None else wanted


SPREAD = (NUM_PROCESSES, NUM_MACHINES) = ("train.num_processes", "train.num_machines")


def set_one_process_per_device(recipe: Recipe, fleet: Fleet) -> tuple[Recipe, tuple[str, ...]]:
    """Return the recipe with one process for each `--for` device, and the names of the settings added.

    Raises `RecipeError` if the batch cannot be divided among the devices, or if the recipe contradicts `--for`.
    """
    if fleet.here:
        return recipe, ()
    train, devices = recipe.train, fleet.num_devices
    if train.device == ("cuda" if fleet.gpu_model is None else "cpu"):
        names = "a GPU" if fleet.gpu_model else "no GPU"
        raise RecipeError(f"train.device: '{train.device}', but --for names {names}; add --set train.device=auto")
    _raise_if_fleet_contradicts_recipe(recipe, fleet)
    added = {NUM_MACHINES: fleet.num_machines} if fleet.num_machines > 1 else {}
    added |= {NUM_PROCESSES: devices} if devices > 1 else {}
    added = {name: number for name, number in added.items() if recipe_value(recipe, name) is None}
    each = (train.micro_batch_size or 1) * devices
    if NUM_PROCESSES in added and train.global_batch_size and train.global_batch_size % each:
        micro = f" x micro batch {train.micro_batch_size}" if (train.micro_batch_size or 1) > 1 else ""
        raise RecipeError(
            f"train.global_batch_size: {train.global_batch_size} cannot be divided among {devices} devices{micro}; set "
            f"a multiple of {each}, or train.num_processes"
        )
    return with_settings(recipe, added), tuple(added)


def _raise_if_fleet_contradicts_recipe(recipe: Recipe, fleet: Fleet) -> None:
    wanted, named = recipe_value(recipe, NUM_MACHINES), counted(fleet.num_machines, "machine")
    if wanted not in (None, fleet.num_machines):
        raise RecipeError(
            f"{NUM_MACHINES}: {wanted}, but --for names {named}; write "
            f'--for "{replace(fleet.named, machines=wanted)}", or add '
            f"--set {NUM_MACHINES}={fleet.num_machines} --set {NUM_PROCESSES}={fleet.num_devices}"
        )
    if fleet.num_machines > 1 and (recipe.methods or recipe.is_searched):
        several = "a comparison" if recipe.methods else "a search"
        alone = replace(fleet.named, machines=1)
        raise RecipeError(f'--for: {several} runs on one machine, but --for names {named}; write --for "{alone}"')
    processes = recipe.train.num_processes
    if recipe_value(recipe, NUM_PROCESSES) is not None and processes % fleet.num_machines:
        raise RecipeError(
            f"{NUM_PROCESSES}: {processes} cannot be spread evenly over the {named} of --for; remove it (each of the "
            f"{fleet.num_devices} devices then gets one process), or set a multiple of {fleet.num_machines}"
        )
