"""A comparison on the terminal before it starts: what is compared, about how long, and what it can find."""

from __future__ import annotations

from fulltune.records.comparison import Expectation
from fulltune.report.comparison.numbers import Writer
from fulltune.report.format import words
from fulltune.report.format.blocks import Facts, Section
from fulltune.text import counted, format_seconds, is_share


def expectation(expected: Expectation, metric: str, margin: float | None = None) -> Section:
    """What a design costs, can find and leaves out for its budget.

    Args:
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
    usual, most = format_seconds(expected.seconds), format_seconds(expected.most_seconds)
    takes = f"about {usual}" if usual == most else f"about {usual}, {most} if every method needs all seeds"
    if expected.budget_seconds is not None:
        given = format_seconds(expected.budget_seconds)
        takes = f"about {usual} of the {given} given; the rest is a reserve for errors of the forecast"
    rows = [
        ("methods", ", ".join(expected.arms)),
        ("trials", f"{search}{counted(expected.num_seeds, 'seed')} {whose}"),
        ("takes", takes),
        ("can find", _can_find(expected, metric, margin)),
        *(("note" if expected.budget_seconds is None else "budget", note) for note in expected.notes),
    ]
    if margin is not None and expected.detectable is not None and expected.detectable > margin:
        asked = Writer(metric, margin).amount(margin)
        more = f"{asked}, less than it can find: it may end UNDECIDED; more test rows or seeds would help"
        rows.append(("margin", more))
    return Section("comparison", "comparison", (Facts(tuple(rows)),))


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
