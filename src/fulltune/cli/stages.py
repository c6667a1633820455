from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unicodedata import category

import typer
from rich.console import Console
from rich.markup import escape

from fulltune.errors import DataError, FulltuneError, InterruptedRun, RecipeError, SetupError

if TYPE_CHECKING:
    from fulltune.cli.show.run import Display
    from fulltune.pipeline import Until
    from fulltune.recipe.fields import Recipe
    from fulltune.system.run_folder import RunResult
    from fulltune.train.parent.machines import MachineGroup

# No emoji: `a.csv:100:` would lose its line.
err = Console(stderr=True, highlight=False, emoji=False)
out = Console(highlight=False, emoji=False)


def note(text: str) -> None:
    """Print a line to stderr that is less important than a result."""
    err.print(f"[dim]{escape(text)}[/dim]", soft_wrap=True)


def printable_problems(error: FulltuneError) -> Iterator[str]:
    """Yield an error's problems without control characters. Personal data in data errors is masked."""
    from fulltune.audit.texts import masked_text

    for problem in error.problems:
        text = masked_text(problem) if isinstance(error, DataError) else problem
        yield "".join(ascii(sign)[1:-1] if category(sign) in ("Cc", "Cf") and sign != "\n" else sign for sign in text)


def end_on_signal(number: int, frame: object) -> None:
    """End the command at once on a signal outside training, and print that it can resume.

    The default handler would not end a container's first process. An exception would be lost inside PyTorch.
    """
    os.write(2, b"stopped by a signal; run the same command to resume or start again\n")
    os._exit(InterruptedRun.exit_code)


@contextmanager
def machine_group(
    target: Path, overrides: list[str] | None, machine_rank: int | None, rendezvous: str | None, max_wait: str
) -> Iterator[MachineGroup | None]:
    """Coordinate the other machines from machine 0 in the block; on others, follow it and exit. None if alone."""
    from fulltune.recipe.file import load_recipe
    from fulltune.system import run_folder
    from fulltune.system.machines import parse_machine_address

    recipe = run_folder.load_run_recipe(target) if target.is_dir() else load_recipe(target, overrides or [])
    # A run folder without these options is refused later if something is left to train.
    alone = machine_rank is None and rendezvous is None and target.is_dir()
    address = None if alone else parse_machine_address(recipe, machine_rank, rendezvous, max_wait)
    if address is None:
        yield None
        return
    with run_folder.explain_os_errors(Path(recipe.output)):
        from fulltune.train.parent.machines import follow_machine_0, lead_machines

        if address.rank == 0:
            with lead_machines(address, recipe, note) as group:
                yield group
            return
        follow_machine_0(address, recipe, note)
    raise typer.Exit


def open_run(
    target: Path, overrides: list[str] | None, folder: Path | None, fresh: bool, until: Until
) -> tuple[Recipe, Path]:
    """Return a single run's recipe and its folder, which is new or resumed. `until` is the last stage to run."""
    from fulltune.recipe.file import load_recipe
    from fulltune.system import run_folder

    if target.is_dir():
        recipe = run_folder.load_run_recipe(target)
        if until != "data":
            run_folder.raise_if_comparison(target)
        run_folder.raise_if_started_with_functions(target, recipe)
    else:
        recipe = load_recipe(target, overrides or [])
        if recipe.methods and until not in ("data", "plan"):
            raise RecipeError(
                f"{target}: methods: run a comparison with 'fulltune compare {target}', or replace 'methods' with one "
                "'method' for a single run"
            )
    return recipe, open_run_folder(target, recipe, overrides or [], folder, fresh)


def open_run_folder(target: Path, recipe: Recipe, overrides: list[str], folder: Path | None, fresh: bool) -> Path:
    """Return the run folder, which is new or resumed, and print its path."""
    from fulltune.system import run_folder

    run, resumed = target, True
    if not target.is_dir():
        text = target.read_text(encoding="utf-8") + "".join(f"\n# --set {override}\n" for override in overrides)
        run, resumed = run_folder.find_or_make_folder(recipe, text, recipe.name or target.stem, folder, fresh)
    elif overrides or folder or fresh:
        raise SetupError(
            f"{target}: is a run folder, so its settings cannot be changed; for other settings, pass the recipe instead"
        )
    goes_on = resumed and not run_folder.is_complete(run)
    note(f"{'resuming' if goes_on else 'run folder'} {run}")
    return run


def load_if_finished(recipe: Recipe, folder: Path) -> RunResult | None:
    """If a run is complete, print when it finished and return its results, else return None."""
    from fulltune.system import run_folder

    reached = run_folder.load_finished_run(recipe, folder)
    if reached is not None:
        err.print(f"already finished at {run_folder.finished_at(folder):%Y-%m-%d %H:%M}; results:")
    return reached


def run_until(
    recipe: Recipe, folder: Path, until: Until, details: bool, measure: bool = False, **run_fields: Any
) -> RunResult:
    """Run the pipeline up to a stage and show progress; `details` prints tables, `measure` times settings."""
    run_fields = {"began": time.time(), **run_fields}
    with progress_display(details) as display:
        from fulltune.compare.rate_search import run_recipe
        from fulltune.pipeline import Run

        return run_recipe(Run(recipe, folder, listener=display, **run_fields), until, measure)


@contextmanager
def progress_display(details: bool) -> Iterator[Display]:
    """Show progress during the block, in which Ctrl-C raises `InterruptedRun`."""
    from fulltune.system import run_folder

    run_folder.hide_progress_bars()
    try:
        from fulltune.cli.show.run import Display

        with Display(err, details) as display:
            yield display
    except KeyboardInterrupt:
        # Typer would exit with 130, which does not say that the run can resume.
        raise InterruptedRun("interrupted; run the same command to resume") from None


def choose_model_folder(run: Path, method: str | None) -> Path:
    """Return the folder of the model of `method` (default: the verdict's choice in a comparison, which is printed)."""
    from fulltune import predict as predicting

    folder, reason = predicting.choose_model_folder(run, method)
    if reason:
        note(f"{run}: using '{folder.name}': {reason} (choose another with --method)")
    return folder


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, ensure_ascii=False, indent=2))
