"""The section about what the compared models could do before, where a budget for forgetting held them."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from fulltune.forgetting.frontier import BUDGETS, Apart, at_equal_metric, best_at, envelope
from fulltune.records.comparison import Comparison, Held
from fulltune.records.forgetting import Preserved, limit_of
from fulltune.report.comparison.sentences import NOTHING, Writer, full_of
from fulltune.report.format import words
from fulltune.report.format.blocks import Bullets, Figure, Figures, Paragraph, Row, Section, Table, foreign
from fulltune.report.format.frontiers import Frontier, frontiers_plot
from fulltune.text import counted, format_percent

_NAME_LETTERS = 8
"""Of a method, in the terminal's line."""


def section(comparison: Comparison) -> Section | None:
    """The frontiers of the held methods, their certificates, and which one forgot less; None without a budget."""
    if not comparison.held:
        return None
    one = comparison.held[0].preserved
    title, texts = f"{words.metric_name(comparison.metric)} by drift on generic text", one.start.measured.texts
    drawn = frontiers_plot(title, list(_frontiers(comparison)), one.limit, comparison.metric)
    blocks = (
        Bullets(tuple(answers(comparison).values())),
        Figures((Figure(drawn, title, "the table has it in numbers."),), drawn_only=True),
        _best(comparison),
        _certificates(comparison),
        Paragraph(
            f"All of these runs had the budget {format_percent(one.budget)}; without one, methods may move generic "
            f"text farther. Metric and drift are those of the eval rows and of {counted(texts, 'text')} "
            f"that chose among the points ({one.text}); certificates are about texts that nothing had read before."
        ),
    )
    return Section("forgetting", "Forgetting", blocks)


def runs_of(comparison: Comparison) -> dict[str, list[Held]]:
    """The held runs of each method, in the order of the table."""
    found = {row.arm: [one for one in comparison.held if one.arm == row.arm] for row in comparison.rows}
    return {arm: runs for arm, runs in found.items() if runs}


# ---- which one forgot less -------------------------------------------------------------------------------------


def _pairs(comparison: Comparison) -> Iterator[tuple[str, str, Apart | None]]:
    """Full fine-tuning beside each other held method."""
    full, runs = full_of(comparison), runs_of(comparison)
    for arm in runs:
        if full is not None and full.arm in runs and arm != full.arm:
            sides = ([one.preserved for one in runs[name]] for name in (full.arm, arm))
            yield full.arm, arm, at_equal_metric(*sides)


def answers(comparison: Comparison) -> dict[str, str]:
    """Of each held method beside full: at the same metric, which one has moved generic text less?"""
    return {arm: _answer(comparison, full, arm, found) for full, arm, found in _pairs(comparison)}


def forgets_less(comparison: Comparison, arm: str) -> bool | None:
    """Whether a method forgets less than full at the same metric; None: these runs do not tell."""
    found = next((found for _, other, found in _pairs(comparison) if other == arm), None)
    return None if found is None or found.less is None else found.less == "second"


def _answer(comparison: Comparison, full: str, arm: str, found: Apart | None) -> str:
    write, writes = Writer.of(comparison.decision), comparison.held[0].preserved.writes
    if found is None:
        return (
            f"{full} and {arm} cannot be compared at the same {write.name}: a run of theirs is nowhere better than the "
            "untouched model on the eval rows."
        )
    more, apart = (full if found.difference > 0 else arm), words.as_share(abs(found.difference), writes)
    over = found.over if found.over != "texts" else "texts; the spread between seeds is not known"
    said = (
        f"At {write.name} {write.value(found.metric)} on the eval rows, the best that all runs of both reach, "
        f"{full} has moved generic text by {words.as_share(found.first, writes)}, {arm} by "
        f"{words.as_share(found.second, writes)}: "
        f"{more} by {apart} more (standard error {words.as_share(found.error, writes)}, over {over})."
    )
    match found.less:
        case "second":
            return f"{said} {arm} forgets less here: take it where what the model could do before matters."
        case "first":
            return f"{said} {full} forgets less here: what the model could do before is no reason to take {arm}."
    return f"{said} No difference can be told: let the metric and the costs decide, or train more seeds."


def in_short(comparison: Comparison) -> dict[str, str]:
    """The same in a line of at most 73 columns each, for the terminal; ±: standard error."""
    return {arm: _short(comparison, full, arm, found) for full, arm, found in _pairs(comparison)}


def _short(comparison: Comparison, full: str, arm: str, found: Apart | None) -> str:
    names = map(words.one_line, (full, arm))
    first, second = (one if len(one) <= _NAME_LETTERS else f"{one[: _NAME_LETTERS - 1]}…" for one in names)
    if found is None:
        return f"{first}, {second}: not comparable, one is no better than untouched"
    writes = comparison.held[0].preserved.writes
    answer = {"first": f"{first} less", "second": f"{second} less", None: "no telling"}[found.less]
    one, other, error = (words.as_share(value, writes) for value in (found.first, found.second, found.error))
    value = Writer.of(comparison.decision).value(found.metric)
    return f"at {value}: {first} {one}, {second} {other}, ±{error}: {answer}"


# ---- frontiers and certificates --------------------------------------------------------------------------------


def _frontiers(comparison: Comparison) -> Iterator[Frontier]:
    full = full_of(comparison)
    for arm, runs in runs_of(comparison).items():
        yield Frontier(
            name=arm,
            is_full=full is not None and arm == full.arm,
            filled=arm == comparison.decision.recommended,
            points=tuple(_places(one.preserved) for one in runs),
            best=tuple(tuple((at.measured.drift, at.metric) for at in envelope(one.preserved)) for one in runs),
        )


def _places(found: Preserved) -> tuple[tuple[float, float], ...]:
    return tuple((point.measured.drift, point.metric) for point in found.points)


def _best(comparison: Comparison) -> Table:
    write, rows = Writer.of(comparison.decision), list[Row]()
    for arm, runs in runs_of(comparison).items():
        found = [one.preserved for one in runs]
        at = ([best_at(one, limit_of(budget, one.writes)).metric for one in found] for budget in BUDGETS)
        rows.append((foreign(arm), *(write.value(statistics.mean(metrics)) for metrics in at)))
    header = ("method", *(f"at {format_percent(budget)}" for budget in BUDGETS))
    caption = f"Best {write.name} on the eval rows by drift, of the points that were tried; mean over seeds"
    return Table(caption, header, tuple(rows), frozenset(range(1, len(header))))


def _certificates(comparison: Comparison) -> Table:
    write = Writer.of(comparison.decision)
    rows = tuple(
        (foreign(one.arm), str(one.seed), *_certificate(one.preserved), write.value(one.preserved.chosen.metric))
        for runs in runs_of(comparison).values()
        for one in runs
    )
    header = ("method", "seed", "certificate", "drift, at most", "kept", write.name)
    caption = "Certificates: the drift of what was kept, on sealed texts, is below this with 95%"
    return Table(caption, header, rows, frozenset({1, 3, 5}))


def _certificate(found: Preserved) -> tuple[str, str, str]:
    again = f" (opened {len(found.opened)} times)" if len(found.opened) > 1 else ""
    sealed = found.certificate
    upper = NOTHING if sealed is None else words.as_share(sealed.upper, found.writes)
    return f"{words.certificate(found)}{again}", upper, words.way(found.chosen.kind, found.chosen.share)
