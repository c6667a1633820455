"""The folder of a search inside its run's: `search`, with the trials, until the best one is moved into the run."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from fulltune.data.cache import link
from fulltune.recipe.fields import Recipe
from fulltune.records.plan import Plan, Setting
from fulltune.records.training import Outcome
from fulltune.system import run_folder

FOLDER, RECORD = "search", "search.json"


def make(folder: Path, recipe: Recipe, data: Path) -> None:
    """A run folder of this recipe's, with the rows that are prepared already.

    Args:
        folder: To be made, or to be gone on with.
        recipe: Its own.
        data: The prepared rows.
    """
    run_folder.find_or_make(recipe, "", folder.name, folder, fresh=False)
    if not (folder / "data").exists():
        link(data, folder / "data")


def adopt(trial: Path, plan: Plan, run: Path, arm: str, settings: tuple[Setting, ...]) -> None:
    """Move a finished trial into the run, as if it had been trained there; what was moved before is left alone.

    Args:
        trial: The run folder in which it was trained.
        plan: The trial's.
        run: The run folder that gets it.
        arm: The method's name there.
        settings: What the search chose, each with its reason.
    """
    chosen = {one.name: one for one in settings}
    kept = tuple(chosen.get(one.name, one) for one in plan.settings)
    run_folder.save_plan(run, plan.model_copy(update={"model_name": "", "method": arm, "settings": kept}))
    (run / "attempts").mkdir(exist_ok=True)
    of_trial = re.compile(re.escape(plan.trial) + r"-\d+")
    for attempt in sorted((trial / "attempts").glob(f"{plan.trial}-*")):
        if of_trial.fullmatch(attempt.name):
            attempt.rename(run / "attempts" / attempt.name)
    for path in (run / "attempts").glob(f"{plan.trial}-*/outcome.json"):
        outcome = Outcome.load(path)
        if outcome.model_folder is not None:
            outcome.model_copy(update={"model_folder": f"models/{arm}"}).save(path)
    for source, target in ((trial / "models" / arm, run / "models" / arm), (trial / "probe", run / "probe")):
        if source.exists():
            shutil.rmtree(target, ignore_errors=True)
            target.parent.mkdir(exist_ok=True)
            source.rename(target)
