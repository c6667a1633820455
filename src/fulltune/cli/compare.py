"""The command `fulltune compare`. What reads the libraries is imported only when the recipes are known to be right."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.markup import escape

from fulltune import report
from fulltune.cli.stages import displayed, err, open_folder, out, print_json
from fulltune.errors import RecipeError, SetupError
from fulltune.recipe.fields import Recipe
from fulltune.recipe.file import load_recipe
from fulltune.report.comparison import content
from fulltune.report.comparison.many_tasks import many_tasks, on_one_base
from fulltune.report.format import pages
from fulltune.report.format.blocks import Element, Headline, Section
from fulltune.system import run_folder
from fulltune.text import parse_seconds

if TYPE_CHECKING:
    from fulltune.compare.run import Compared


_LONGEST_NAME = 100


def compare(
    targets: list[Path], overrides: list[str], folder: Path | None, fresh: bool, budget: str | None, as_json: bool
) -> None:
    """Compare, or go on with it, and show the verdict; of several recipes also what they come to on one base."""
    began, share = time.time(), _share_of(budget, len(targets))
    if len(targets) > 1:
        if fresh:
            raise SetupError("--fresh: with several recipes name a new --run-folder instead")
        _compare_many(targets, overrides, folder, share, as_json)
        return
    recipe, run = _open(targets[0], overrides, folder, fresh)
    found, cards = _run(recipe, run, share, began)
    if as_json:
        typer.echo(found.model_dump_json(indent=2))
    else:
        _show(content.for_terminal(found), cards)


def _compare_many(
    targets: list[Path], overrides: list[str], folder: Path | None, budget: str | None, as_json: bool
) -> None:
    if folder is not None and (folder / run_folder.IDENTITY).exists():
        what = "another comparison" if run_folder.is_comparison(folder) else "a single run"
        raise SetupError(
            f"{folder}: is the folder of {what}, and several recipes get a folder each inside the named one; "
            "name another folder, or leave --run-folder out"
        )
    recipes = _of_one_base(targets, overrides)
    # The same for the same names, so that the same command goes on.
    parent = folder or Path(next(iter(recipes.values())).output) / "+".join(recipes)[:_LONGEST_NAME]
    found = {}
    for name, target in zip(recipes, targets, strict=True):
        err.print(f"[bold]{escape(name)}[/bold]", soft_wrap=True)
        began = time.time()
        recipe, run = _open(target, overrides, parent / name, False)
        found[name], cards = _run(recipe, run, budget, began)
        if not as_json:
            out.print(f"\n[bold]{escape(name)}[/bold]", soft_wrap=True)
            _show(content.for_terminal(found[name]), cards)
    together = many_tasks(found)
    with run_folder.writing(parent):
        files = report.write_tasks(parent, together)
    if as_json:
        typer.echo(together.model_dump_json(indent=2))
    else:
        _show([on_one_base(together)], files)


def _show(parts: Iterable[Headline | Section | Element], files: Sequence[Path]) -> None:
    pages.show(out, parts)
    for path in files:
        out.print(f"{path.name:<12} {path}", soft_wrap=True, markup=False)


def _of_one_base(targets: list[Path], overrides: list[str]) -> dict[str, Recipe]:
    """The recipes by name, with methods in common, and all on one pretrained model."""
    recipes: dict[str, Recipe] = {}
    problems = []
    for target in targets:
        if target.is_dir():
            problems.append(f"{target}: is a folder; several tasks are compared from their recipes")
            continue
        recipe = _recipe_of(target, overrides)
        name = recipe.name or target.stem
        if name in recipes:
            problems.append(f"{target}: is called '{name}' like another one; give it another 'name'")
        recipes[name] = recipe
    models = {name: recipe.model.in_words() for name, recipe in recipes.items()}
    if len(set(models.values())) > 1:
        said = ", ".join(f"{model} in {name}" for name, model in models.items())
        problems.append(f"model: several tasks share one base; all must give the same ({said})")
    without_rates = {"learning_rate", "learning_rates"}
    methods = [
        {
            one.label: (one.kind, one.model_dump_json(exclude=without_rates))
            for one in recipe.methods
            if one.kind != "base"
        }
        for recipe in recipes.values()
    ]
    common = set.intersection(*map(set, methods)) if methods else set()
    if methods and (len(common) < 2 or not any(methods[0][name][0] == "full" for name in common)):
        problems.append("methods: 'full' and one method more must have the same names in all of these recipes")
    problems += [
        f"methods: '{name}' has other settings in one recipe than in another; give it another 'name'"
        for name in sorted(common)
        if len({one[name] for one in methods}) > 1
    ]
    if problems:
        raise RecipeError(problems)
    return recipes


def _recipe_of(target: Path, overrides: list[str]) -> Recipe:
    """A comparison's recipe from its file; refused when it compares nothing."""
    recipe = load_recipe(target, overrides)
    from fulltune.compare.run import recipe_for  # reads the libraries: an error of the recipe does not wait for it

    try:
        return recipe_for(recipe)
    except RecipeError as error:
        raise RecipeError([f"{target}: {problem}" for problem in error.problems]) from None


def _share_of(budget: str | None, count: int) -> str | None:
    """Each comparison's part of the time."""
    try:
        return None if budget is None else f"{max(1, round(parse_seconds(budget) / count))}s"
    except ValueError as error:
        raise RecipeError(f"--budget: {error}") from None


def _run(recipe: Recipe, found: Path, budget: str | None, began: float) -> Compared:
    """Compare in a run folder; `began` before the recipe was read, so that reading the libraries counts, too."""
    with displayed(details=False) as display:
        from fulltune.compare.run import run_comparison
        from fulltune.pipeline import Run

        job = Run(recipe, found, listener=display, began=began)
        return run_comparison(job, shlex.join(["fulltune", *sys.argv[1:]]), budget)


def _open(target: Path, overrides: list[str], folder: Path | None, fresh: bool) -> tuple[Recipe, Path]:
    """The comparison's recipe and its folder."""
    recipe = run_folder.recipe_of(target) if target.is_dir() else _recipe_of(target, overrides)
    if not recipe.methods:  # of a recipe that is refused before
        raise SetupError(
            f"{target}: is the folder of a single run, which compares nothing; give a recipe with 'methods', or "
            f"go on with the run: fulltune run {target}"
        )
    return recipe, open_folder(target, recipe, overrides, folder, fresh)


UNFAIR = 2
"""Exit code of a lint that found something unfair: the recipe is to be changed."""


def lint(targets: list[Path], overrides: list[str], budget: str | None, as_json: bool) -> None:
    """Say what would make the comparisons unfair; ends with `UNFAIR` when something does."""
    if budget is not None:
        raise RecipeError("--budget: --lint reads the recipe alone; leave out one of them")
    run_folder.hide_progress_bars()
    from fulltune.compare.lint import lint_recipe

    found = {target: lint_recipe(_recipe_of(target, overrides)) for target in targets}
    if as_json:
        lines = [{"recipe": str(target), **one.model_dump(mode="json")} for target in found for one in found[target]]
        print_json(lines)
    for target, several in () if as_json else found.items():
        where = f"{target}: " if len(found) > 1 else ""
        said = [f"{one.level}: {one.where}: {one.what}; {one.to_do}" for one in several]
        for one in said or ["nothing found that would make this comparison unfair"]:
            out.print(f"{where}{one}", soft_wrap=True, markup=False)
    if any(one.level == "unfair" for several in found.values() for one in several):
        raise typer.Exit(UNFAIR)
