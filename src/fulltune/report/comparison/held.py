"""How far the compared models moved generic text, and which forgot less where a budget for forgetting held them."""

from __future__ import annotations

from fulltune.forgetting.budget import Apart, at_equal_metric, envelope
from fulltune.records.comparison import ArmRow, Comparison
from fulltune.records.held import HeldRun
from fulltune.report.comparison.numbers import NOTHING, Writer
from fulltune.report.format import words
from fulltune.report.format.blocks import Bullets, Figures, Paragraph, Row, Section, Table, foreign
from fulltune.report.format.plots import Series, series_plot
from fulltune.text import counted, format_number, format_percent

COLUMN = "drift"


def cell(row: ArmRow) -> str:
    """Of the column in the table of methods."""
    return NOTHING if row.moved is None else format_number(row.moved.value)


def about_column(comparison: Comparison) -> str:
    """What the column is, for the table's caption."""
    return f"Drift: {comparison.moved_unit} on generic text"


def fact(comparison: Comparison) -> tuple[str, str]:
    """What was measured, and on which texts."""
    return COLUMN, f"{comparison.moved_unit} against the untouched model, on {comparison.generic_text}"


def section(comparison: Comparison) -> Section | None:
    """The frontiers of the held methods, their certificates, and which one forgot less; None without a budget."""
    if not comparison.held:
        return None
    one = _first(comparison)
    about = (
        f"All of these runs had the budget {format_percent(one.budget)}; without one, methods may move generic "
        f"text farther. Metric and drift are those of the eval rows and of {counted(one.start.measured.texts, 'text')} "
        f"that chose among the points ({one.text}); certificates are about texts that nothing had read before."
    )
    blocks = (
        Bullets(answers(comparison)),
        _plot(comparison),
        _certificates(comparison),
        Paragraph(about),
    )
    return Section("forgetting", "Forgetting", blocks)


def in_short(comparison: Comparison) -> Section | None:
    """What of it stands in the terminal."""
    found = answers(comparison)
    return Section("forgetting", "Forgetting", (Bullets(found),)) if found else None


def _first(comparison: Comparison) -> HeldRun:
    return next(one for runs in comparison.held.values() for one in runs.values())


def answers(comparison: Comparison) -> tuple[str, ...]:
    """Of each held method beside full: at the same metric, which one has moved generic text less?"""
    write, held = Writer.of(comparison.decision), comparison.held
    full = next((row.arm for row in comparison.rows if row.kind == "full"), "")
    if full not in held:
        return ()
    mine, writes = list(held[full].values()), _first(comparison).writes
    others = {arm: list(runs.values()) for arm, runs in held.items() if arm != full}
    return tuple(_answer(write, writes, full, arm, at_equal_metric(mine, runs)) for arm, runs in others.items())


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
    for arm, runs in comparison.held.items():
        points = tuple((point.measured.drift, point.metric) for one in runs.values() for point in one.points)
        best = tuple(tuple((at.measured.drift, at.metric) for at in envelope(one)) for one in runs.values())
        taken = arm == comparison.decision.recommended
        frontiers.append(Series(arm, points, best, is_full=kinds[arm] == "full", filled=taken))
    limit = _first(comparison).limit
    title = f"{words.metric_name(comparison.decision.metric)} by drift on generic text"
    drawn = series_plot(
        title, frontiers, comparison.decision.metric, "drift on generic text; dashed: the budget", limit
    )
    return Figures((drawn,), drawn_only=True)


def _certificates(comparison: Comparison) -> Table:
    write = Writer.of(comparison.decision)
    rows: tuple[Row, ...] = tuple(
        (
            foreign(arm),
            str(seed),
            _certificate(one),
            NOTHING if one.certificate is None else words.as_share(one.certificate.upper, one.writes),
            words.way(one.chosen.share),
            write.value(one.chosen.metric),
        )
        for arm, runs in comparison.held.items()
        for seed, one in runs.items()
    )
    header = ("method", "seed", "certificate", "drift, at most", "kept", write.name)
    caption = "Certificates: the drift of what was kept, on sealed texts, is below this with 95%"
    return Table(caption, header, rows, frozenset({1, 3, 5}))


def _certificate(found: HeldRun) -> str:
    label = words.certificate(found)
    return f"{label} (sealed texts read {len(found.opened)} times)" if len(found.opened) > 1 else label
