"""From a recipe to what a Lightning `Trainer` takes, by the stages of a run: data, plan, model."""

from __future__ import annotations

import contextlib
import fcntl
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import torch
import transformers
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn

from fulltune import pipeline
from fulltune.errors import RecipeError, SetupError
from fulltune.inference import selective_head
from fulltune.inference.run import by_length, model_batch
from fulltune.inference.store import Rows
from fulltune.lightning import settings
from fulltune.lightning.available import Callback, based, imported
from fulltune.lightning.data import FineTuningData
from fulltune.lightning.guards import DivergenceGuard, MovedGuard, StepGuard
from fulltune.lightning.module import PREFIX, FineTuningModule
from fulltune.models.checkpoint_head import Head
from fulltune.recipe.fields import Recipe
from fulltune.recipe.file import load_recipe
from fulltune.records.data import DataSummary
from fulltune.records.events import Event, Listener, PhaseBegan
from fulltune.records.plan import Plan
from fulltune.run_context import Run
from fulltune.system import run_folder as folders
from fulltune.tasks import ReadingTask, Target
from fulltune.tasks.settings import class_weights
from fulltune.train.loop.sampler import GlobalBatchSampler
from fulltune.train.loop.trainer import collated
from fulltune.train.optim import zero
from fulltune.train.worker import loading, scaling, weights
from fulltune.train.worker.checks import stop_generation_at, trained_ends

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FineTuning:
    """A recipe, ready for a Lightning `Trainer`."""

    recipe: Recipe
    folder: Path
    """The run folder: prepared rows and plan."""
    summary: DataSummary
    plan: Plan
    module: FineTuningModule
    data: FineTuningData
    untrained_loss: float | None
    """Of guessing; None: the model has learned something, and the head is not new."""

    def trainer_arguments(self) -> dict[str, Any]:
        """Arguments of `lightning.Trainer` that follow from the plan: devices, type, batches, steps, evaluations."""
        return settings.trainer_arguments(self.recipe, self.plan, str(self.folder / "lightning"))

    def guards(self) -> list[Callback]:
        """Fresh ones, for one `Trainer`: of steps, of a loss that diverges, of a training in which nothing moved."""
        steps = StepGuard(finite_only=not self.recipe.train.skip_suspect_steps)
        rate = max(self.plan.learning_rate, self.plan.head_learning_rate or 0.0)
        readings = DivergenceGuard(steps, self.plan.logging_steps, rate, self.untrained_loss)
        return [steps, readings, MovedGuard(steps, weights.own_file(self.folder, "lightning-initial-"))]

    def monitor(self) -> dict[str, str]:
        """Arguments of `EarlyStopping` and `ModelCheckpoint`: the eval metric that chooses, and its direction."""
        mode = "max" if self.plan.greater_is_better else "min"
        return {"monitor": PREFIX + self.plan.metric, "mode": mode}

    def save(self, folder: str | Path, checkpoint: str | Path | None = None) -> None:
        """Write a plain Hugging Face folder, which `from_pretrained` and `fulltune predict` read; by the first process.

        Args:
            folder: An older model there is replaced when the new one is whole.
            checkpoint: Of Lightning, whose weights are put into the module first, such as
                `trainer.checkpoint_callback.best_model_path`; None: as they are.

        Raises:
            SetupError: When the strategy has shared the weights out, or the checkpoint is not this model's.
        """
        module = self.module
        if checkpoint is not None:
            load_weights(module, Path(checkpoint))
        elif module.shared_out_by and not zero.holds(module.model):
            raise SetupError(
                f"save: {module.shared_out_by} has shared the weights out, so that no process has all of them; in a "
                "new process, give save(folder, checkpoint=...) one with whole weights (docs/lightning.md)"
            )
        is_first = cast(Any, rank_zero_only).rank == 0  # Lightning sets it
        if not is_first and not zero.holds(module.model):
            return
        path, scaled = Path(folder), module.scaled
        path.parent.mkdir(parents=True, exist_ok=True)
        if scaled is not None:
            scaled.fold(module.model)
        try:
            weights.save_model(module.applied, module.tokenizer, path, self.recipe, self.summary, is_first)
        finally:
            if scaled is not None:
                scaled.unfold(module.model)


def load_weights(module: FineTuningModule, checkpoint: Path) -> None:
    """Put the weights of a checkpoint of Lightning's into the module.

    Raises:
        SetupError: When there is none, or it is of another model.
    """
    try:
        found = torch.load(checkpoint, map_location="cpu", weights_only=True)
        module.load_state_dict(found["state_dict"])
    except (OSError, KeyError, TypeError, RuntimeError, UnpicklingError) as error:
        reason = " ".join(str(error).split())[:300]
        raise SetupError(
            f"{checkpoint}: expected a file that Lightning wrote of this model, with whole weights ({reason})"
        ) from None


