from __future__ import annotations

import json
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.markup import escape

from fulltune.audit.stage import load_issues
from fulltune.audit.texts import masked_cells, masked_text
from fulltune.audit.texts.flaw import ABOUT
from fulltune.cli import stages
from fulltune.cli.stages import out
from fulltune.data.patch import Decisions, PatchedRows, load_patch, save_patch
from fulltune.data.readers.files import has_data_suffix
from fulltune.errors import DataError, RecipeError, SetupError
from fulltune.files import replace_atomically
from fulltune.inference.store import to_json_value
from fulltune.recipe.address import is_fetched
from fulltune.recipe.fields import Recipe, resolve_paths
from fulltune.recipe.file import check_recipe, load_recipe
from fulltune.records.audit import AUDIT, HIGH_LOSS, Audit, Remedy, RowDecision, RowIssue, load_proofs
from fulltune.records.data import DataSummary
from fulltune.report.run.data_page import describe_remedy
from fulltune.tasks import Row
from fulltune.text import counted, did_you_mean, listed

KEYS = "[k]eep  [d]rop  [c]hange as proposed  [l]abel  [n]ot now  [u]ndo  [q]uit"
Issues = Sequence[RowIssue]


@dataclass(frozen=True)
class AuditRequest:
    labels: bool
    losses: bool
    prove: bool
    trainings: int
    """Number of seeds for training with and without each cleaning step, or 0 for no training."""
    checks: Sequence[str]
    """Checks whose cleaning steps are tried by training, or empty for all with enough rows."""

    def raise_if_unsuitable(self, target: Path) -> None:
        """Raise a `RecipeError` if the options do not suit the recipe or run folder `target`."""
        from fulltune.system import hardware, run_folder

        if self.trainings < 0 or self.trainings == 1:
            raise RecipeError(f"--trainings: found {self.trainings}, expected at least 2 seeds for each step")
        if self.checks and not self.trainings:
            raise RecipeError("--check: selects the steps that --trainings tries; add --trainings")
        if self.losses and not target.is_dir():
            raise RecipeError(f"--losses: needs a trained model; give a run folder instead of {target}")
        if self.losses:
            run_folder.load_trained_plan(run_folder.load_run_recipe(target), target, hardware.measure_machine())


def run_audit(recipe: Recipe, folder: Path, request: AuditRequest) -> None:
    """Run the data stage and the audit, and write the data page."""
    from fulltune.cleaning import check_proofs_possible, prove_by_classifiers, prove_by_training
    from fulltune.pipeline import Run, add_highest_losses, audit_rows
    from fulltune.report.run.data_page import write_data_page
    from fulltune.system import run_folder

    summary = stages.run_until(recipe, folder, "data", details=False).summary
    check_proofs_possible(recipe, summary, request.prove, request.trainings > 0)
    with (
        run_folder.explain_os_errors(folder),
        run_folder.lock_folder(folder),
        stages.progress_display(details=False) as display,
    ):
        job = Run(recipe, folder, listener=display)
        audit_rows(job, summary, request.labels)
        if request.losses:
            add_highest_losses(job, summary)
        if request.prove:
            prove_by_classifiers(job, summary)
        if request.trainings:
            prove_by_training(job, summary, request.trainings, request.checks)
        write_data_page(folder)


def print_audit(target: Path, folder: Path, as_json: bool) -> None:
    """Print the data and the audit's findings, or their records as JSON."""
    from fulltune.report.format import pages
    from fulltune.report.run.about_data import build_data_terminal_report
    from fulltune.report.run.data_page import audit_for_terminal

    summary, audit = DataSummary.of_run(folder), Audit.load(folder / "data" / AUDIT)
    proofs = load_proofs(folder, audit)
    if as_json:
        more = {
            "issues": audit.checks,
            "audit": str(folder / "data" / AUDIT),
            "proofs": [one.model_dump(mode="json") for one in proofs],
        }
        stages.print_json(summary.model_dump(mode="json") | more)
        return
    pages.print_parts(out, [*build_data_terminal_report(summary), *audit_for_terminal(audit, proofs)])
    out.print(f"report:  {escape(str(folder / 'data.html'))}", soft_wrap=True)
    if audit.checks:
        out.print(f"review:  fulltune data {escape(str(target))} --review", soft_wrap=True)


