from __future__ import annotations

import shlex
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fulltune.errors import RecipeError
from fulltune.footprint import records
from fulltune.plan import gpus, time, workload
from fulltune.plan.gpus import Fleet
from fulltune.plan.resolve import device_and_precision
from fulltune.plan.settings import with_settings
from fulltune.plan.survey import survey_placements
from fulltune.plan.time import DevicePrice
from fulltune.recipe.fields import Recipe
from fulltune.recipe.file import load_recipe
from fulltune.recipe.rules import form_of
from fulltune.recipe.tasks import FACTS
from fulltune.records.data import DataSummary, SplitSummary
from fulltune.records.plan import Plan, Survey
from fulltune.system import hardware
from fulltune.text import to_yaml

if TYPE_CHECKING:
    from fulltune.models.base import Base

SURVEY = "survey.json"
USUAL_CHOICES = 4


FleetAndPrice = tuple[Fleet | None, DevicePrice | None]


def parse_plan_options(hardware: str | None, rows: int | None, tokens: int | None, price: str | None) -> FleetAndPrice:
    """Parse the options into hardware and price, or raise a `RecipeError`."""
    problems: list[str] = []

    def parse_or_note_problem(parse: Callable[[str], Any], text: str | None) -> Any:
        """Return the parsed text, or None without a text or after an error, which goes into `problems`."""
        try:
            return None if text is None else parse(text)
        except RecipeError as error:
            problems.extend(error.problems)
            return None

    fleet = parse_or_note_problem(gpus.parse_hardware, hardware)
    hourly = parse_or_note_problem(time.parse_price, price)
    for name, value, what in (("rows", rows, "train rows"), ("tokens", tokens, "tokens per row")):
        if value is not None and value < 1:
            problems.append(f"--{name}: found {value}, but the number of {what} must be at least 1")
    if (rows is None) != (tokens is None):
        present, other = ("rows", "tokens") if tokens is None else ("tokens", "rows")
        problems.append(f"--{present}: a plan without data also needs --{other}")
    if problems:
        raise RecipeError(problems)
    return fleet, hourly


def raise_if_measure_conflicts(hardware: str | None, rows: int | None, tokens: int | None) -> None:
    """Raise a `RecipeError` if --measure is combined with other hardware or rows."""
    named = (("for", hardware), ("rows", rows), ("tokens", tokens))
    others = " and ".join(f"--{name}" for name, value in named if value is not None)
    if others:
        raise RecipeError(f"--measure: runs real steps on this machine with the recipe's rows; remove {others}")


def plan_without_data(
    target: Path, overrides: list[str], rows: int | None, tokens: int | None, hardware: str | None, price: str | None
) -> tuple[Survey, Plan | None]:
    """Make a survey and a plan (None if nothing fits) from the recipe, the model's config, and two numbers."""
    checked = parse_plan_options(hardware, rows, tokens, price)
    assert rows is not None, "given"
    assert tokens is not None, "given with --rows"
    if target.is_dir():
        raise RecipeError(f"{target}: is a run folder with known rows; to plan without data, give the recipe")
    recipe = load_recipe(target, overrides)
    survey, plan = _make_survey_and_plan(
        recipe, _make_assumed_summary(recipe, rows, tokens), checked, None, Path(recipe.output), config_only=True
    )
    return _add_command(survey, target, overrides), plan


def plan_with_data(
    target: Path,
    overrides: list[str],
    recipe: Recipe,
    folder: Path,
    fleet_and_price: FleetAndPrice,
    local_plan: Plan | None,
) -> tuple[Survey, Plan | None]:
    """Make a survey and a plan (None if nothing fits) from prepared rows, and save the survey."""
    survey, planned = _make_survey_and_plan(recipe, DataSummary.of_run(folder), fleet_and_price, local_plan, folder)
    survey = survey if target.is_dir() else _add_command(survey, target, overrides)
    survey.save(folder / "plan" / SURVEY)
    return survey, planned


def _add_command(survey: Survey, target: Path, overrides: list[str]) -> Survey:
    """Return the survey with the command that runs the plan."""
    settings = [*overrides, *(f"{name}={to_yaml(value)}" for name, value in survey.settings.items())]
    run = shlex.join(["fulltune", "run", str(target), *(word for one in settings for word in ("--set", one))])
    on_each = " --machine-rank RANK --rendezvous HOST" if survey.num_machines > 1 else ""
    return survey.model_copy(update={"command": run + on_each})


