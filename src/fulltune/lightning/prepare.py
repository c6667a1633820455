from __future__ import annotations

import fcntl
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers

from fulltune import methods, pipeline
from fulltune.errors import RecipeError, SetupError
from fulltune.inference import selective_head
from fulltune.inference.run import model_batch, positions_by_length
from fulltune.inference.store import Rows
from fulltune.lightning.module import PREFIX, FineTuningData, FineTuningModule
from fulltune.models.experts import expert_modules
from fulltune.models.packing import find_packing_leak, rows_for_check
from fulltune.pipeline import Run
from fulltune.recipe.fields import Recipe
from fulltune.recipe.file import load_recipe
from fulltune.recipe.rules import of_answers
from fulltune.recipe.tasks import FACTS
from fulltune.recipe.training import PER_TENSOR_OPTIMIZERS
from fulltune.records.data import DataSummary
from fulltune.records.plan import Plan
from fulltune.system import run_folder as folders
from fulltune.tasks import Target, task_named
from fulltune.train.optim import zero
from fulltune.train.worker import loading, weights
from fulltune.train.worker.checks import count_last_tokens, stop_generation_at
from fulltune.train.worker.loading import Objective

_PACKAGES = ("lightning", "pytorch_lightning")
PRECISION = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}
_NO_EFFECT = {
    "methods": "give one method of kind full, or compare methods with 'fulltune compare'",
    "preserve": "only 'fulltune run' uses generic text",
    "train.extra": "these arguments are for transformers' Trainer; pass an engine's settings to Lightning's strategy",
    "train.max_rollbacks": "a guard that stops training raises an exception; resume with Trainer.fit(ckpt_path=...)",
    "train.hang_timeout": "set the strategy's timeout, such as DDPStrategy(timeout=...)",
    "train.notice": "pass ModelCheckpoint to the Trainer",
    "train.save_steps": "pass ModelCheckpoint(every_n_train_steps=...) to the Trainer",
    "train.save_total_limit": "pass ModelCheckpoint(save_top_k=...) to the Trainer",
    "train.load_best_model_at_end": "pass ModelCheckpoint's best_model_path to job.save(folder, checkpoint=...)",
    "train.early_stopping_patience": "pass EarlyStopping(**job.monitor(), patience=...) to the Trainer",
    "train.early_stopping_threshold": "pass EarlyStopping(**job.monitor(), min_delta=...) to the Trainer",
    "train.report_to": "pass loggers to the Trainer",
    "train.loss": "override training_step of job.module",
    "evaluate.metrics": "log them in a callback",
    "evaluate.greater_is_better": "choose by a metric of the task",
    "evaluate.choose_rows": "only 'fulltune run' generates answers during training",
}


def choose_package(package: str | None) -> str:
    """Return `package`, else the imported or installed one. Raise `SetupError` if neither is installed."""
    names = sorted(_PACKAGES, key=lambda name: name not in sys.modules)
    name = package or next(filter(find_spec, names), _PACKAGES[0])
    if find_spec(name) is None:
        raise SetupError(f"fulltune.lightning: needs the package {name}; pip install 'fulltune[lightning]'")
    return name


@cache
def with_lightning_base(cls: type, base_name: str, package: str) -> Any:
    return type(cls.__name__, (cls, getattr(import_module(package), base_name)), {"__doc__": cls.__doc__})


