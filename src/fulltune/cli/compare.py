"""The command `fulltune compare`. What reads the libraries is imported only when the recipes are known to be right."""

from __future__ import annotations

import glob
import hashlib
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.markup import escape

from fulltune import report
from fulltune.cli.show.run import Display
from fulltune.cli.stages import err, out, print_json
from fulltune.errors import InterruptedRun, RecipeError, SetupError
from fulltune.recipe.fields import Recipe
from fulltune.recipe.file import load_recipe
from fulltune.recipe.methods import Arm
from fulltune.records.comparison import Comparison
from fulltune.report.comparison import content
from fulltune.report.comparison.many_tasks import many_tasks, on_one_base
from fulltune.report.format import terminal
from fulltune.system import run_folder
from fulltune.text import first_few, parse_seconds

if TYPE_CHECKING:
    from fulltune.compare.run import Compared


@dataclass(frozen=True)
class CompareRequest:
    """What the command line says."""

    targets: list[Path]
    overrides: list[str]
    folder: Path | None
    fresh: bool
    budget: str | None
    as_json: bool


def compare(asked: CompareRequest) -> None:
    """Compare, or go on with it, and show the verdict; of several recipes also what they come to on one base."""
    if len(asked.targets) > 1:
        _compare_many(asked)
        return
    found, cards = _run(asked, asked.targets[0], asked.folder)
    if asked.as_json:
        typer.echo(found.model_dump_json(indent=2))
    else:
        _show(found, cards)


def _compare_many(asked: CompareRequest) -> None:
    if asked.fresh:
        raise SetupError("--fresh: with several recipes name a new --run-folder instead")
    if asked.folder is not None and (asked.folder / run_folder.IDENTITY).exists():
        what = "another comparison" if run_folder.is_comparison(asked.folder) else "a single run"
        raise SetupError(
            f"{asked.folder}: is the folder of {what}, and several recipes get a folder each inside the named one; "
            "name another folder, or leave --run-folder out"
        )
    recipes = _of_one_base(asked.targets, asked.overrides)
    parent = asked.folder or _folder_of_all(recipes)
    found = {}
    for name, target in zip(recipes, asked.targets, strict=True):
        err.print(f"[bold]{escape(name)}[/bold]", soft_wrap=True)
        found[name], cards = _run(asked, target, parent / name)
        if not asked.as_json:
            out.print(f"\n[bold]{escape(name)}[/bold]", soft_wrap=True)
            _show(found[name], cards)
    together = many_tasks(found)
    with run_folder.writing(parent):
        files = report.write_tasks(parent, together)
    if asked.as_json:
        typer.echo(together.model_dump_json(indent=2))
    else:
        terminal.show(out, [on_one_base(together)])
        _show_paths(files)


def _show(found: Comparison, cards: Sequence[Path]) -> None:
    terminal.show(out, content.in_short(found))
    _show_paths(cards)


def _show_paths(files: Sequence[Path]) -> None:
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
    for what, given in (
        ("model", {name: recipe.model.in_words() for name, recipe in recipes.items()}),
        ("evaluate.confidence", {name: str(recipe.evaluate.confidence) for name, recipe in recipes.items()}),
    ):
        if len(set(given.values())) > 1:
            said = ", ".join(f"{value} in {name}" for name, value in given.items())
            problems.append(f"{what}: several tasks share one base and one report; all must give the same ({said})")
    arms = [
        {one.arm: one for one in recipe.methods if recipe.compared_kind(one) not in ("base", "full")}
        for recipe in recipes.values()
    ]
    common = set.intersection(*map(set, arms)) if arms else set()
    if arms and not common:
        problems.append("methods: no method but 'full' is compared in all of these recipes")
    problems += [
        f"methods: '{name}' has other settings in one recipe than in another; give it another 'name'"
        for name in sorted(common)
        if len({_apart_from_rates(one[name]) for one in arms}) > 1
    ]
    fulls = [next(one for one in recipe.methods if one.kind == "full") for recipe in recipes.values()]
    if len({(one.arm, _apart_from_rates(one)) for one in fulls}) > 1:
        problems.append("methods: 'full' has another name or other settings in one recipe than in another")
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


def _apart_from_rates(method: Arm) -> str:
    return method.model_dump_json(exclude={"learning_rate", "learning_rates"})


_LONGEST_NAME = 100


def _folder_of_all(recipes: Mapping[str, Recipe]) -> Path:
    """Where the comparisons lie: the same for the same names, so that the same command goes on."""
    name = "+".join(recipes)
    if len(name) > _LONGEST_NAME:
        name = f"{name[:_LONGEST_NAME]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return Path(next(iter(recipes.values())).output) / name