def _make_survey_and_plan(
    recipe: Recipe,
    data: DataSummary,
    fleet_and_price: FleetAndPrice,
    local_plan: Plan | None,
    folder: Path,
    config_only: bool = False,
) -> tuple[Survey, Plan | None]:
    """Survey the placements and plan the best one. `config_only` reads only the model's config."""
    from fulltune.footprint.trace import PlannedModel
    from fulltune.models.base import Base
    from fulltune.models.shapes import Shapes

    fleet, price = fleet_and_price
    fleet = fleet or gpus.local_hardware(
        hardware.measure_machine(), hardware.disk_free_bytes(folder), recipe.train.num_machines, str(folder)
    )
    spread, followed = workload.set_one_process_per_device(recipe, fleet)
    base = cache(lambda: Base.from_block(recipe.model, recipe.task, recipe.data.chat_template, not config_only))

    def make_workload(changed: Recipe) -> workload.Workload:
        if config_only:
            _raise_if_recipe_or_tokens_invalid(changed, base(), data, fleet.here)
        model = PlannedModel(changed, base(), data)

        def traced(weights_dtype: str) -> records.Footprint:
            same = with_settings(changed, {"model.weights_dtype": weights_dtype})
            return model.footprint(same, *device_and_precision(same, fleet.machine))

        return workload.Workload(changed, model.shapes, traced, data, followed)

    def workload_with_method(kind: str) -> workload.Workload | None:
        changed = _recipe_with_method(spread, kind, base())
        return None if changed is None else make_workload(changed)

    if fleet.here and local_plan is not None:  # made from these files
        plans = folder / "plan"
        shapes, footprint = Shapes.load(plans / records.SHAPES), records.Footprint.load(plans / records.FOOTPRINT)
        load = workload.Workload(spread, shapes, lambda weights_dtype: footprint, data, followed)
    else:
        load = make_workload(spread)
    return survey_placements(load, fleet, price, local_plan, workload_with_method)


def _recipe_with_method(recipe: Recipe, kind: str, base: Base) -> Recipe | None:
    """Return the recipe with another method, or None if that method is impossible."""
    from fulltune.pipeline import check_recipe

    try:
        of_several: Any = {"methods": True, "compare": {"budget"}}
        changed = Recipe.model_validate({**recipe.model_dump(exclude_unset=True, exclude=of_several), "method": kind})
        check_recipe(changed, base, runs_here=False)
    except (ValueError, RecipeError):  # from the recipe's own checks, or those against the model
        return None
    return changed


def _raise_if_recipe_or_tokens_invalid(recipe: Recipe, base: Base, summary: DataSummary, runs_here: bool) -> None:
    from fulltune.models.shapes import position_limit
    from fulltune.pipeline import check_recipe

    check_recipe(recipe, base, runs_here)
    limit = position_limit(base.config)
    if limit is not None and FACTS[recipe.task].reads == "text" and summary.max_length > limit:
        raise RecipeError(
            f"--tokens: {summary.max_length}, but {recipe.model.name} reads at most {limit} tokens; give fewer, or set "
            f"data.max_length: {limit}"
        )


def _make_assumed_summary(recipe: Recipe, rows: int, tokens: int) -> DataSummary:
    """Return a summary for `rows` assumed rows of `tokens` tokens each."""
    from fulltune.tasks import Target, task_named
    from fulltune.tasks.padding import texts_per_row

    data, form = recipe.data, form_of(recipe)
    length = min(tokens, data.max_length or tokens)
    parts = {"eval": 0 if data.eval else data.eval_fraction, "test": 0 if data.test else data.test_fraction}
    counts = {name: min(2000, max(1, round(rows * part) or rows // 10)) for name, part in parts.items()}
    percentiles = {"p50": length, "p95": length, "max": length}
    of_task = {"multiple-choice": USUAL_CHOICES, "reranking": data.candidates, "embedding": 1 + data.hard_negatives}
    choices = of_task.get(recipe.task, 0)
    labels = ("a", "b") if FACTS[recipe.task].has_classes else ()
    target = Target(form.name if form else FACTS[recipe.task].types[0], {}, labels, num_choices=choices)
    num_texts = texts_per_row(task_named(recipe.task), target)

    def make_split(num_rows: int) -> SplitSummary:
        return SplitSummary(
            rows=num_rows,
            tokens=num_rows * length * num_texts,
            trained_tokens=num_rows * length,
            trained_p95=length,
            truncated_rows=num_rows if tokens > length else 0,
            dropped_rows=0,
            length_percentiles=percentiles,
        )

    splits: Any = {name: make_split(number) for name, number in {"train": rows, **counts}.items()}
    return DataSummary(
        task=recipe.task,
        **target.in_summary(),
        max_length=length,
        max_length_reason="from --tokens",
        limit=length,
        splits=splits,
        sources={},
        fingerprint="",
    )
