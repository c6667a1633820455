"""A comparison on the terminal, in 80 columns: what is about to be done, and what came out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fulltune.records.comparison import ArmRow, Comparison, Expectation, ManyTasks
from fulltune.records.differences import VerdictKind
from fulltune.report.comparison import about_forgetting, sentences
from fulltune.report.comparison import many_tasks as many
from fulltune.report.comparison.sentences import NOTHING, Writer
from fulltune.report.format import words
from fulltune.text import counted, format_bytes, format_number, format_seconds, is_share

_STYLES: dict[VerdictKind, str] = {
    "FULL": "bold blue",
    "PEFT": "bold green",
    "VARIANT": "bold green",
    "EQUIVALENT": "bold green",
    "UNDECIDED": "bold yellow",
}
_WIDEST_NAME = 14

Marked = tuple[str, str, str]
"""A label, its style, and a sentence."""


def expectation(console: Console, expected: Expectation, metric: str, margin: float | None = None) -> None:
    """Before it starts: what is compared, about how long, what it can find, what the budget took away.

    Args:
        console: Where to write.
        expected: As the design was settled.
        metric: That decides.
        margin: That the recipe asks for; left out, it is not compared with what can be found.
    """
    search, whose = "", "of each method"
    if expected.num_search_trials:
        search = f"{expected.num_search_trials} short ones to find the rates, more where the best is at an edge; then "
    if expected.sequential and expected.num_seeds > 1:
        whose = "of each method at most; clear answers need fewer"
        if expected.budget_seconds is not None:
            whose = f"of full and of the best of the others{', one of the rest' * (len(expected.arms) > 2)}"
    marks: list[Marked] = [
        ("methods", "dim", ", ".join(expected.arms)),
        ("trials", "dim", f"{search}{counted(expected.num_seeds, 'seed')} {whose}"),
        ("takes", "dim", _takes(expected)),
        ("can find", "dim", _can_find(expected, metric, margin)),
    ]
    marks += [("note" if expected.budget_seconds is None else "budget", "yellow", note) for note in expected.notes]
    if margin is not None and expected.detectable is not None and expected.detectable > margin:
        asked = Writer(metric, margin).amount(margin)
        more = f"{asked}, less than it can find: it may end UNDECIDED; more test rows or seeds would help"
        marks.append(("margin", "yellow", more))
    console.print(Text("comparison", style="bold"))
    console.print(_grid(marks))


def _takes(expected: Expectation) -> str:
    usual, most = format_seconds(expected.seconds), format_seconds(expected.most_seconds)
    if expected.budget_seconds is not None:
        given = format_seconds(expected.budget_seconds)
        return f"about {usual} of the {given} given; the rest is a reserve for errors of the forecast"
    return f"about {usual}" if usual == most else f"about {usual}, {most} if every method needs all seeds"


def _can_find(expected: Expectation, metric: str, margin: float | None) -> str:
    name = words.metric_name(metric)
    if expected.num_seeds < 2:
        return "nothing: one seed tells nothing about the spread between seeds"
    if expected.detectable is None:
        return f"not known before seeds have been run{'' if is_share(metric) else f': {name} is no share of rows'}"
    write = Writer(metric, margin or 0.01)
    if write.in_points and expected.detectable >= 1:
        return "nothing: with so few test rows and seeds any difference may be chance, however large"
    found = f"differences of {write.amount(expected.detectable)} of {name} or more if seeds differ by half a point"
    if expected.detectable_apart is not None:
        found += f", of {write.amount(expected.detectable_apart)} if they differ by two"
    return f"{found} (power 80 %)"


def verdict(console: Console, comparison: Comparison) -> None:
    """What came out: the verdict, the field, what makes it less fair."""
    for part in _parts(comparison):
        console.print(part)


def many_tasks(console: Console, found: ManyTasks) -> None:
    """Several tasks on one base: what a full model for each costs against parts side by side."""
    console.print(Text(f"\n{counted(len(found.tasks), 'task')} on one base", style="bold"))
    for header, rows in ((many.TASK_HEADER, many.task_rows(found)), (many.WAY_HEADER, many.way_rows(found))):
        table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
        for place, name in enumerate(header):
            table.add_column(Text(name), justify="right" if place and header is many.WAY_HEADER else "left")
        for row in rows:
            table.add_row(*map(Text, row))
        console.print(table)
        console.print()
    for sentence in many.summary(found):
        console.print(Text(words.one_line(sentence)))


def _parts(comparison: Comparison) -> Iterator[Any]:
    decision = comparison.decision
    yield Text("\n" + words.one_line(sentences.label(decision)), style=_STYLES[decision.verdict])
    yield Text(words.one_line(sentences.headline(comparison)), style="bold")
    yield Text(words.one_line(sentences.terms(comparison)) + "\n", style="dim")
    yield _quality(comparison)
    yield Text()
    yield _cost(comparison)
    yield Text(_legend(comparison) + "\n", style="dim")
    short = about_forgetting.in_short(comparison.rows, decision, comparison.held)
    if forgot := [("drift", "dim", line) for line in short.values()]:
        yield _grid(forgot)
        yield Text()
    if found := list(_findings(comparison)):
        yield _grid(found)
        yield Text()
    if claims := [(sentences.held(one.holds), "cyan", f"“{one.claim}”: {one.here}") for one in comparison.claims]:
        yield Text("common claims", style="bold")
        yield _grid(claims)
        yield Text()
    took, fixed = sentences.spent(comparison)
    yield _grid([("took", "dim", took), ("all seeds", "dim", fixed)])


def _findings(comparison: Comparison) -> Iterator[Marked]:
    """What to know before believing it."""
    for one in sentences.to_do(comparison):
        yield "what to do", "yellow", one
    for mark in sentences.marks(comparison):
        kind, _, what = mark.partition(": ")
        yield kind, "red" if kind == "Unfair" else "yellow", what
    for note in comparison.decision.notes:
        yield "note", "yellow", note
    if waited := sentences.waited(comparison):
        yield "note", "dim", waited


# ---- the field -------------------------------------------------------------------------------------------------


def _quality(comparison: Comparison) -> Table:
    write = Writer.of(comparison.decision)
    table = _table("updated", f"{write.name} [{sentences.level(comparison)}]", f"full better by{write.unit}", "seeds")
    for row in comparison.rows:
        share = row.num_trainable / row.num_parameters if row.num_parameters else 0.0
        seeds = str(len(row.seeds) or NOTHING)
        _add(
            table,
            row,
            comparison,
            sentences.fine_share(share),
            write.estimate(row.metric),
            sentences.behind_full(row, comparison),
            seeds,
        )
    return table


def _cost(comparison: Comparison) -> Table:
    full = sentences.full_of(comparison)

    table = _table("gain", "time", "time×", "FLOP×", "memory×", "saved", "drift")
    for row in comparison.rows:
        _add(
            table,
            row,
            comparison,
            NOTHING if row.gain_share is None else sentences.fine_share(row.gain_share),
            format_seconds(row.train_seconds) if row.train_seconds else NOTHING,
            *(
                sentences.to_full(row, full, field) or NOTHING
                for field in ("train_seconds", "train_flops", "memory_growth_bytes")
            ),
            format_bytes(row.saved_bytes) if row.saved_bytes else NOTHING,
            NOTHING if row.drift is None else format_number(row.drift.value),
        )
    return table


def _legend(comparison: Comparison) -> str:
    taken = "> the recommended method. " if comparison.decision.recommended else ""
    return (
        f"{taken}Difference: its interval holds for all methods together. Gain: of what full gains. "
        f"×: of full's; memory: what training adds. Drift: {comparison.drift_unit}, on generic text."
    )


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("method", no_wrap=True, max_width=_WIDEST_NAME + 2)
    for name in columns:
        table.add_column(Text(name), justify="right", no_wrap=True)
    return table


def _add(table: Table, row: ArmRow, comparison: Comparison, *cells: str) -> None:
    taken = row.arm == comparison.decision.recommended
    name = words.one_line(row.arm)
    name = name if len(name) <= _WIDEST_NAME else name[: _WIDEST_NAME - 1] + "…"
    texts = (Text(f"{'>' if taken else ' '} {name}"), *map(Text, cells))
    table.add_row(*texts, style="bold" if taken else None)


def _grid(marks: Sequence[Marked]) -> Table:
    """Sentences beside their labels, the lines of one under each other."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for label, style, sentence in marks:
        table.add_row(Text(label, style=style), Text(words.one_line(sentence)))
    return table