def unsupported_settings(recipe: Recipe) -> list[str]:
    """Return an error message for each setting that Lightning does not support."""
    changed = recipe.model_dump(exclude_defaults=True)
    changed |= {f"evaluate.{name}": value for name, value in changed.get("evaluate", {}).items()}
    changed |= {f"train.{name}": value for name, value in changed.get("train", {}).items()}
    problems = [
        f"{name}: has no effect under Lightning; {instead}" for name, instead in _NO_EFFECT.items() if name in changed
    ]
    if recipe.method.kind != "full" and not recipe.methods:
        problems.append(f"method.kind: Lightning supports only full, not '{recipe.method.kind}'; use 'fulltune run'")
    if of_answers(recipe):
        problems.append("evaluate.metric: only 'fulltune run' generates answers during training; use loss")
    if FACTS[recipe.task].contrasts:
        problems.append(f"task: only 'fulltune run' compares all rows of a global batch, as {recipe.task} needs")
    if recipe.is_searched:
        problems.append("search: only 'fulltune run' can search; set a value instead")
    if recipe.is_cross_validated:
        problems.append("data.folds: Lightning trains a single fold; set data.fold as well")
    if recipe.train.optim not in (None, *PER_TENSOR_OPTIMIZERS):
        optimizers = ", ".join(PER_TENSOR_OPTIMIZERS)
        problems.append(f"train.optim: Lightning does not support '{recipe.train.optim}'; choose one of {optimizers}")
    return problems


@dataclass(frozen=True)
class FineTuning:
    """A recipe prepared for a Lightning `Trainer`."""

    folder: Path
    module: FineTuningModule
    data: FineTuningData

    def trainer_arguments(self) -> dict[str, Any]:
        """Return keyword arguments for Lightning's `Trainer` that follow the plan."""
        plan, train = self.module.plan, self.module.objective.recipe.train
        values: dict[str, Any] = {
            "accelerator": "cpu" if plan.device == "cpu" else "gpu",
            "devices": train.processes_per_machine,
            "num_nodes": train.num_machines,
            # bf16 weights compute in bf16 anyway, and "bf16-true" would also convert the labels.
            "precision": "32-true" if plan.weights_dtype == "bf16" else PRECISION[plan.precision],
            "max_steps": plan.total_steps,
            "max_epochs": -1,
            "accumulate_grad_batches": plan.gradient_accumulation_steps,
            "gradient_clip_val": train.max_grad_norm or None,
            "gradient_clip_algorithm": "norm" if train.max_grad_norm else None,
            "log_every_n_steps": plan.logging_steps,
            "num_sanity_val_steps": 1 if plan.eval_on_start else 0,
            "use_distributed_sampler": False,
            "default_root_dir": str(self.folder / "lightning"),
        }
        if not plan.eval_steps:
            return values | {"limit_val_batches": 0}
        if train.eval_strategy == "epoch" and plan.total_steps > plan.eval_steps:
            return values | {"check_val_every_n_epoch": 1}
        # This also works for a training that ends in its first epoch.
        batches = plan.eval_steps * plan.gradient_accumulation_steps
        return values | {"val_check_interval": batches, "check_val_every_n_epoch": None}

    def monitor(self) -> dict[str, str]:
        """Return the eval metric and its direction, as for `EarlyStopping` and `ModelCheckpoint`."""
        plan = self.module.plan
        return {"monitor": PREFIX + plan.metric, "mode": "max" if plan.greater_is_better else "min"}

    def save(self, folder: str | Path, checkpoint: str | Path | None = None) -> None:
        """Write a Hugging Face model folder from rank 0.

        Args:
            folder: An older model in it is replaced once the new one is complete.
            checkpoint: Lightning checkpoint to load first, such as `trainer.checkpoint_callback.best_model_path`.

        Raises:
            SetupError: The strategy has sharded the weights.
        """
        module, objective = self.module, self.module.objective
        if checkpoint is not None:
            module.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"])
        elif module.sharded_by and not zero.is_in_use(module.model):
            raise SetupError(
                f"save: {module.sharded_by} has sharded the weights, so no process has all of them; in a new "
                "process, call save(folder, checkpoint=...) with gathered weights (docs/guides/training.md)"
            )
        is_first = module.global_rank == 0
        if not is_first and not zero.is_in_use(module.model):
            return
        Path(folder).parent.mkdir(parents=True, exist_ok=True)
        applied = methods.AppliedMethod(objective.model, objective.recipe.method)
        weights.save_model(applied, module.tokenizer, Path(folder), objective.recipe, objective.summary, is_first)


