from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from fulltune import evaluate, methods
from fulltune.compare.rates import MetricScale
from fulltune.evaluate.scoring import Scoring
from fulltune.files import append_line, read_json_lines
from fulltune.footprint.records import Footprint
from fulltune.footprint.trace import PlannedModel
from fulltune.forgetting.generic_text import load_generic_texts
from fulltune.inference.run import MOST_TOKENS
from fulltune.inference.store import read_original_rows
from fulltune.models.shapes import Shapes
from fulltune.pipeline import Run
from fulltune.plan import fit, gpus, resolve
from fulltune.plan.settings import with_settings
from fulltune.plan.workload import Workload
from fulltune.recipe.fields import Recipe
from fulltune.recipe.methods import ComparedMethod, Method
from fulltune.records.comparison import Trial, TrialResult
from fulltune.records.data import DataSummary
from fulltune.records.events import Message
from fulltune.records.plan import Plan
from fulltune.stats import bootstrap
from fulltune.system import hardware
from fulltune.tasks import PLACE, Target
from fulltune.text import is_share
from fulltune.train.parent.spawn import Starter, start_in_new_process

FOLDER = "compare"
TEST_OUTPUTS, EVAL_OUTPUTS, GENERIC = "predictions/sealed", "predictions/eval", "predictions/generic"
TEST_LOG = f"{FOLDER}/test-openings.jsonl"
CLOCK = f"{FOLDER}/clock.jsonl"
RECORD = f"{FOLDER}/comparison.json"
BASE = "base"


@dataclass(frozen=True)
class MethodSetup:
    """A method's shapes, trace and plan, which all of its trials share."""

    method: Method
    shapes: Shapes
    traced: Footprint
    plan: Plan


