"""`fulltune data --review`: suspicious rows one after the other, each decided with a key, kept in a patch file."""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from fulltune.data.patch import Decisions, load_patch, save_patch
from fulltune.errors import SetupError
from fulltune.records.audit import Remedy, RowDecision, RowIssue
from fulltune.report.run.data_page import could_do
from fulltune.text import counted, format_percent

FIRST = (
    "label error",
    "class names",
    "conflicting labels",
    "doubtful label",
    "leak",
    "near leak",
    "secret",
    "personal data",
    "phone number",
    "outlier",
    "duplicate",
)
"""Checks whose rows are asked about before those of all others: what they find costs most."""
MEASURED = 50
"""Decisions about a check that say how often it is right."""
KEYS = "[k]eep it  [d]rop  [c]hange as proposed  [l]abel  [n]ot now  [u]ndo  [q]uit"


@dataclass(frozen=True)
class UnderReview:
    """A row that is asked about, with all that was found in it."""

    issues: tuple[RowIssue, ...]

    @property
    def key(self) -> tuple[str, str]:
        """As of its decision."""
        return self.issues[0].key

    @property
    def change(self) -> Remedy | None:
        """What is proposed to be changed."""
        return next((one.remedy for one in self.issues if one.remedy.action == "replace"), None)

    def decided(self, remedy: Remedy) -> RowDecision:
        """The line of a patch file."""
        first = self.issues[0]
        return RowDecision(row=first.row, remedy=remedy, source=first.source, check=first.check, place=first.place)

    def to_decide(self) -> RowDecision:
        """The line of a patch file that is to be decided about in the file."""
        first, more = self.issues[0], {"proposed": self.change or Remedy(action="drop")}
        reasons = "; ".join(f"{one.check}: {one.reason}" for one in self.issues)
        open_one = self.decided(Remedy(action="undecided"))
        return open_one.model_copy(update={"text": first.text, "reason": reasons, **more})


def decided_before(patch: Path) -> Decisions:
    """What a file holds already.

    Raises:
        DataError: When it is there and is no patch.
    """
    return load_patch(patch, "--patch") if patch.exists() else {}


def save(patch: Path, decided: Decisions) -> None:
    """Write a patch file.

    Raises:
        SetupError: When it cannot be written.
    """
    try:
        save_patch(patch, decided.values())
    except OSError as error:
        reason = str(error.strerror or error).lower()
        raise SetupError(f"{patch}: cannot be written ({reason}); name another file (--patch)") from None


def queue(issues: Iterable[RowIssue], decided: Decisions) -> list[UnderReview]:
    """The rows to ask about, the costliest and surest first; without those that were decided already."""
    by_row = defaultdict[tuple[str, str], list[RowIssue]](list)
    for issue in sorted(issues, key=_order):
        if issue.key not in decided or decided[issue.key].is_open:
            by_row[issue.key].append(issue)
    return [UnderReview(tuple(them)) for them in by_row.values()]


def _order(issue: RowIssue) -> tuple[int, str, float]:
    return FIRST.index(issue.check) if issue.check in FIRST else len(FIRST), issue.check, -issue.score


def review(
    console: Console,
    issues: Sequence[RowIssue],
    patch: Path,
    before: Decisions,
    ask: Callable[[], str] | None,
    relabel: Callable[[], Remedy | None] | None = None,
) -> dict[tuple[str, str], RowDecision]:
    """Ask about each row; what was decided is in the file after each key.

    Args:
        console: What the rows are shown on.
        issues: Of the audit.
        patch: The file.
        before: What it holds already.
        ask: Gives the next key; None: there is no terminal, and all rows are written down to be decided in the file.
        relabel: Asks for another label than what is proposed; None: the rows have not one each in a column.
    """
    decided, waiting = dict(before), queue(issues, before)
    if ask is None:
        return decided | {one.key: one.to_decide() for one in waiting}
    place, history = 0, list[int]()
    keys = KEYS if relabel is not None else KEYS.replace("[l]abel  ", "")
    with suppress(EOFError):  # Ctrl-D: as q
        while place < len(waiting):
            one = waiting[place]
            _show(console, one, place, len(waiting), keys)
            match ask():
                case "k":
                    remedy = Remedy(action="keep")
                case "d":
                    remedy = Remedy(action="drop")
                case "c" if one.change is not None:
                    remedy = one.change
                case "l" if relabel is not None and (change := relabel()) is not None:
                    remedy = change
                case "n":
                    place += 1
                    continue
                case "u":
                    if history:
                        place = history.pop()
                        decided.pop(waiting[place].key)
                        save(patch, decided)
                    continue
                case "q" | "\x03" | "\x1b":
                    break
                case _:
                    console.print(keys, markup=False)
                    continue
            decided[one.key] = one.decided(remedy)
            history.append(place)
            save(patch, decided)
            place += 1
    return decided


def accepted(
    issues: Sequence[RowIssue], checks: Sequence[str], before: Decisions
) -> tuple[dict[tuple[str, str], RowDecision], list[str]]:
    """What is proposed for all rows of some checks, taken; what was decided before stays.

    Returns:
        All decisions, and what to say about them.
    """
    decided, taken, more = dict(before), Counter[str](), 0
    for one in queue(issues, before):
        wanted = [issue for issue in one.issues if issue.check in checks]
        if not wanted:
            continue
        # Left out by one check, a row needs no other change.
        first = next((issue for issue in wanted if issue.remedy.action == "drop"), wanted[0])
        more += first.remedy.action == "replace" and any(issue.remedy != first.remedy for issue in wanted)
        taken[first.check] += 1
        decided[one.key] = UnderReview((first,)).decided(first.remedy)
    said = [f"{check}: {counted(count, 'row')}, as proposed" for check, count in taken.items()]
    if more:
        said.append(f"{counted(more, 'row')} with another change as well: apply the patch, and run this once more")
    return decided, said


def _show(console: Console, asked: UnderReview, place: int, count: int, keys: str) -> None:
    first = asked.issues[0]
    console.print(f"\n[bold]{place + 1:,} of {count:,}[/bold]  [dim]{escape(first.place)} ({first.split})[/dim]")
    console.print(f"  {escape(first.text)}", highlight=False)
    if first.label is not None:
        console.print(f"  label: [bold]{escape(first.label)}[/bold]", highlight=False)
    for issue in asked.issues:
        console.print(f"  [yellow]{escape(issue.check)}[/yellow]: {escape(issue.reason)}", highlight=False)
    if asked.change is not None:
        console.print(f"  proposed: [green]{escape(could_do(asked.change))}[/green]", highlight=False)
    keys = keys if asked.change is not None else keys.replace("[c]hange as proposed  ", "")
    console.print(f"  {keys}", markup=False, style="dim")


def precisions(decided: Iterable[RowDecision]) -> list[str]:
    """How often each check was right, by what was decided about its rows: the first ones alone."""
    from scipy.stats import binomtest

    found = defaultdict[str, list[bool]](list)
    for one in decided:
        if one.check and not one.is_open:
            found[one.check].append(one.remedy.action != "keep")
    said = []
    for check, right in found.items():
        first = right[:MEASURED]
        span = binomtest(sum(first), len(first)).proportion_ci(method="wilson")
        low, high = format_percent(float(span.low)), format_percent(float(span.high))
        said.append(f"{check}: {sum(first)} of {len(first)} rows changed or left out (95 % interval: {low} to {high})")
    return said


def keys() -> Callable[[], str] | None:
    """Reads a key; None: without a terminal."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return None
    import typer

    return typer.getchar