def prepare(
    recipe: str | Path,
    overrides: Sequence[str] = (),
    *,
    run_folder: str | Path | None = None,
    package: str | None = None,
) -> FineTuning:
    """Prepare rows, plan and model of a recipe for a Lightning `Trainer`.

    Each process calls this; the first one does the work.

    Args:
        recipe: Path of the recipe.
        overrides: Settings as for `--set`, such as `train.num_processes=2`.
        run_folder: Default: a folder in `output`.
        package: Package of the `Trainer`. Default: the imported one.

    Raises:
        FulltuneError: The recipe or the data is wrong, or the run does not fit.
    """
    package = choose_package(package)
    folders.hide_progress_bars()
    path = Path(recipe)
    checked = load_recipe(path, [overrides] if isinstance(overrides, str) else overrides)
    if problems := unsupported_settings(checked):
        raise RecipeError(problems)
    default = Path(checked.output) / f"{checked.name or path.stem}-lightning-{checked.fingerprint()[:8]}"
    folder = Path(run_folder or default)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folders.explain_os_errors(folder), (folder.parent / f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # processes take turns, where the file system supports locks
        folders.find_or_make_folder(checked, path.read_text(encoding="utf-8"), path.stem, folder, fresh=False)
        job = Run(checked, folder)
        with folders.lock_folder(folder), folders.remove_new_run_on_error(folder):
            summary = pipeline.prepare(job)
            if summary.form.is_number:
                raise RecipeError(
                    "data.label: the labels are numbers, which only 'fulltune run' supports; use class names"
                )
            plan = pipeline.make_plan(job, summary)
    module = with_lightning_base(FineTuningModule, "LightningModule", package)(
        *_load_objective_and_rows(job, plan, summary)
    )
    return FineTuning(folder, module, with_lightning_base(FineTuningData, "LightningDataModule", package)(module))


def _load_objective_and_rows(
    job: Run, plan: Plan, summary: DataSummary
) -> tuple[Objective, transformers.PreTrainedTokenizerBase, selective_head.SelectiveHead | None, Rows, Rows]:
    """Load the model and return the arguments of `FineTuningModule`, with train and eval rows."""
    recipe, task, data = job.recipe, task_named(job.recipe.task), job.folder / "data"
    transformers.set_seed(plan.seed)
    target = Target.of(summary)
    model, tokenizer, new = loading.load_pretrained(recipe, task, target)
    objective = Objective(recipe, plan, summary, task, model, tokenizer.pad_token_id, target)
    if plan.head_init != "random" and new is not None and new.has_new_rows:
        loading.init_head_from_probe(objective, new, tokenizer, job.folder, torch.device(plan.device))
    if expert_modules(model):
        raise RecipeError("model: only 'fulltune run' trains a mixture of experts, with its router loss")
    loading.apply_method(model, recipe)
    loading.install_speedups(model, recipe, plan, summary)
    if plan.activation_checkpointing:
        model.activation_checkpointing_enable()
    if summary.packed or plan.packing:
        model.config.use_cache = False  # as the Trainer does; with a cache packed texts would attend to each other
        if leak := find_packing_leak(model, objective.collate(rows_for_check(model, joined=summary.packed))):
            raise RecipeError(f"data.packing: {leak}; set it to false")
    rows, eval_rows = loading.rows_with_mixed(data, summary, tokenizer), loading.task_rows(data, tokenizer)[1]
    two_rows = model_batch(model, task, [rows[i] for i in positions_by_length(rows)[-2:]], tokenizer.pad_token_id)
    if summary.form.writes_answers:
        stop_generation_at(model, count_last_tokens(Rows(data / "train"), tokenizer)[1])
    head = selective_head.verify_selective_head(model, task, two_rows)[0]
    return objective, tokenizer, head, rows, eval_rows