def _share_of(budget: str | None, count: int) -> str | None:
    """Each comparison's part of the time."""
    try:
        return None if budget is None else f"{max(1, round(parse_seconds(budget) / count))}s"
    except ValueError as error:
        raise RecipeError(f"--budget: {error}") from None


def _run(asked: CompareRequest, target: Path, folder: Path | None) -> Compared:
    began, budget = time.time(), _share_of(asked.budget, len(asked.targets))  # reading the libraries counts, too
    recipe, found = _open(target, asked.overrides, folder, asked.fresh)
    run_folder.hide_progress_bars()
    try:
        from fulltune.compare.run import run
        from fulltune.pipeline import Run

        with Display(err, details=False) as display:
            job = Run(recipe, found, listener=display, began=began)
            return run(job, shlex.join(["fulltune", *sys.argv[1:]]), budget)
    except KeyboardInterrupt:
        raise InterruptedRun("interrupted; the same command continues it") from None


def _open(target: Path, overrides: list[str], folder: Path | None, fresh: bool) -> tuple[Recipe, Path]:
    """The comparison's recipe and its folder."""
    if target.is_dir():
        if overrides or folder or fresh:
            raise SetupError(f"{target}: is a run folder, whose settings are fixed; give the recipe to change them")
        recipe, found, resumed = run_folder.recipe_of(target), target, True
        if not recipe.methods:
            raise SetupError(
                f"{target}: is the folder of a single run, which compares nothing; give a recipe with 'methods', or "
                f"go on with the run: fulltune run {target}"
            )
    else:
        recipe = _recipe_of(target, overrides)
        text = target.read_text(encoding="utf-8") + "".join(f"\n# --set {override}\n" for override in overrides)
        name = recipe.name or target.stem
        unfinished = "" if folder or fresh else _unfinished_with_other_settings(recipe, name)
        found, resumed = run_folder.find_or_make(recipe, text, name, folder, fresh)
        if unfinished and not resumed:
            err.print(unfinished, soft_wrap=True, markup=False, style="yellow")
    err.print(f"[dim]{'continuing' if resumed else 'run folder'} {found}[/dim]", soft_wrap=True)
    return recipe, found


def _unfinished_with_other_settings(recipe: Recipe, name: str) -> str:
    """That the newest unfinished comparison of this name has other settings; empty: there is none."""
    names = f"{glob.escape(name)}-[0-9][0-9][0-9][0-9]-*"
    for other in reversed(run_folder.unfinished(Path(recipe.output), None, names)):
        try:
            before = run_folder.recipe_of(other)
        except SetupError:  # of another version, which this one cannot go on with
            continue
        if before.methods and (found := list(_differences(before.shaping(), recipe.shaping()))):
            return f"beginning anew: {other} is unfinished, but has other settings ({first_few(found)})"
    return ""


def _differences(before: Any, now: Any, where: str = "") -> Iterator[str]:
    """Settings in which two recipes differ, with both values where they are short."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in before | now:
            yield from _differences(before.get(name), now.get(name), f"{where}.{name}" if where else name)
    elif before != now:
        values = ["not set" if one is None else str(one) for one in (before, now)]
        nested = any(isinstance(one, dict | list) for one in (before, now))
        yield where if nested else f"{where}: {values[0]} there, {values[1]} here"


UNFAIR = 2
"""Exit code of a lint that found something unfair: the recipe is to be changed."""


def lint(asked: CompareRequest) -> None:
    """Say what would make the comparisons unfair; ends with `UNFAIR` when something does."""
    if asked.budget is not None:
        raise RecipeError("--budget: --lint reads the recipe alone; leave out one of them")
    run_folder.hide_progress_bars()
    from fulltune.compare.lint import lint_recipe

    found = {target: lint_recipe(_recipe_of(target, asked.overrides)) for target in asked.targets}
    if asked.as_json:
        lines = [{"recipe": str(target), **one.model_dump(mode="json")} for target in found for one in found[target]]
        print_json(lines)
    for target, several in () if asked.as_json else found.items():
        where = f"{target}: " if len(found) > 1 else ""
        said = [f"{one.level}: {one.where}: {one.what}; {one.to_do}" for one in several]
        for one in said or ["nothing found that would make this comparison unfair"]:
            out.print(f"{where}{one}", soft_wrap=True, markup=False)
    if any(one.level == "unfair" for several in found.values() for one in several):
        raise typer.Exit(UNFAIR)
