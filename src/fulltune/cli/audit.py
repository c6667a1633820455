"""`fulltune data`: the rows prepared and audited, shown, and reviewed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape

from fulltune.cli import review as reviewing
from fulltune.cli import stages
from fulltune.cli.stages import err, out
from fulltune.data import load_issues
from fulltune.records.audit import AUDIT, Audit, proofs_of
from fulltune.records.data import DataSummary
from fulltune.text import counted


def audited(
    target: Path, overrides: list[str] | None, folder: Path | None, fresh: bool, labels: bool, prove: bool
) -> tuple[Path, DataSummary, Audit]:
    """The data stage, and what is wrong with its rows; with a page about both."""
    from fulltune.cli.show.run import Display
    from fulltune.pipeline import audit_rows, prove_cleaning
    from fulltune.report import write_data_page
    from fulltune.run_context import Run
    from fulltune.system import run_folder

    recipe, found = stages.open_run(target, overrides, folder, fresh, "data")
    summary = stages.reach(recipe, found, "data", details=False).summary
    with run_folder.writing(found), run_folder.locked(found):
        with Display(err, details=False) as display:
            job = Run(recipe, found, listener=display)
            audit = audit_rows(job, summary, labels)
            if prove:
                prove_cleaning(job, summary)
        write_data_page(found)
    return found, summary, audit


def show(target: Path, folder: Path, summary: DataSummary, audit: Audit, as_json: bool) -> None:
    """What the model will see, and what looks wrong."""
    from fulltune.cli.show import run as display

    if as_json:
        issues = {found.check: found.rows for found in audit.checks}
        place = str(folder / "data" / AUDIT)
        stages.print_json(summary.model_dump(mode="json") | {"issues": issues, "audit": place})
        return
    display.show_data(out, summary)
    display.show_audit(out, audit)
    proofs = proofs_of(folder, audit)
    if proofs is not None:
        display.show_proofs(out, proofs)
    out.print(f"report:  {escape(str(folder / 'data.html'))}", soft_wrap=True)
    if audit.checks:
        out.print(f"review:  fulltune data {escape(str(target))} --review", soft_wrap=True)


def decide(target: Path, folder: Path, patch: Path | None, accept: Sequence[str]) -> None:
    """Take what is proposed for all rows of some checks, or ask; without a terminal write down what to decide."""
    file = patch or (target / "patch.jsonl" if target.is_dir() else target.with_suffix(".patch.jsonl"))
    issues, keys = load_issues(folder / "data"), reviewing.keys()
    if not issues:
        out.print("nothing to review: no check found anything")
        return
    if accept:
        decided = reviewing.accepted(issues, accept, file)
        for line in reviewing.about(decided, file):
            out.print(escape(line), soft_wrap=True)
        return
    decided = reviewing.review(out, issues, file, keys)
    if keys is None:
        count = counted(len(decided), "row")
        out.print(f"{count} to decide about written to {escape(str(file))}, all as kept", soft_wrap=True)
        return
    for line in reviewing.about(decided, file):
        out.print(escape(line), soft_wrap=True)