def prepare(
    recipe: str | Path | Recipe,
    overrides: Sequence[str] = (),
    *,
    run_folder: str | Path | None = None,
    listener: Listener | None = None,
    package: str | None = None,
) -> FineTuning:
    """Prepare the rows, plan, and load the model, as a run does before it trains.

    Each process of a training calls it; the first one does the work, and the others find it done.

    Args:
        recipe: A file, or a recipe.
        overrides: As of `--set`, such as `train.num_processes=2`.
        run_folder: For rows and plan; default: a folder of this recipe's in `output`, the same at each call.
        listener: Called with each event; default: what begins is logged.
        package: Whose `Trainer` will train, `lightning` or `pytorch_lightning`; default: the one that is imported.

    Raises:
        FulltuneError: One of its kinds: what is wrong with the recipe, the data or the memory.
    """
    folders.hide_progress_bars()
    overrides = [overrides] if isinstance(overrides, str) else overrides
    text, name = "", "recipe"
    if isinstance(recipe, Recipe):
        if overrides:
            raise RecipeError("prepare: overrides are for a recipe's file; change the recipe instead")
    else:
        path = Path(recipe)
        recipe, name = load_recipe(path, overrides), path.stem
        text = path.read_text(encoding="utf-8")
    if problems := settings.problems_of(recipe):
        raise RecipeError(problems)
    for line in settings.warnings_of(recipe):
        rank_zero_warn(line)
    usual = Path(recipe.output) / f"{recipe.name or name}-lightning-{recipe.fingerprint()[:8]}"
    folder = usual if run_folder is None else Path(run_folder)
    with folders.writing(folder), _one_after_the_other(folder):
        folders.find_or_make(recipe, text, name, folder, fresh=False)
        job = Run(recipe, folder, listener=listener or _say)
        with folders.locked(folder), folders.not_left_when_refused(folder):
            summary = pipeline.prepare(job)
            plan = pipeline.make_plan(job, summary)
    return _loaded(job, plan, summary, package or imported())


def _say(event: Event) -> None:
    if isinstance(event, PhaseBegan):
        rank_zero_info(f"fulltune: {event.name}")


@contextlib.contextmanager
def _one_after_the_other(folder: Path) -> Iterator[None]:
    """Of several processes on one machine, or with one file system that knows locks: the others wait."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _loaded(job: Run, plan: Plan, summary: DataSummary, package: str) -> FineTuning:
    """The model as training starts with it, and around it what Lightning takes."""
    recipe, task, target = job.recipe, job.task, Target.of(summary)
    heads: list[Head] = []
    probed = []
    data = job.folder / "data"

    def untouched(model: Any, tokenizer: Any) -> None:
        head = heads[0] if heads else None
        if plan.head_init == "random" or head is None or head.order is not None:
            return
        device, rows = torch.device(plan.device), loading.task_rows(data, tokenizer)
        probed.append(loading.start_from_probe(model, head, recipe, plan, summary, tokenizer, job.folder, device, rows))

    transformers.set_seed(plan.seed)
    applied, tokenizer = loading.load_for_training(recipe, task, target, on_head=heads.append, before_method=untouched)
    model = applied.model
    loading.make_faster(model, recipe, plan, summary)
    if plan.activation_checkpointing:
        model.activation_checkpointing_enable()
    rows, eval_rows = loading.rows_with_mixed(data, summary, tokenizer), loading.task_rows(data, tokenizer)[1]
    pad, kept = tokenizer.pad_token_id, bool(heads) and heads[0].order is not None
    two = model_batch(model, task, [rows[i] for i in by_length(rows)[-2:]], pad)
    scaled = None
    if summary.scale is not None:
        gives_numbers = kept or any(one.head is not None for one in probed)
        scaled, about = scaling.scaled_head(model, summary.scale, two, plan.precision, gives_numbers=gives_numbers)
        _log.info("head: %s", about)
    if summary.form.writes_answers:
        stop_generation_at(model, trained_ends(Rows(data / "train"), tokenizer)[1])
    head = selective_head.verified(model, task, two)[0]
    module = based(FineTuningModule, "LightningModule", package)(
        applied, recipe, plan, summary, task, tokenizer, head, scaled
    )
    untrained = (
        cast(ReadingTask, task).chance_loss(summary, class_weights(recipe, summary)) if heads and not kept else None
    )
    loaders = based(FineTuningData, "LightningDataModule", package)(
        rows,
        eval_rows,
        plan,
        partial(_sampler, rows["length"], plan, summary),
        lambda given: collated(given, module.learning.collate, task.count_items, head),
        lambda given: model_batch(model, task, given, pad),
    )
    return FineTuning(recipe, job.folder, summary, plan, module, loaders, untrained)


def _sampler(lengths: Any, plan: Plan, summary: DataSummary, num_processes: int) -> GlobalBatchSampler:
    """The order of the rows, as in a run."""
    return GlobalBatchSampler(
        lengths,
        plan.global_batch_size,
        plan.micro_batch_size,
        plan.seed,
        plan.group_by_length,
        num_processes,
        mixed=loading.mixed_ranges(summary),
    )
