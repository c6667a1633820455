"""The section about a search: what was tried, what was taken and why, what it cost and what it bought."""

from __future__ import annotations

import math

from fulltune.records.comparison import Search
from fulltune.records.search import Searched, TriedSettings
from fulltune.report.format import words
from fulltune.report.format.blocks import Block, Cell, Figures, Paragraph, Row, Section, Table
from fulltune.report.format.plots import rates_plot
from fulltune.report.run.read import RunView
from fulltune.report.run.verdict import bounds, difference
from fulltune.text import counted, format_metric, format_number, format_seconds, listed

NOTHING = "-"


def search(view: RunView) -> Section | None:
    """None for a run whose settings were not searched."""
    found = view.searched
    if found is None:
        return None
    blocks: list[Block] = [Paragraph(f"{_chosen(found)} {_bought(found)}")]
    if found.rate is not None:
        blocks += _rates(found, found.rate)
    else:
        blocks.append(_settings(found))
    return Section("search", "Search", (*blocks, Paragraph(_cost(found))))


def _chosen(found: Searched) -> str:
    if found.rate is not None:
        above = f" From {format_number(found.ceiling)} on, rates are too high for it." if found.ceiling else ""
        edge = " It lies at the edge of those tried: a better one may lie beyond." if found.rate.on_edge else ""
        return f"The learning rate is {format_number(found.rate.chosen)}: {found.rate.reason}.{above}{edge}"
    if not found.settings:
        return "The recipe's own settings are kept: no others were ahead of them by more than the eval rows can tell."
    said = listed([f"{name} {words.setting_value(value)}" for name, value in found.settings.items()])
    return f"The best of {counted(len(found.tried), 'whole run')} had {said}."


def _bought(found: Searched) -> str:
    """What it brought on rows that decided nothing."""
    usual = "the usual rate" if found.rate is not None else "the recipe's own settings"
    if found.bought is None:
        kept = not found.settings if found.rate is None else found.rate.chosen == found.rate.usual
        return f"The scores are those of a run with {usual}, without a search." if kept else ""
    name, ahead = found.metric_name, found.bought
    level, than = f"{100 * found.confidence:g}% interval", "as" if ahead.value == 0 else "than"
    return (
        f"On the test rows, which chose nothing, the {words.metric_name(name)} is {difference(name, ahead)} {than} "
        f"with {usual} ({level}: {bounds(name, ahead)})."
    )


def _rates(found: Searched, search: Search) -> list[Block]:
    """Rate against metric: short and whole runs."""
    name = found.metric_name
    short = {one.learning_rate: one.metric for one in search.tried}
    whole = {one.learning_rate: one.metric for one in search.whole}
    rows: list[Row] = []
    for rate in sorted({*short, *whole}):
        marks = [*["usual"] * (rate == search.usual), *["chosen"] * (rate == search.chosen)]
        values = (_metric(name, each[rate]) if rate in each else NOTHING for each in (short, whole))
        rows.append((format_number(rate), *values, ", ".join(marks)))
    if not rows:
        return []
    share = f"{search.tried[0].share:.0%} of the steps" if search.tried else "short"
    header = ("learning rate", f"short run ({share})", "whole run", "")
    said = words.metric_name(name)
    table = Table(f"Learning rates with their {said} on the eval rows", header, tuple(rows), frozenset({0, 1, 2}))
    series = (("short runs", short), ("whole runs", whole))
    title = f"{said} on the eval rows by learning rate"
    return [Figures((rates_plot(title, series, name, search.chosen),)), table]


def _settings(found: Searched) -> Table:
    names = list(found.own)
    rows = tuple(
        (
            *(_value(one, name, found) for name in names),
            Cell(one.problem, foreign=True) if one.problem else _metric(found.metric_name, one.metric),
            format_seconds(one.seconds),
            "chosen" if one.settings == found.settings else "",
        )
        for one in found.tried
    )
    said = words.metric_name(found.metric_name)
    caption = (
        f"Whole runs: the recipe's own settings, and {len(found.tried) - 1} of {found.num_combinations:,} combinations"
    )
    width = len(names)
    return Table(caption, (*names, f"{said} on the eval rows", "time", ""), rows, frozenset({width, width + 1}))


def _value(one: TriedSettings, name: str, found: Searched) -> Cell:
    if one.settings:
        return Cell(words.setting_value(one.settings[name]), foreign=True)
    return Cell(f"{words.setting_value(found.own[name])} (the recipe's own)", foreign=True)


def _metric(name: str, value: float) -> str:
    return "diverged" if math.isnan(value) else format_metric(name, value)


def _cost(found: Searched) -> str:
    took = f"The search took {format_seconds(found.seconds)}, {found.cost:.1f} times the run that was taken"
    late = "; its budget was used up before it ended: 'fulltune run' with a larger --budget and --fresh tries more"
    late *= found.time_was_up
    return f"{took}{late}. {found.eval_rows:,} eval rows chose."
