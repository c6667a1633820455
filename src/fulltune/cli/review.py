"""`fulltune data --review`: suspicious rows one after the other, each decided with a key, kept in a patch file."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from fulltune.data.patch import load_patch, save_patch
from fulltune.errors import RecipeError, SetupError
from fulltune.records.audit import Remedy, RowDecision, RowIssue
from fulltune.report.run.data_page import could_do
from fulltune.text import counted, format_percent

FIRST = (
    "label error",
    "conflicting labels",
    "doubtful label",
    "leak",
    "near leak",
    "paraphrase leak",
    "secret",
    "personal data",
    "phone number",
    "duplicate",
)
"""Checks whose rows are asked about before those of all others: what they find costs most."""
MEASURED = 50
"""Decisions about a check that say how often it is right."""
KEYS = "[k]eep  [d]rop  [c]hange as proposed  [n]ext  [u]ndo  [q]uit"


@dataclass(frozen=True)
class UnderReview:
    """A row that is asked about, with all that was found in it."""

    row: str
    issues: tuple[RowIssue, ...]

    @property
    def change(self) -> Remedy | None:
        """What is proposed to be changed."""
        return next((one.remedy for one in self.issues if one.remedy.action == "replace"), None)

    def decided(self, remedy: Remedy) -> RowDecision:
        """The line of a patch file."""
        first = self.issues[0]
        return RowDecision(row=self.row, remedy=remedy, check=first.check, place=first.place)


def queue(issues: Iterable[RowIssue], decided: Mapping[str, RowDecision]) -> list[UnderReview]:
    """The rows to ask about, the costliest and surest first; without those that were decided already."""
    by_row = defaultdict[str, list[RowIssue]](list)
    for issue in sorted(issues, key=_order):
        if issue.row not in decided:
            by_row[issue.row].append(issue)
    return [UnderReview(row, tuple(them)) for row, them in by_row.items()]


def _order(issue: RowIssue) -> tuple[int, str, float]:
    return FIRST.index(issue.check) if issue.check in FIRST else len(FIRST), issue.check, -issue.score


def review(
    console: Console, issues: Sequence[RowIssue], patch: Path, ask: Callable[[], str] | None
) -> dict[str, RowDecision]:
    """Ask about each row; what was decided is in the file after each key.

    Args:
        console: What the rows are shown on.
        issues: Of the audit.
        patch: The file; decisions that it holds already are kept.
        ask: Gives the next key; None: there is no terminal, and the rows to ask about are written into the file as
            kept, to be edited there.

    Raises:
        DataError: When the file is there and is no patch.
        SetupError: Without a terminal, when the file is there already.
    """
    decided = load_patch(patch, "--patch") if patch.exists() else {}
    waiting = queue(issues, decided)
    if ask is None:
        if decided:
            raise SetupError(
                f"{patch}: is there already, and without a terminal nothing can be asked; edit it, or remove it"
            )
        kept = {one.row: one.decided(Remedy(action="keep")) for one in waiting}
        save_patch(patch, kept.values())
        return kept
    place, history = 0, list[str]()
    while place < len(waiting):
        _show(console, waiting[place], place, len(waiting))
        match ask():
            case "k":
                remedy: Remedy | None = Remedy(action="keep")
            case "d":
                remedy = Remedy(action="drop")
            case "c" if waiting[place].change is not None:
                remedy = waiting[place].change
            case "n":
                place += 1
                continue
            case "u":
                if history:
                    row = history.pop()
                    del decided[row]
                    save_patch(patch, decided.values())
                    place = next(at for at, one in enumerate(waiting) if one.row == row)
                continue
            case "q" | "\x03" | "\x04" | "\x1b":
                break
            case _:
                console.print(KEYS, markup=False)
                continue
        assert remedy is not None
        one = waiting[place]
        decided[one.row] = one.decided(remedy)
        history.append(one.row)
        save_patch(patch, decided.values())
        place += 1
    return decided


def accepted(issues: Sequence[RowIssue], checks: Sequence[str], patch: Path) -> dict[str, RowDecision]:
    """Take what is proposed for all rows of some checks into the file; what it has decided already stays.

    Raises:
        RecipeError: When a check found nothing, or there is none of that name.
    """
    known = {issue.check for issue in issues}
    if unknown := [check for check in checks if check not in known]:
        found = ", ".join(f"'{check}'" for check in sorted(known))
        raise RecipeError(f"--accept: '{unknown[0]}' found no row; expected one of {found}")
    decided = load_patch(patch, "--patch") if patch.exists() else {}
    for asked in queue(issues, decided):
        first = next((issue for issue in asked.issues if issue.check in checks), None)
        if first is not None:
            decided[asked.row] = RowDecision(row=asked.row, remedy=first.remedy, check=first.check, place=first.place)
    save_patch(patch, decided.values())
    return decided


def _show(console: Console, asked: UnderReview, place: int, count: int) -> None:
    first = asked.issues[0]
    console.print(f"\n[bold]{place + 1:,} of {count:,}[/bold]  [dim]{escape(first.place)} ({first.split})[/dim]")
    console.print(f"  {escape(first.text)}", highlight=False)
    if first.label is not None:
        console.print(f"  label: [bold]{escape(first.label)}[/bold]", highlight=False)
    for issue in asked.issues:
        console.print(f"  [yellow]{escape(issue.check)}[/yellow]: {escape(issue.reason)}", highlight=False)
    if asked.change is not None:
        console.print(f"  proposed: [green]{escape(could_do(asked.change))}[/green]", highlight=False)
    keys = KEYS if asked.change is not None else KEYS.replace("[c]hange as proposed  ", "")
    console.print(f"  {keys}", markup=False, style="dim")


def precision_of(decided: Iterable[RowDecision]) -> dict[str, tuple[int, int]]:
    """Check to how many of its rows were changed or left out, of how many decided: the first ones alone."""
    found = defaultdict[str, list[bool]](list)
    for one in decided:
        if one.check:
            found[one.check].append(one.remedy.action != "keep")
    return {check: (sum(right[:MEASURED]), len(right[:MEASURED])) for check, right in found.items()}


def about(decided: Mapping[str, RowDecision], patch: Path) -> list[str]:
    """What came of a review."""
    from scipy.stats import binomtest

    lines = [f"{counted(len(decided), 'decision')} in {patch}"]
    for check, (right, of) in precision_of(decided.values()).items():
        span = binomtest(right, of).proportion_ci(method="wilson")
        low, high = format_percent(float(span.low)), format_percent(float(span.high))
        lines.append(f"{check}: right in {right} of {of} (95 % interval: {low} to {high})")
    return [*lines, f"apply it by the recipe's line data.patch: {patch}"]


def keys() -> Callable[[], str] | None:
    """Reads a key; None: without a terminal."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return None
    import typer

    return typer.getchar
