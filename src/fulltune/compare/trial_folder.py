"""Trials: whole runs of one recipe with changes, one after the other; the same command resumes them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fulltune import pipeline
from fulltune.data.cache import link
from fulltune.files import append_line, lines_of
from fulltune.pipeline import Run, Until
from fulltune.recipe.fields import Recipe
from fulltune.records.events import without_tables
from fulltune.system import run_folder
from fulltune.system.run_folder import Reached


def changed(recipe: Recipe, changes: Mapping[str, Mapping[str, Any]]) -> Recipe:
    """A recipe with other settings in its blocks, such as `{"train": {"seed": 43}}`."""
    blocks = {name: getattr(recipe, name).model_copy(update=values) for name, values in changes.items()}
    return recipe.model_copy(update=blocks)


def make_folder(folder: Path, recipe: Recipe, data: Path | None = None) -> None:
    """Make a trial's run folder, or find it; with `data` it has the rows that are prepared there."""
    run_folder.find_or_make(recipe, "", folder.name, folder, fresh=False)
    if data is not None and not (folder / "data").exists():
        link(data, folder / "data")


def whole_run(job: Run, recipe: Recipe, folder: Path, until: Until = "train", data: Path | None = None) -> Reached:
    """A trial in a folder of its own, which shows no tables and notes no look at the test rows; what is there of it is
    not done again."""
    make_folder(folder, recipe, data)
    listener = without_tables(job.listener)
    trial = replace(job, recipe=recipe, folder=folder, listener=listener, began=None, is_trial=True)
    return pipeline.run(trial, until)


@dataclass
class Clock:
    """Seconds that all commands spent on trials, part by part, in a file; a killed command's last part is missing."""

    path: Path
    began: float = field(default_factory=time.monotonic)
    """Start of the time that is not yet written down."""

    @contextlib.contextmanager
    def during(self, what: str) -> Iterator[None]:
        """Write down how long something took, with what came before it; of what is interrupted as well."""
        try:
            yield
        finally:
            self.write(what)

    def write(self, what: str) -> None:
        """Write down the seconds since this was last done, so that none is counted twice."""
        seconds, self.began = time.monotonic() - self.began, time.monotonic()
        append_line(self.path, {"what": what, "seconds": round(seconds, 3)})

    @property
    def spent_seconds(self) -> float:
        return sum(entry["seconds"] for entry in lines_of(self.path))
