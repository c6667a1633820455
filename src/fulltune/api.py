"""From Python: a run with the user's own functions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from fulltune.compare.rate_search import run_recipe
from fulltune.pipeline import Run
from fulltune.recipe.fields import Recipe
from fulltune.recipe.file import load_recipe
from fulltune.records.events import Listener
from fulltune.system.run_folder import Reached, find_or_make, hide_progress_bars
from fulltune.text import did_you_mean
from fulltune.train.hooks import Hooks

if TYPE_CHECKING:
    from fulltune.predict import Predictor


def job(
    recipe: Recipe | str | Path,
    *,
    run_folder: str | Path | None = None,
    fresh: bool = False,
    listener: Listener | None = None,
    **functions: Any,
) -> Run:
    """A recipe in its run folder, for the stage functions `prepare`, `make_plan`, `train_trial`, `score_trial` ...

    Args:
        recipe: A recipe, or the path of one.
        run_folder: Work in this folder; default: the newest unfinished run of this recipe, or a new one in `output`.
        fresh: Never continue an unfinished run.
        listener: Called with each event (`fulltune.records.events`) as it happens; default: progress is printed.
        functions: Your own: `metrics(predictions, references) -> {name: value}`, further metrics of the test rows;
            `preprocess(row) -> row`, applied to each row after reading; `compute_loss(outputs, labels,
            num_items_in_batch)`, divided by `num_items_in_batch`, with which training runs in this process. What each
            is given: `help(fulltune.train.hooks.Hooks)`.

    Raises:
        FulltuneError: When the recipe or the folder is wrong.
        TypeError: When an argument is unknown.
    """
    if unknown := next((name for name in functions if name not in Hooks.__dataclass_fields__), None):
        known = ["run_folder", "fresh", "listener", *Hooks.__dataclass_fields__]
        raise TypeError(f"there is no argument '{unknown}'; {did_you_mean(unknown, known) or ', '.join(known)}")
    hide_progress_bars()
    text, name = "", "run"
    if not isinstance(recipe, Recipe):
        path = Path(recipe)
        recipe, name = load_recipe(path), path.stem
        text = path.read_text(encoding="utf-8")
    text = text or yaml.safe_dump(recipe.model_dump(mode="json", exclude_unset=True), sort_keys=False)
    folder = None if run_folder is None else Path(run_folder)
    hooks = Hooks(**functions)
    found, _ = find_or_make(recipe, text, recipe.name or name, folder, fresh, hooks.digest())
    return Run(recipe, found, hooks, listener or _printing())


def run(recipe: Recipe | str | Path, **settings: Any) -> Reached:
    """Do all stages; `settings` are what `job` takes beside a recipe.

    Returns:
        The records of every stage: `folder`, `summary`, `plan`, `outcome`, `scores` (the trained model last), `report`.

    Raises:
        FulltuneError: One of its kinds; nothing that was done is lost, and the same call continues.

    Example:
        >>> result = fulltune.run("banking77.yaml", metrics=my_metrics)  # doctest: +SKIP
        >>> result.scores[-1].metrics["accuracy"].value  # doctest: +SKIP
    """
    return run_recipe(job(recipe, **settings))


def load_predictor(run: str | Path, method: str | None = None) -> Predictor:
    """Load a finished model, to answer with its `predict(rows)`.

    Args:
        run: A run folder, or the folder of a model that fulltune wrote.
        method: Which of a run's models; default: the only one, or the one that the comparison recommends.

    Raises:
        SetupError: When there is no such model.
    """
    from fulltune import predict

    return predict.load(Path(run), method)


def _printing() -> Listener:
    from rich.console import Console

    from fulltune.cli.show.run import Display

    return Display(Console(stderr=True, highlight=False, emoji=False))
