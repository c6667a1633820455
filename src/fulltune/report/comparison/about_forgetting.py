"""What the compared models could do before, where a budget for forgetting held them."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from fulltune.forgetting.frontier import BUDGETS, Apart, at_equal_metric, best_at, envelope
from fulltune.records.comparison import ArmRow, Comparison, Held
from fulltune.records.differences import Decision
from fulltune.records.forgetting import Preserved, limit_of
from fulltune.report.comparison.numbers import NOTHING, Writer
from fulltune.report.format import words
from fulltune.report.format.blocks import Bullets, Figures, Paragraph, Row, Section, Table, foreign
from fulltune.report.format.plots import Series, series_plot
from fulltune.text import counted, format_percent


def section(comparison: Comparison) -> Section | None:
    """The frontiers of the held methods, their certificates, and which one forgot less; None without a budget."""
    if not comparison.held:
        return None
    one = comparison.held[0].preserved
    about = (
        f"All of these runs had the budget {format_percent(one.budget)}; without one, methods may move generic "
        f"text farther. Metric and drift are those of the eval rows and of {counted(one.start.measured.texts, 'text')} "
        f"that chose among the points ({one.text}); certificates are about texts that nothing had read before."
    )
    blocks = (
        Bullets(tuple(answers(comparison.rows, comparison.decision, comparison.held).values())),
        _plot(comparison),
        _best(comparison),
        _certificates(comparison),
        Paragraph(about),
    )
    return Section("forgetting", "Forgetting", blocks)


def _runs_of(rows: Sequence[ArmRow], held: Sequence[Held]) -> dict[str, list[Held]]:
    """The held runs of each method, in the order of the table."""
    found = {row.arm: [one for one in held if one.arm == row.arm] for row in rows}
    return {arm: runs for arm, runs in found.items() if runs}


def _pairs(rows: Sequence[ArmRow], held: Sequence[Held]) -> Iterator[tuple[str, str, Apart | None]]:
    """Full fine-tuning beside each other held method."""
    full, runs = next((row.arm for row in rows if row.kind == "full"), None), _runs_of(rows, held)
    for arm in runs:
        if full is not None and full in runs and arm != full:
            sides = ([one.preserved for one in runs[name]] for name in (full, arm))
            yield full, arm, at_equal_metric(*sides)


def answers(rows: Sequence[ArmRow], decision: Decision, held: Sequence[Held]) -> dict[str, str]:
    """Of each held method beside full: at the same metric, which one has moved generic text less?"""
    write = Writer.of(decision)
    return {arm: _answer(write, held[0].preserved.writes, full, arm, found) for full, arm, found in _pairs(rows, held)}


def forgets_less(rows: Sequence[ArmRow], held: Sequence[Held], arm: str) -> bool | None:
    """Whether a method forgets less than full at the same metric; None: these runs do not tell."""
    found = next((found for _, other, found in _pairs(rows, held) if other == arm), None)
    return None if found is None or found.less is None else found.less == "second"


def _answer(write: Writer, writes: bool, full: str, arm: str, found: Apart | None) -> str:
    if found is None:
        return (
            f"{full} and {arm} cannot be compared at the same {write.name}: a run of theirs is nowhere better than the "
            "untouched model on the eval rows."
        )
    first, second, apart, error = (
        words.as_share(value, writes) for value in (found.first, found.second, abs(found.difference), found.error)
    )
    over = found.over if found.over != "texts" else "texts; the spread between seeds is not known"
    said = (
        f"At {write.name} {write.value(found.metric)} on the eval rows, the best that all runs of both reach, "
        f"{full} has moved generic text by {first}, {arm} by {second}: {full if found.difference > 0 else arm} by "
        f"{apart} more (standard error {error}, over {over}). On generic text"
    )
    match found.less:
        case "second":
            return f"{said} {arm} forgets less here: take it where that matters."
        case "first":
            return f"{said} {full} forgets less here: that is no reason to take {arm}."
    return f"{said} no difference can be told: let the metric and the costs decide, or train more seeds."


def _plot(comparison: Comparison) -> Figures:
    kinds, frontiers = {row.arm: row.kind for row in comparison.rows}, []
    for arm, runs in _runs_of(comparison.rows, comparison.held).items():
        points = tuple((point.measured.drift, point.metric) for one in runs for point in one.preserved.points)
        best = tuple(tuple((at.measured.drift, at.metric) for at in envelope(one.preserved)) for one in runs)
        taken = arm == comparison.decision.recommended
        frontiers.append(Series(arm, points, best, is_full=kinds[arm] == "full", filled=taken))
    limit = comparison.held[0].preserved.limit
    title = f"{words.metric_name(comparison.metric)} by drift on generic text"
    drawn = series_plot(title, frontiers, comparison.metric, "drift on generic text; dashed: the budget", limit)
    return Figures((drawn,), drawn_only=True)


def _best(comparison: Comparison) -> Table:
    write, rows = Writer.of(comparison.decision), list[Row]()
    for arm, runs in _runs_of(comparison.rows, comparison.held).items():
        found = [one.preserved for one in runs]
        at = ([best_at(one, limit_of(budget, one.writes)).metric for one in found] for budget in BUDGETS)
        rows.append((foreign(arm), *(write.value(statistics.mean(metrics)) for metrics in at)))
    header = ("method", *(f"at {format_percent(budget)}" for budget in BUDGETS))
    caption = f"Best {write.name} on the eval rows by drift, of the points that were tried; mean over seeds"
    return Table(caption, header, tuple(rows), frozenset(range(1, len(header))))


def _certificates(comparison: Comparison) -> Table:
    write = Writer.of(comparison.decision)
    rows: tuple[Row, ...] = tuple(
        (
            foreign(one.arm),
            str(one.seed),
            _certificate(one.preserved),
            NOTHING
            if (sealed := one.preserved.certificate) is None
            else words.as_share(sealed.upper, one.preserved.writes),
            words.way(one.preserved.chosen.share),
            write.value(one.preserved.chosen.metric),
        )
        for runs in _runs_of(comparison.rows, comparison.held).values()
        for one in runs
    )
    header = ("method", "seed", "certificate", "drift, at most", "kept", write.name)
    caption = "Certificates: the drift of what was kept, on sealed texts, is below this with 95%"
    return Table(caption, header, rows, frozenset({1, 3, 5}))


def _certificate(found: Preserved) -> str:
    label = words.certificate(found)
    return f"{label} (sealed texts read {len(found.opened)} times)" if len(found.opened) > 1 else label


def _upper_bound(found: Preserved) -> str:
    return NOTHING if found.certificate is None else words.as_share(found.certificate.upper, found.writes)
