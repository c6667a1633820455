"""From Python: a run with the user's own functions. Layer 4, like the command line."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fulltune.pipeline import Listener, Reached, Run
from fulltune.pipeline import run as run_pipeline
from fulltune.recipe import Recipe
from fulltune.recipe_file import load_recipe
from fulltune.run_folder import find_or_make, hide_progress_bars
from fulltune.train import Hooks


def job(
    recipe: Recipe | str | Path,
    *,
    run_folder: str | Path | None = None,
    fresh: bool = False,
    metrics: Callable[[Any, Any], Mapping[str, float]] | None = None,
    preprocess: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    compute_loss: Callable[..., Any] | None = None,
    class_weights: Mapping[str, float] | Sequence[float] | str | None = None,
    listener: Listener | None = None,
) -> Run:
    """A recipe in its run folder, for the stage functions `prepare`, `make_plan`, `train_trial`, `score_trial` ...

    Args:
        recipe: A recipe, or the path of one.
        run_folder: Work in this folder; left out, the newest unfinished run of this recipe or a new one in `output`.
        fresh: Never continue an unfinished run.
        metrics: `metrics(predictions, references) -> {name: value}`; see `fulltune.train.Hooks`.
        preprocess: Applied to each row after reading.
        compute_loss: `compute_loss(outputs, labels, num_items_in_batch)`, divided by `num_items_in_batch`.
        class_weights: By name, in the order of the labels, or `"balanced"`.
        listener: Called with each progress event; left out, progress is printed.

    Raises:
        FulltuneError: When the recipe or the folder is wrong.
    """
    hide_progress_bars()
    text = ""
    if not isinstance(recipe, Recipe):
        text = Path(recipe).read_text(encoding="utf-8") if Path(recipe).is_file() else ""
        recipe, name = load_recipe(recipe), recipe if isinstance(recipe, str) else str(recipe)
        stem = Path(name).stem
    else:
        stem = "run"
    folder = None if run_folder is None else Path(run_folder)
    hooks = Hooks(metrics, preprocess, compute_loss, class_weights)
    found, _ = find_or_make(recipe, text or _as_yaml(recipe), recipe.name or stem, folder, fresh, hooks.marks())
    return Run(recipe, found, hooks, listener or _printing())


def run(recipe: Recipe | str | Path, **options: Any) -> Reached:
    """Do the whole line; options as for `job`.

    Returns:
        The records of every stage: `folder`, `summary`, `plan`, `outcome`, `scores` (the trained model last), `report`.

    Raises:
        FulltuneError: One of its kinds; nothing that was done is lost, and the same call continues.

    Example:
        >>> result = fulltune.run("banking77.yaml", class_weights="balanced")  # doctest: +SKIP
        >>> result.scores[-1].metrics["accuracy"].value  # doctest: +SKIP
    """
    return run_pipeline(job(recipe, **options))


def _as_yaml(recipe: Recipe) -> str:
    import yaml

    return yaml.safe_dump(recipe.model_dump(mode="json", exclude_unset=True), sort_keys=False)


def _printing() -> Listener:
    from rich.console import Console

    from fulltune.display import Display

    return Display(Console(stderr=True, highlight=False))
