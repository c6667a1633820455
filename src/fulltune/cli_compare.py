"""The command `fulltune compare`. Layer 4."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console

from fulltune.errors import InterruptedRun, RecipeError, SetupError
from fulltune.recipe import Recipe
from fulltune.recipe_file import load_recipe
from fulltune.units import parse_seconds

if TYPE_CHECKING:
    from fulltune.comparing import Compared


def compare(
    out: Console,
    err: Console,
    target: Path,
    overrides: list[str],
    folder: Path | None,
    fresh: bool,
    budget: str | None,
    as_json: bool,
) -> None:
    """Compare, or go on with it, and show the verdict."""
    from fulltune import display_compare

    found = _run(err, target, overrides, folder, fresh, _checked(budget))
    if as_json:
        typer.echo(found.comparison.model_dump_json(indent=2))
        return
    display_compare.verdict(out, found.comparison)
    for path in found.cards:
        out.print(f"{path.name:<12} {path}", soft_wrap=True, markup=False)


def _checked(budget: str | None) -> str | None:
    """Refuse a budget that is no time.

    Raises:
        RecipeError: With what was expected.
    """
    if budget is not None:
        try:
            parse_seconds(budget)
        except ValueError as error:
            raise RecipeError(f"--budget: {error}") from None
    return budget


def _run(
    err: Console, target: Path, overrides: list[str], folder: Path | None, fresh: bool, budget: str | None
) -> Compared:
    from fulltune import run_folder

    recipe, found = _open(err, target, overrides, folder, fresh)
    run_folder.hide_progress_bars()
    try:
        from fulltune import comparing, pipeline
        from fulltune.display import Display

        with Display(err, details=False) as display:
            return comparing.run(
                pipeline.Run(recipe, found, listener=display), shlex.join(["fulltune", *sys.argv[1:]]), budget
            )
    except KeyboardInterrupt:
        raise InterruptedRun("interrupted; the same command continues it") from None


def _open(err: Console, target: Path, overrides: list[str], folder: Path | None, fresh: bool) -> tuple[Recipe, Path]:
    """The comparison's recipe and its folder."""
    from fulltune import run_folder
    from fulltune.comparing import recipe_for

    if target.is_dir():
        if overrides or folder or fresh:
            raise SetupError(f"{target}: is a run folder, whose settings are fixed; give the recipe to change them")
        recipe, found, resumed = run_folder.recipe_of(target), target, True
    else:
        recipe = recipe_for(load_recipe(target, overrides))
        text = target.read_text(encoding="utf-8") + "".join(f"\n# --set {override}\n" for override in overrides)
        name = recipe.name or target.stem
        found, resumed = run_folder.find_or_make(recipe, text, name, folder, fresh)
    err.print(f"[dim]{'continuing' if resumed else 'run folder'} {found}[/dim]", soft_wrap=True)
    return recipe, found


def lint(out: Console, target: Path, overrides: list[str], as_json: bool) -> None:
    """Say what would make the comparison unfair."""
    from fulltune import comparing

    findings = comparing.lint_recipe(comparing.recipe_for(load_recipe(target, overrides)))
    if as_json:
        typer.echo(json.dumps([one.model_dump(mode="json") for one in findings], ensure_ascii=False, indent=2))
        return
    for one in findings:
        out.print(f"{one.level}: {one.where}: {one.what}; {one.to_do}", soft_wrap=True, markup=False)
    if not findings:
        out.print("nothing found that would make this comparison unfair")
