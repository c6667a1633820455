"""`fulltune data`: the rows prepared and audited, shown, and decided about."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.markup import escape

from fulltune.cli import review as reviewing
from fulltune.cli import stages
from fulltune.cli.stages import err, out
from fulltune.data import load_issues, refuse_prove
from fulltune.errors import RecipeError
from fulltune.recipe.fields import Recipe
from fulltune.records.audit import AUDIT, HIGH_LOSS, Audit, Remedy, proofs_of
from fulltune.records.data import DataSummary
from fulltune.text import counted, did_you_mean, listed


@dataclass(frozen=True)
class Audited:
    """A run's rows, and what is wrong with them."""

    target: Path
    """The recipe, or the run folder."""
    recipe: Recipe
    folder: Path
    summary: DataSummary
    audit: Audit

    @property
    def patch(self) -> Path:
        """Where decisions are kept: the recipe's own patch, or a file beside it."""
        if self.recipe.data.patch:
            return Path(self.recipe.data.patch)
        return self.target / "patch.jsonl" if self.target.is_dir() else self.target.with_suffix(".patch.jsonl")


@dataclass(frozen=True)
class Wanted:
    """What is to be done beside reading the texts."""

    labels: bool
    """The untouched model judges labels, and finds outliers."""
    losses: bool
    """The trained model's loss of each row."""
    prove: bool
    """Classifiers with and without each cleaning step."""
    trainings: int
    """Seeds of each step's trainings; 0: none."""
    checks: Sequence[str]
    """Whose steps are trained; empty: all that found enough rows."""

    def __post_init__(self) -> None:
        if self.trainings < 0 or self.trainings == 1:
            raise RecipeError(f"--trainings: found {self.trainings}, expected 2 or more seeds of each step")
        if self.checks and not self.trainings:
            raise RecipeError("--check: names whose steps to train, expected --trainings as well")


def audited(target: Path, overrides: list[str] | None, folder: Path | None, fresh: bool, wanted: Wanted) -> Audited:
    """The data stage, and what is wrong with its rows; with a page about both."""
    from fulltune.cleaning import prove_by_training, refuse_trainings
    from fulltune.cli.show.run import Display
    from fulltune.pipeline import audit_rows, list_losses, prove_cleaning
    from fulltune.report import write_data_page
    from fulltune.run_context import Run
    from fulltune.system import hardware, run_folder

    if wanted.losses:  # refused before anything is made
        if not target.is_dir():
            raise RecipeError(f"--losses: a trained model reads the rows; give a run folder in place of {target}")
        run_folder.trained_plan(run_folder.recipe_of(target), target, hardware.here())
    recipe, found = stages.open_run(target, overrides, folder, fresh, "data")
    summary = stages.reach(recipe, found, "data", details=False).summary
    if wanted.prove:
        refuse_prove(summary)
    if wanted.trainings:
        refuse_trainings(recipe, summary)
    with run_folder.writing(found), run_folder.locked(found):
        with Display(err, details=False) as display:
            job = Run(recipe, found, listener=display)
            audit = audit_rows(job, summary, wanted.labels)
            if wanted.losses:
                audit = list_losses(job, summary)
            if wanted.prove:
                prove_cleaning(job, summary)
            if wanted.trainings:
                prove_by_training(job, summary, wanted.trainings, wanted.checks)
        write_data_page(found)
    return Audited(target, recipe, found, summary, audit)


def show(found: Audited, as_json: bool) -> None:
    """What the model will see, and what looks wrong."""
    from fulltune.report.format import terminal
    from fulltune.report.run import about_data, data_page

    folder, audit = found.folder, found.audit
    if as_json:
        issues = {one.check: one.rows for one in audit.checks}
        place = str(folder / "data" / AUDIT)
        more = {
            "issues": issues,
            "audit": place,
            "proofs": [one.model_dump(mode="json") for one in proofs_of(folder, audit)],
        }
        stages.print_json(found.summary.model_dump(mode="json") | more)
        return
    terminal.show(out, [*about_data.in_short(found.summary), *data_page.in_short(audit, proofs_of(folder, audit))])
    out.print(f"report:  {escape(str(folder / 'data.html'))}", soft_wrap=True)
    if audit.checks:
        out.print(f"review:  fulltune data {escape(str(found.target))} --review", soft_wrap=True)


def _relabel(summary: DataSummary) -> Callable[[], Remedy | None] | None:
    """Asks for a row's label: one that there is, or a new one typed twice. None: it has none of its own in a column."""
    if not summary.form.one_label or summary.task != "text-classification":
        return None

    def ask() -> Remedy | None:
        value = out.input("  label: ").strip()
        is_meant = value in summary.labels or (value and out.input("  a new label; once more: ").strip() == value)
        return Remedy(action="replace", column=summary.columns["label"], value=value) if is_meant else None

    return ask


def decide(found: Audited, patch: Path | None, review: bool, accept: Sequence[str], as_json: bool) -> None:
    """Take what is proposed for all rows of some checks, or ask; without a terminal write down what to decide."""
    if not (review or accept):
        raise RecipeError("--patch: says where decisions are kept; expected --review or --accept (applied: data.patch)")
    if HIGH_LOSS in accept:
        raise RecipeError(f"--accept: '{HIGH_LOSS}' claims nothing about its rows; expected --review, to read them")
    file, keys = patch or found.patch, reviewing.keys()
    issues = load_issues(found.folder / "data")
    known = {*found.audit.clean, *(one.check for one in found.audit.checks)}
    if not file.parent.is_dir():
        raise RecipeError(f"--patch: {file.parent}: there is no such folder")
    for check in (one for one in accept if one not in known):
        if (why := found.audit.not_run.get(check)) is not None:
            raise RecipeError(f"--accept: '{check}' was not looked at: {why}")
        hint = did_you_mean(check, known)
        raise RecipeError(
            f"--accept: there is no check '{check}'; {hint or f'expected one of {listed(sorted(known))}'}"
        )
    before = reviewing.decided_before(file)
    if accept:
        decided, said = reviewing.accepted(issues, accept, before)
    else:
        decided = reviewing.review(out, issues, file, before, keys, _relabel(found.summary))
        said = reviewing.precisions(decided.values()) if keys is not None else []
    if decided != before:
        reviewing.save(file, decided)
    if as_json:
        stages.print_json({"decisions": len(decided), "new": len(decided) - len(before), "patch": str(file)})
        return
    is_open = {key for key, one in decided.items() if one.is_open}
    if keys is None and not accept:
        told = f"{counted(len(decided) - len(before), 'row')} to decide about written to {file}"
        out.print(escape(told), soft_wrap=True)
        return
    new = sum(key not in before or before[key].is_open for key in decided.keys() - is_open)
    told = f"{counted(new, 'new decision')}; in {file}: {len(decided) - len(is_open):,} decided, {len(is_open):,} open"
    out.print(escape(told), soft_wrap=True)
    for line in said:
        out.print(escape(line), soft_wrap=True)
    if decided and found.recipe.data.patch is None:
        # As the recipe has paths: from its own folder.
        name = file.resolve() if found.target.is_dir() else os.path.relpath(file, found.target.parent)
        out.print(f"apply them by the recipe's line data.patch: {escape(str(name))}", soft_wrap=True)
