"""Answer with a finished model: find it, load it, give it texts or rows."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fulltune.errors import DataError, SetupError
from fulltune.methods import folder as folders
from fulltune.models.base import Base
from fulltune.models.load import load as load_model
from fulltune.predict.predictor import Answered as Answered
from fulltune.predict.predictor import Predictor as Predictor
from fulltune.recipe.model import ModelBlock
from fulltune.system.run_folder import comparison_of
from fulltune.tasks import tags
from fulltune.tasks.columns import shown


def load(run: Path, method: str | None = None) -> Predictor:
    """Load the model of a run folder, or a model folder that fulltune wrote.

    Args:
        run: The folder.
        method: Which of a run's models; default: the only one, or the one that a comparison recommends.

    Raises:
        SetupError: When there is no such model.
    """
    return _loaded(choose(run, method).folder, None)


def load_side_by_side(runs: Mapping[str, Path], method: str | None = None) -> dict[str, Predictor]:
    """Load what LoRA, adapters, prompts or heads trained for several tasks over one base, which is in memory once.

    While one is loaded, a second copy of the base is in memory for a moment.
    """
    found = {name: choose(run, method).folder for name, run in runs.items()}
    whole = [name for name, folder in found.items() if not folders.is_partial(folder)]
    if whole:
        raise SetupError(
            f"{whole[0]}: is a whole model ({found[whole[0]]}), which shares nothing with others; name another --method"
        )
    bases = {name: folders.notes_of(folder)["base_model"] for name, folder in found.items()}
    if any(base != next(iter(bases.values())) for base in bases.values()):
        said = ", ".join(f"{name} on {ModelBlock(**base).in_words()}" for name, base in bases.items())
        raise SetupError(f"these models are not of one base: {said}")
    shared: dict[str, Any] = {}
    return {name: _loaded(folder, shared) for name, folder in found.items()}


def _loaded(folder: Path, shared: dict[str, Any] | None) -> Predictor:
    notes = folders.notes_of(folder)
    base = Base.of(ModelBlock(name=str(folder.resolve())), notes["task"])
    if folders.is_partial(folder):
        model = folders.load(folder, base.processor, shared=shared).model
    else:
        model = load_model(base, {}, head_is_new=False)
    return Predictor(model.eval(), base.processor, notes)


@dataclass(frozen=True)
class ChosenModel:
    """The folder of one model."""

    folder: Path
    reason: str = ""
    """Why this one of several; empty: it was named, or is the only one."""


def choose(run: Path, method: str | None = None) -> ChosenModel:
    """The model that is named, the only one, or the one that a comparison's verdict recommends."""
    there = models_of(run)
    names = ", ".join(there)
    if method is not None:
        if method not in there:
            known = f"; here are: {names}" if there else ""
            raise SetupError(f"{run}: no finished model of method '{method}'{known}")
        return ChosenModel(there[method])
    if (run / folders.NOTES).exists():
        return ChosenModel(run)
    if not there:
        raise SetupError(f"{run}: no finished model here; expected a run folder with models/full, or a model folder")
    if len(there) == 1:
        return ChosenModel(next(iter(there.values())))
    found = comparison_of(run)
    if found is None or found.decision.verdict == "UNDECIDED":
        why = "there is no verdict yet" if found is None else "the verdict is UNDECIDED"
        raise SetupError(f"{run}: has several models and {why}; name one with --method: {names}")
    taken, reason = found.decision.recommended, f"the verdict is {found.decision.verdict}"
    if taken not in there:
        raise SetupError(
            f"{run}: {reason} and recommends '{taken}', which is not here; name one with --method: {names}"
        )
    return ChosenModel(there[taken], reason)


def models_of(run: Path) -> dict[str, Path]:
    """Folders of a run's finished models, by method."""
    return {path.parent.name: path.parent for path in sorted(run.glob(f"models/*/{folders.NOTES}"))}


_NEEDS_COLUMNS = {
    "text_pair": "reads pairs of texts; give a file with both columns",
    "question-answering": "finds answers in a passage; give a file with the columns of question and context",
    "multiple-choice": "chooses among texts; give a file with the columns of its choices",
}
"""Why one text is not enough for a model that has this column, or does this task."""


def row_from_text(text: str, notes: Mapping[str, Any]) -> dict[str, Any]:
    """A plain text as a row in the model's columns."""
    columns = notes["columns"]
    if problem := _NEEDS_COLUMNS.get("text_pair" if "text_pair" in columns else notes["task"]):
        names = ", ".join(column for role, column in columns.items() if role not in _NOT_READ)
        raise DataError(f"this model {problem}: {names}")
    role = next(role for role in ("messages", "tokens", "prompt", "source", "image", "text") if role in columns)
    forms = {"messages": [{"role": "user", "content": text}], "tokens": tags.split_text(text)}
    return {columns[role]: forms.get(role, text)}


def check_columns(columns: Collection[str], notes: Mapping[str, Any], where: str) -> None:
    """Refuse a file that lacks a column which the model reads."""
    missing = [column for column in columns_read(notes) if column not in columns]
    if missing:
        raise DataError(f"{where}: no column '{missing[0]}', which the model reads (columns here: {shown(columns)})")


_NOT_READ = ("label", "completion", "tools", "tags", "target", "answers")
"""Roles of columns that only training reads."""


def columns_read(notes: Mapping[str, Any]) -> list[str]:
    """Columns that each row must have to be answered."""
    return [column for role, column in notes["columns"].items() if role not in _NOT_READ]


def columns_not_read(notes: Mapping[str, Any]) -> list[str]:
    """Columns with what the model learned to give."""
    return [column for role, column in notes["columns"].items() if role in _NOT_READ]