@dataclass
class Context:
    """The state of a running comparison or rate search."""

    job: Run
    summary: DataSummary
    command: str
    budget_seconds: float | None = None
    start: Starter = start_in_new_process
    began: float = field(default_factory=time.monotonic)
    passed_dry_run: set[str] = field(default_factory=set)
    """Methods that passed a dry run, which their later trials skip."""
    alpha_left: float | None = None
    _setups: dict[str, MethodSetup] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return self.job.folder

    @property
    def recipe(self) -> Recipe:
        return self.job.recipe

    @cached_property
    def machine(self) -> hardware.Machine:
        return hardware.measure_machine()

    @cached_property
    def texts(self) -> tuple[list[str], str]:
        return load_generic_texts(self.recipe.preserve.probe)

    @cached_property
    def most_tokens(self) -> int:
        limit = self.method_setup(self.full.label).shapes.position_limit or MOST_TOKENS
        return min(MOST_TOKENS, limit - methods.max_virtual_tokens(self.recipe))

    @cached_property
    def resamplable_metric(self) -> bootstrap.ResamplableMetric:
        """The comparison's metric, which can be computed on resampled rows."""
        planned = self.method_setup(self.full.label).plan
        return bootstrap.find_metric(
            self.recipe.task, Target.of(self.summary), planned.metric, planned.greater_is_better
        )

    @cached_property
    def metric_scale(self) -> MetricScale:
        """The eval metric's direction and number of rows. Windows of one question count as one row."""
        num_rows = self.summary.splits["eval"].rows
        if self.summary.form.has_windows:
            num_rows = len({row[PLACE] for row in read_original_rows(self.folder / "data" / "eval")})
        if self.resamplable_metric.name in self.summary.form.of_one_class:
            num_rows = self.summary.splits["eval"].label_counts.get(str(self.summary.positive_label), 0)
        return MetricScale(self.resamplable_metric.greater_is_better, num_rows, is_share(self.resamplable_metric.name))

    @cached_property
    def scoring(self) -> Scoring:
        reference = self.method_setup(self.full.label).plan
        return evaluate.make_scoring(self.recipe, reference, self.summary, self.folder, self.job.base)

    @property
    def methods(self) -> tuple[ComparedMethod, ...]:
        return self.recipe.methods or (self.recipe.method,)

    @property
    def scores_runs(self) -> bool:
        """True in a comparison, which scores whole runs for a verdict."""
        return bool(self.recipe.methods)

    @property
    def full(self) -> Method:
        """Return the first full fine-tuning, or the only method of a rate search."""
        return next((one for one in self.methods if one.kind == "full" and one.trains_all), self.recipe.method)

    @property
    def trained_methods(self) -> list[Method]:
        """Return the methods that need training, full fine-tuning first."""
        return [self.full, *(one for one in self.methods if one is not self.full and one.kind != "base")]

    def result_path(self, name: str) -> Path:
        return self.folder / FOLDER / "trials" / f"{name}.json"

    def search_path(self, method: str) -> Path:
        return self.folder / FOLDER / "searches" / f"{method}.json"

    def saved_results(self) -> list[TrialResult]:
        return [TrialResult.load(path) for path in sorted(self.result_path("").parent.glob("*.json"))]

    @contextlib.contextmanager
    def log_duration(self, name: str) -> Iterator[None]:
        """Log a `with` block's seconds under a name, even if the block is interrupted."""
        try:
            yield
        finally:
            self.log_elapsed_time(name)

    def log_elapsed_time(self, name: str) -> None:
        """Log the seconds since the last entry under a name."""
        seconds, self.began = time.monotonic() - self.began, time.monotonic()
        append_line(self.folder / CLOCK, {"what": name, "seconds": round(seconds, 3)})

    @property
    def seconds_spent(self) -> float:
        """Total time of all commands on this folder, in seconds."""
        return sum(entry["seconds"] for entry in read_json_lines(self.folder / CLOCK))

    @property
    def seconds_left(self) -> float:
        return math.inf if self.budget_seconds is None else self.budget_seconds - self.seconds_spent

    @property
    def alpha(self) -> float:
        """Accepted probability of a wrong verdict, minus the part already spent."""
        return 1 - self.recipe.evaluate.confidence if self.alpha_left is None else self.alpha_left

    def say(self, text: str) -> None:
        self.job.listener(Message(text=text))

    def method_setup(self, label: str) -> MethodSetup:
        """Return the setup of the method with this label. The first call plans the method."""
        if label not in self._setups:
            method = next(one for one in self.trained_methods if one.label == label)
            recipe = self._recipe_of(method)
            model = PlannedModel(recipe, self.job.base, self.summary)
            traced = model.footprint(recipe, *resolve.device_and_precision(recipe, self.machine))
            self._setups[label] = MethodSetup(method, model.shapes, traced, self._fit(recipe, model.shapes, traced))
        return self._setups[label]

    def _recipe_of(self, method: Method) -> Recipe:
        # Drift is measured once, on the finished models.
        return with_settings(self.recipe.with_method(method), {"preserve.drift": False})

    def _fit(self, recipe: Recipe, shapes: Shapes, traced: Footprint) -> Plan:
        fleet = gpus.local_hardware(self.machine, hardware.disk_free_bytes(self.folder), disk_at=str(self.folder))
        workload = Workload(recipe, shapes, lambda weights_dtype: traced, self.summary, may_stream=False)
        return self.job.with_choices(fit.make_plan(workload, fleet))

    def trial_recipe(self, trial: Trial) -> Recipe:
        """Return a trial's recipe, with its learning rate, seed and share of the steps."""
        setup = self.method_setup(trial.method)
        method = setup.method.model_copy(update={"learning_rate": trial.learning_rate, "learning_rates": None})
        changes: dict[str, Any] = {"train.seed": trial.seed}
        steps = max(2, round(trial.share * setup.plan.total_steps))
        if trial.share < 1:
            changes |= {"train.max_steps": steps, "train.num_train_epochs": None}
            if (warmup := self.recipe.with_method(method).train.warmup_steps) is not None:
                ratio = warmup / max(1, setup.plan.total_steps)
                changes |= {"train.warmup_steps": None, "train.warmup_ratio": ratio}
        if trial.searches:
            changes |= {"train.early_stopping_patience": None, "train.save_steps": None}
            changes |= {"train.eval_strategy": "steps", "train.eval_steps": steps}
        return with_settings(self._recipe_of(method), changes)

    def trial_plan(self, trial: Trial, recipe: Recipe) -> Plan:
        """Plan the memory, time and settings of a trial."""
        setup = self.method_setup(trial.method)
        planned = self._fit(recipe, setup.shapes, setup.traced)
        return planned.model_copy(update={"trial": trial.name, "model_name": trial.name})


def settings_of(method: ComparedMethod) -> dict[str, Any]:
    return dict(method.model_dump(mode="json", exclude={"kind", "name", "learning_rate", "learning_rates"}))