def write_decisions(
    target: Path, folder: Path, patch: Path | None, review: bool, accept: Sequence[str], as_json: bool
) -> None:
    """Write decisions about suspicious rows into `patch`, by default the recipe's patch or a file beside the recipe.

    With `accept`, the remedies of these checks are accepted. With `review`, the user decides on the terminal. Otherwise
    decisions stay open.
    """
    from fulltune.system.run_folder import load_run_recipe

    if not (review or accept):
        raise RecipeError("--patch: names the file to write decisions to; add --review or --accept")
    _raise_if_no_remedies(Audit.load(folder / "data" / AUDIT), accept)
    applied, issues, notes = load_run_recipe(folder).data.patch, load_issues(folder / "data"), list[str]()
    beside = target / "patch.jsonl" if target.is_dir() else target.with_suffix(".patch.jsonl")
    file = patch or Path(applied or beside)
    if not file.parent.is_dir():
        raise RecipeError(f"--patch: {file.parent}: there is no such folder")
    before = load_patch(file, "--patch") if file.exists() else {}
    if accept:
        decided, notes = accept_remedies(issues, accept, before)
    elif sys.stdin.isatty() and sys.stdout.isatty():
        import typer

        decided = review_rows(out, issues, file, before, typer.getchar, _make_label_prompt(DataSummary.of_run(folder)))
    else:
        decided = dict(before) | {one[0].key: make_open_decision(one) for one in list_undecided_rows(issues, before)}
    if decided != before:
        save_decisions(file, decided)
    if as_json:
        stages.print_json({"decisions": len(decided), "new": len(decided) - len(before), "patch": str(file)})
        return
    is_open = {key for key, one in decided.items() if one.is_open}
    new = sum(key not in before or before[key].is_open for key in decided.keys() - is_open)
    done = f"{len(decided) - len(is_open):,} decided, {len(is_open):,} open"
    lines = [f"{counted(new, 'new decision')}; in {file}: {done}", *notes]
    if decided and applied is None:
        # Paths in a recipe are relative to its folder.
        name = file.resolve() if target.is_dir() else os.path.relpath(file, target.parent)
        lines.append(f"to apply the decisions, add this to the recipe: data.patch: {name}")
    for line in lines:
        out.print(escape(line), soft_wrap=True)


def _raise_if_no_remedies(audit: Audit, accepted_checks: Sequence[str]) -> None:
    if HIGH_LOSS in accepted_checks:
        raise RecipeError(f"--accept: '{HIGH_LOSS}' has no remedy; use --review to read its rows")
    checks = {*audit.clean, *audit.checks}
    for check in (one for one in accepted_checks if one not in checks):
        if (why := audit.not_run.get(check)) is not None:
            raise RecipeError(f"--accept: the check '{check}' was not run: {why}")
        hint = did_you_mean(check, checks) or f"expected one of {listed(sorted(checks))}"
        raise RecipeError(f"--accept: there is no check '{check}'; {hint}")


