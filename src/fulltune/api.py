from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from fulltune.compare.rate_search import run_recipe
from fulltune.pipeline import Run
from fulltune.recipe.fields import Recipe
from fulltune.recipe.file import load_recipe
from fulltune.records.events import Listener
from fulltune.system.run_folder import RunResult, find_or_make_folder, hide_progress_bars
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
    """Open a recipe in its run folder, for the stage functions `prepare`, `make_plan`, `train_trial`, `score_trial` ...

    Args:
        recipe: A recipe, or its path.
        run_folder: Default: the newest unfinished run of this recipe, or a new one in `output`.
        fresh: Never resume an unfinished run.
        listener: Called with each event (`fulltune.records.events`). Default: progress is printed.
        functions: Your own functions: `metrics(predictions, references) -> {name: value}` adds metrics on the test
        rows; `preprocess(row) -> row` changes each row after reading; `compute_loss(outputs, labels,
        num_items_in_batch)` returns a loss divided by `num_items_in_batch`. See `help(fulltune.train.hooks.Hooks)`.

    Raises:
        FulltuneError: The recipe or the folder is wrong.
        TypeError: An argument is unknown.
    """
    if unknown := next((name for name in functions if name not in Hooks.__dataclass_fields__), None):
        names = ["run_folder", "fresh", "listener", *Hooks.__dataclass_fields__]
        raise TypeError(f"unknown argument '{unknown}'; {did_you_mean(unknown, names) or ', '.join(names)}")
    hide_progress_bars()
    text, name = "", "run"
    if not isinstance(recipe, Recipe):
        path = Path(recipe)
        recipe, name = load_recipe(path), path.stem
        text = path.read_text(encoding="utf-8")
    text = text or yaml.safe_dump(recipe.model_dump(mode="json", exclude_unset=True), sort_keys=False)
    folder = None if run_folder is None else Path(run_folder)
    hooks = Hooks(**functions)
    folder_path, _ = find_or_make_folder(recipe, text, recipe.name or name, folder, fresh, hooks.digest())
    if listener is None:
        from rich.console import Console

        from fulltune.cli.show.run import Display

        listener = Display(Console(stderr=True, highlight=False, emoji=False))
    return Run(recipe, folder_path, hooks, listener)


def run(recipe: Recipe | str | Path, **settings: Any) -> RunResult:
    """Run all stages of a recipe. `settings` are the other arguments of `job`.

    Returns:
        The records of every stage: `folder`, `summary`, `plan`, `outcome`, `scores` (the trained model last), `report`.

    Raises:
        FulltuneError: A stage failed. Nothing is lost, and the same call resumes.

    Example:
        >>> result = fulltune.run("banking77.yaml", metrics=my_metrics)  # doctest: +SKIP
        >>> result.scores[-1].metrics["accuracy"].value  # doctest: +SKIP
    """
    return run_recipe(job(recipe, **settings))


def load_predictor(run: str | Path, method: str | None = None) -> Predictor:
    """Load a finished model, onto a GPU if there is one; call its `predict(rows)` to answer rows.

    Args:
        run: A run folder, or a model folder that fulltune wrote.
        method: The method that trained the model. Default: the only one, or the one that the comparison recommends.

    Raises:
        SetupError: There is no such model.
    """
    from fulltune import predict

    return predict.load_predictor(Path(run), method)
