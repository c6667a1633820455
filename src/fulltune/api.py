"""From Python: a run with the user's own functions."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec

import yaml

from fulltune import search as searching
from fulltune.pipeline import Run
from fulltune.recipe.fields import Recipe
from fulltune.recipe.file import check, load_recipe
from fulltune.records.events import Listener
from fulltune.system.run_folder import Reached, find_or_make, hide_progress_bars
from fulltune.train.hooks import Hooks

if TYPE_CHECKING:
    from fulltune.predict import Predictor

_Given = ParamSpec("_Given")


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
        run_folder: Work in this folder; default: the newest unfinished run of this recipe, or a new one in `output`.
        fresh: Never continue an unfinished run.
        metrics: `metrics(predictions, references) -> {name: value}`, further metrics of the test rows. Classifiers
            give numbers of classes, which are places in `result.summary.labels` (0/1 rows for several labels, numbers
            for regression), as arrays; language models generated and expected answers, as lists of str; taggers and
            question answering: see `fulltune.train.Hooks`. For the interval it is called again for each of
            `evaluate.bootstrap_samples` (1,000) resamples of the rows; give a slow one fewer, at least 100.
        preprocess: `preprocess(row) -> row`, applied to each row after reading.
        compute_loss: `compute_loss(outputs, labels, num_items_in_batch)`, divided by `num_items_in_batch`; training
            then runs in this process.
        class_weights: In place of the recipe's `train.class_weights`: by name, in the order of the labels, or
            `"balanced"`.
        listener: Called with each event (`fulltune.records.events`) as it happens; default: progress is printed.

    Raises:
        FulltuneError: When the recipe or the folder is wrong.
    """
    hide_progress_bars()
    text, name = "", "run"
    if not isinstance(recipe, Recipe):
        path = Path(recipe)
        recipe, name = load_recipe(path), path.stem
        text = path.read_text(encoding="utf-8")
    if class_weights is not None:
        recipe = _with_class_weights(recipe, class_weights, Path(name))
    text = text or yaml.safe_dump(recipe.model_dump(mode="json", exclude_unset=True), sort_keys=False)
    folder = None if run_folder is None else Path(run_folder)
    hooks = Hooks(metrics, preprocess, compute_loss)
    found, _ = find_or_make(recipe, text, recipe.name or name, folder, fresh, hooks.marks())
    return Run(recipe, found, hooks, listener or _printing())


def _taking_what(job: Callable[_Given, Run]) -> Callable[[Callable[..., Reached]], Callable[_Given, Reached]]:
    """Give a function the parameters of `job`, for editors and `inspect`."""

    def sign(function: Callable[..., Reached]) -> Callable[_Given, Reached]:
        function.__signature__ = inspect.signature(job).replace(return_annotation=Reached)  # type: ignore[attr-defined]  # functions have one
        return function

    return sign


@_taking_what(job)
def run(*recipe: Any, **settings: Any) -> Reached:
    """Do all stages, with what `job` takes.

    Returns:
        The records of every stage: `folder`, `summary`, `plan`, `outcome`, `scores` (the trained model last), `report`.

    Raises:
        FulltuneError: One of its kinds; nothing that was done is lost, and the same call continues.

    Example:
        >>> result = fulltune.run("banking77.yaml", class_weights="balanced")  # doctest: +SKIP
        >>> result.scores[-1].metrics["accuracy"].value  # doctest: +SKIP
    """
    return searching.run(job(*recipe, **settings))


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


def _with_class_weights(recipe: Recipe, given: Mapping[str, float] | Sequence[float] | str, name: Path) -> Recipe:
    """The recipe with these class weights, checked."""
    weights: Any = given
    if isinstance(given, Mapping):
        weights = {label: _plain(weight) for label, weight in given.items()}
    elif not isinstance(given, str):
        weights = tuple(map(_plain, given))
    values = recipe.model_dump(exclude_unset=True)
    values["train"] = {**values.get("train", {}), "class_weights": weights}
    return check(values, name)


def _plain(number: Any) -> Any:
    """A number of NumPy's or PyTorch's as one of Python's."""
    return number.item() if hasattr(number, "item") else number


def _printing() -> Listener:
    from rich.console import Console

    from fulltune.cli.show.run import Display

    return Display(Console(stderr=True, highlight=False, emoji=False))