def write_conversations(target: Path, overrides: Sequence[str], output: Path, has_other_options: bool) -> None:
    """Write the train files' rows of a recipe, run or data file as chat messages, and show three before and after."""
    from fulltune.data.convert import convert_row, find_roles
    from fulltune.data.remote.fetch import fetch_sources
    from fulltune.data.sources import find_source_files, read_source_rows
    from fulltune.system.run_folder import explain_os_errors, load_run_recipe
    from fulltune.train.hooks import Hooks

    is_file, written, refused = has_data_suffix(target) or is_fetched(target.name), 0, list[str]()
    if has_other_options or (overrides and is_file):
        raise RecipeError("--convert: only writes rows; remove the other options (for a recipe, --set can stay)")
    if output.suffix != ".jsonl" or output.exists() or not output.parent.is_dir():
        raise SetupError(f"--convert: {output}: expected the name of a new .jsonl file in an existing folder")
    values = {"model": "none", "task": "causal-lm", "data": {"train": str(target)}}
    recipe = resolve_paths(check_recipe(values, target), Path.cwd()) if is_file else None
    recipe = recipe or (load_run_recipe(target) if target.is_dir() else load_recipe(target, overrides))
    with stages.progress_display(details=False) as display, TemporaryDirectory() as new_run:
        remote = fetch_sources(recipe, target if target.is_dir() else Path(new_run), display)
    files = find_source_files(recipe, remote)["train"]
    patched = PatchedRows(load_patch(Path(recipe.data.patch)), "train") if recipe.data.patch else None
    source = read_source_rows(recipe, files, Hooks().with_named(recipe).preprocess, patched)
    roles = find_roles(recipe, source)
    with explain_os_errors(output), replace_atomically(output) as part, part.open("w", encoding="utf-8") as stream:
        for place, before in source.rows(None):
            try:
                after = convert_row(before, roles)
            except DataError as error:
                refused.append(f"{place}: {error}")
                continue
            stream.write(json.dumps(after, ensure_ascii=False, default=to_json_value) + "\n")
            if (written := written + 1) <= 3:
                _print_rows(place, before, after)
        if not written:
            raise DataError([*refused[:5], f"{source.where}: no row can be converted; name other columns or a file"])
    for line in [*refused[:5], f"{output}: {counted(written, 'row')} written, {len(refused):,} refused"]:
        out.print(escape(masked_text(line)), soft_wrap=True)


def _print_rows(place: str, before: Row, after: Row) -> None:
    for sign, name, cell in [*(("-", *one) for one in before.items()), *(("+", *one) for one in after.items())]:
        for part in cell if isinstance(cell, list) else [cell]:
            text = f"{sign} {place} {name}: {json.dumps(masked_cells(part), ensure_ascii=False, default=str)}"
            out.print(escape(text), no_wrap=True, overflow="ellipsis")


# ---- the review ---------------------------------------------------------------------------------------------------


def save_decisions(patch_file: Path, decided: Decisions) -> None:
    """Write a patch file, or raise a `SetupError` if it cannot be written."""
    try:
        save_patch(patch_file, decided.values())
    except OSError as error:
        reason = str(error.strerror or error).lower()
        raise SetupError(f"{patch_file}: cannot be written ({reason}); name another file with --patch") from None


def list_undecided_rows(issues: Iterable[RowIssue], decided: Decisions) -> list[Issues]:
    """Return the issues of each undecided row, rows with the most serious and certain issues first."""
    order, by_row = list(ABOUT), defaultdict[tuple[str, str], list[RowIssue]](list)
    for issue in sorted(issues, key=lambda issue: (order.index(issue.check), -issue.score)):
        if issue.key not in decided or decided[issue.key].is_open:
            by_row[issue.key].append(issue)
    return list(by_row.values())


def _proposed_change(issues: Issues) -> Remedy | None:
    return next((one.remedy for one in issues if one.remedy.action == "replace"), None)


def make_open_decision(issues: Issues) -> RowDecision:
    """Return an undecided decision with a proposed remedy, which the user will edit in the patch file."""
    reasons = "; ".join(f"{one.check}: {one.reason}" for one in issues)
    more = {"text": issues[0].text, "reason": reasons, "proposed": _proposed_change(issues) or Remedy(action="drop")}
    return issues[0].decision(Remedy(action="undecided")).model_copy(update=more)


