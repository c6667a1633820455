from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.markup import escape

from fulltune.cli.stages import err, note, open_run_folder, out, print_json, progress_display
from fulltune.errors import RecipeError, SetupError
from fulltune.recipe.fields import Recipe
from fulltune.recipe.file import load_recipe
from fulltune.report.comparison import content
from fulltune.report.comparison.many_tasks import build_tasks_section, combine_tasks, write_tasks_report
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
    """Run or resume a comparison and print its verdict. Several recipes are compared one by one, then together."""
    began, share = time.time(), _budget_per_task(budget, len(targets))
    if len(targets) > 1:
        if fresh:
            raise SetupError("--fresh: is not possible with several recipes; name a new --run-folder instead")
        _compare_recipes(targets, overrides, folder, share, as_json)
        return
    recipe, run = _load_recipe_and_folder(targets[0], overrides, folder, fresh)
    comparison, cards = _run_comparison(recipe, run, share, began)
    if as_json:
        typer.echo(comparison.model_dump_json(indent=2))
    else:
        _print_results(content.build_comparison_terminal_report(comparison), cards)


def _compare_recipes(
    targets: list[Path], overrides: list[str], folder: Path | None, budget: str | None, as_json: bool
) -> None:
    """Run each recipe's comparison, then report on all tasks together. `budget` is per recipe, such as `90s`."""
    if folder is not None and (folder / run_folder.IDENTITY).exists():
        what = "another comparison" if run_folder.is_comparison(folder) else "a single run"
        raise SetupError(
            f"{folder}: already belongs to {what}. When several recipes are compared, each gets a subfolder: choose "
            "another --run-folder, or omit the option"
        )
    recipes = _load_tasks(targets, overrides)
    # The same names give the same folder, so that the same command resumes.
    parent = folder or Path(next(iter(recipes.values())).output) / "+".join(recipes)[:_LONGEST_NAME]
    comparisons = {}
    for name, target in zip(recipes, targets, strict=True):
        err.print(f"[bold]{escape(name)}[/bold]", soft_wrap=True)
        began = time.time()
        recipe, run = _load_recipe_and_folder(target, overrides, parent / name, False)
        comparisons[name], cards = _run_comparison(recipe, run, budget, began)
        if not as_json:
            out.print(f"\n[bold]{escape(name)}[/bold]", soft_wrap=True)
            _print_results(content.build_comparison_terminal_report(comparisons[name]), cards)
    together = combine_tasks(comparisons)
    with run_folder.explain_os_errors(parent):
        files = write_tasks_report(parent, together)
    if as_json:
        typer.echo(together.model_dump_json(indent=2))
    else:
        _print_results([build_tasks_section(together)], files)


def _print_results(parts: Iterable[Headline | Section | Element], files: Sequence[Path]) -> None:
    pages.print_parts(out, parts)
    for path in files:
        out.print(f"{path.name:<12} {path}", soft_wrap=True, markup=False)


def _load_tasks(targets: list[Path], overrides: list[str]) -> dict[str, Recipe]:
    """Return the recipes by name. Raise a `RecipeError` unless they share the pretrained model and methods."""
    recipes: dict[str, Recipe] = {}
    problems = []
    for target in targets:
        if target.is_dir():
            problems.append(f"{target}: is a folder; give recipes to compare several tasks")
            continue
        recipe = _load_comparison_recipe(target, overrides)
        name = recipe.name or target.stem
        if name in recipes:
            problems.append(f"{target}: another recipe is also called '{name}'; change its 'name'")
        recipes[name] = recipe
    models = {name: recipe.model.describe() for name, recipe in recipes.items()}
    if len(set(models.values())) > 1:
        by_recipe = ", ".join(f"{model} in {name}" for name, model in models.items())
        problems.append(f"model: several tasks must share one pretrained model; found {by_recipe}")
    without_rates = {"learning_rate", "learning_rates"}
    methods = [
        {
            method.label: (method.kind, method.model_dump_json(exclude=without_rates))
            for method in recipe.methods
            if method.kind != "base"
        }
        for recipe in recipes.values()
    ]
    common = set.intersection(*map(set, methods)) if methods else set()
    if methods and (len(common) < 2 or not any(methods[0][name][0] == "full" for name in common)):
        problems.append("methods: all recipes must share 'full' and at least one other method")
    problems += [
        f"methods: '{name}' has different settings in different recipes; change its 'name'"
        for name in sorted(common)
        if len({one[name] for one in methods}) > 1
    ]
    if problems:
        raise RecipeError(problems)
    return recipes


def _load_comparison_recipe(target: Path, overrides: list[str]) -> Recipe:
    recipe = load_recipe(target, overrides)
    from fulltune.compare.run import comparison_recipe  # imported late, so that recipe errors do not wait for libraries

    try:
        compared = comparison_recipe(recipe)
        if not recipe.methods:
            note(
                f"{target}: names no methods, so these are compared: {', '.join(one.label for one in compared.methods)}"
            )
        return compared
    except RecipeError as error:
        raise RecipeError([f"{target}: {problem}" for problem in error.problems]) from None


def _budget_per_task(budget: str | None, count: int) -> str | None:
    """Return each task's share of the budget, such as `90s`, or None without a budget."""
    try:
        return None if budget is None else f"{max(1, round(parse_seconds(budget) / count))}s"
    except ValueError as error:
        raise RecipeError(f"--budget: {error}") from None


def _run_comparison(recipe: Recipe, folder: Path, budget: str | None, start_time: float) -> Compared:
    with progress_display(details=False) as display:
        from fulltune.compare.run import run_comparison
        from fulltune.pipeline import Run

        job = Run(recipe, folder, listener=display, began=start_time)
        return run_comparison(job, shlex.join(["fulltune", *sys.argv[1:]]), budget)


def _load_recipe_and_folder(target: Path, overrides: list[str], run: Path | None, fresh: bool) -> tuple[Recipe, Path]:
    recipe = run_folder.load_run_recipe(target) if target.is_dir() else _load_comparison_recipe(target, overrides)
    if not recipe.methods:  # only a folder's: a file's recipe was refused before
        raise SetupError(
            f"{target}: belongs to a single run; give a recipe with 'methods', or resume the run: fulltune run {target}"
        )
    return recipe, open_run_folder(target, recipe, overrides, run, fresh)


UNFAIR = 2


def print_unfair_settings(targets: list[Path], overrides: list[str], budget: str | None, as_json: bool) -> None:
    """Print what would make the comparisons unfair, and exit with code 2 if anything would."""
    if budget is not None:
        raise RecipeError("--budget: has no effect with --lint, which only reads the recipe; remove one of them")
    run_folder.hide_progress_bars()
    from fulltune.compare.lint import lint_recipe

    findings = {target: lint_recipe(_load_comparison_recipe(target, overrides)) for target in targets}
    if as_json:
        print_json([{"recipe": str(path), **f.model_dump(mode="json")} for path in findings for f in findings[path]])
    for target, several in () if as_json else findings.items():
        where = f"{target}: " if len(findings) > 1 else ""
        lines = [f"{each.level}: {each.where}: {each.what}; {each.to_do}" for each in several]
        for line in lines or ["no unfair setting was found"]:
            out.print(f"{where}{line}", soft_wrap=True, markup=False)
    if any(finding.level == "unfair" for several in findings.values() for finding in several):
        raise typer.Exit(UNFAIR)
