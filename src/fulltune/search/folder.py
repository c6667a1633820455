"""The folder of a search inside its run's: `search`, with the trials, until the best one is moved into the run."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from fulltune.pipeline import Run
from fulltune.recipe.several_runs import with_settings
from fulltune.records.comparison import Searched
from fulltune.records.plan import Plan, Setting
from fulltune.records.training import Outcome
from fulltune.system import run_folder

FOLDER, RECORD = "search", "search.json"


def move_into_run(job: Run, found: Searched) -> None:
    """Move the run that a search chose into the run folder, the plan last, so that a killed move goes on."""
    run, trial, arm = job.folder, job.folder / found.place, job.recipe.method.arm
    planned = Plan.load(job.plan_path)
    (run / "attempts").mkdir(exist_ok=True)
    for attempt in sorted((trial / "attempts").glob(f"{found.trial}-*")):
        if _is_of(found.trial, attempt):
            attempt.rename(run / "attempts" / attempt.name)
    for path in (run / "attempts").glob(f"{found.trial}-*/outcome.json"):
        outcome = Outcome.load(path)
        if outcome.model_folder not in (None, f"models/{arm}"):
            outcome.model_copy(update={"model_folder": f"models/{arm}"}).save(path)
    for source, target in ((trial / "models" / arm, run / "models" / arm), (trial / "probe", run / "probe")):
        if source.exists():
            shutil.rmtree(target, ignore_errors=True)
            target.parent.mkdir(exist_ok=True)
            source.rename(target)
    names = (f"{found.trial}.json", f"{arm}.json")
    made = next(Plan.load(path) for name in names if (path := trial / "plan" / name).exists())
    changes = {"model_name": "", "method": arm, "settings": tuple(_settings(made, planned, found))}
    if (adopted := made.model_copy(update=changes)) != planned:
        run_folder.save_plan(run, with_settings(job.recipe, found.settings), adopted)


def _is_of(trial: str, attempt: Path) -> bool:
    return re.fullmatch(re.escape(trial) + r"-\d+", attempt.name) is not None


def _settings(made: Plan, planned: Plan, found: Searched) -> list[Setting]:
    """The trial's settings; what it was given only in order to be a trial is as it was planned for the run."""
    before = {one.name: one for one in planned.settings}
    settings = []
    for one in made.settings:
        known = before.get(one.name)
        if one.name in found.settings:
            settings.append(Setting(name=one.name, value=one.value, reason=found.reason, chosen=True))
        elif known is not None and (known.value == one.value or not one.chosen):
            settings.append(known)
        elif one.chosen:
            settings.append(one)
    return settings