def _make_label_prompt(summary: DataSummary) -> Callable[[], Remedy | None] | None:
    """Return a function that asks for a row's label, or None unless each row has its own label."""
    if not summary.form.one_label or "text" not in summary.columns:
        return None

    def ask_label() -> Remedy | None:
        value = out.input("  label: ").strip()
        is_meant = value in summary.labels or (value and out.input("  new label; type it again: ").strip() == value)
        return Remedy(action="replace", column=summary.columns["label"], value=value) if is_meant else None

    return ask_label


def review_rows(
    console: Console,
    issues: Issues,
    patch: Path,
    already_decided: Decisions,
    read_key: Callable[[], str],
    ask_label: Callable[[], Remedy | None] | None = None,
) -> dict[tuple[str, str], RowDecision]:
    """Ask the user about each undecided row, saving the patch after each key, and return all decisions by row key."""
    decided, waiting = dict(already_decided), list_undecided_rows(issues, already_decided)
    index, history = 0, list[int]()
    with suppress(EOFError):  # Ctrl-D quits
        while index < len(waiting):
            row_issues = waiting[index]
            change = _proposed_change(row_issues)
            keys = KEYS if ask_label is not None else KEYS.replace("[l]abel  ", "")
            keys = keys if change is not None else keys.replace("[c]hange as proposed  ", "")
            _print_issues_of_row(console, row_issues, f"{index + 1:,} of {len(waiting):,}", keys)
            match read_key():
                case "k":
                    remedy = Remedy(action="keep")
                case "d":
                    remedy = Remedy(action="drop")
                case "c" if change is not None:
                    remedy = change
                case "l" if ask_label is not None and (other := ask_label()) is not None:
                    remedy = other
                case "n":
                    index += 1
                    continue
                case "u":
                    if history:
                        index = history.pop()
                        decided.pop(waiting[index][0].key)
                        save_decisions(patch, decided)
                    continue
                case "q" | "\x03" | "\x1b":
                    break
                case _:
                    continue
            decided[row_issues[0].key] = row_issues[0].decision(remedy)
            history.append(index)
            save_decisions(patch, decided)
            index += 1
    return decided


def _print_issues_of_row(console: Console, issues: Issues, position: str, key_help: str) -> None:
    first, change = issues[0], _proposed_change(issues)
    lines = [f"\n[bold]{position}[/bold]  [dim]{escape(first.place)} ({first.split})[/dim]", f"  {escape(first.text)}"]
    lines += [f"  label: [bold]{escape(first.label)}[/bold]"] if first.label is not None else []
    lines += [f"  [yellow]{escape(one.check)}[/yellow]: {escape(one.reason)}" for one in issues]
    lines += [f"  proposed: [green]{escape(describe_remedy(change))}[/green]"] if change is not None else []
    for line in [*lines, f"  [dim]{escape(key_help)}[/dim]"]:
        console.print(line, highlight=False)


def accept_remedies(
    issues: Iterable[RowIssue], checks: Sequence[str], already_decided: Decisions
) -> tuple[dict[tuple[str, str], RowDecision], list[str]]:
    """Accept the remedies that `checks` proposed. Return old and new decisions by row key, and notes for the user."""
    decided, counts, more = dict(already_decided), Counter[str](), 0
    for row_issues in list_undecided_rows(issues, already_decided):
        wanted = [issue for issue in row_issues if issue.check in checks]
        if not wanted:
            continue
        # A row dropped by one check needs no other change.
        first = next((issue for issue in wanted if issue.remedy.action == "drop"), wanted[0])
        more += first.remedy.action == "replace" and any(issue.remedy != first.remedy for issue in wanted)
        counts[first.check] += 1
        decided[first.key] = first.decision(first.remedy)
    notes = [f"{check}: accepted the proposals for {counted(count, 'row')}" for check, count in counts.items()]
    if more:
        notes.append(f"more changes are proposed for {counted(more, 'row')}: apply the patch, then run this again")
    return decided, notes
