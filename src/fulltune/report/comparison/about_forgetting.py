"""The section about what the compared models could do before, where a budget for forgetting held them."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from fulltune.forgetting.frontier import BUDGETS, Apart, at_equal_metric, best_at, envelope
from fulltune.records.comparison import ArmRow, Comparison, Held
from fulltune.records.differences import Decision
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
            f"{_on_task(one)}"
        ),
    )
    return Section("forgetting", "Forgetting", blocks)


def runs_of(rows: Sequence[ArmRow], held: Sequence[Held]) -> dict[str, list[Held]]:
    """The held runs of each method, in the order of the table."""
    found = {row.arm: [one for one in held if one.arm == row.arm] for row in rows}
    return {arm: runs for arm, runs in found.items() if runs}


# ---- which one forgot less -------------------------------------------------------------------------------------


def _pairs(rows: Sequence[ArmRow], held: Sequence[Held]) -> Iterator[tuple[str, str, Apart | None]]:
    """Full fine-tuning beside each other held method."""
    full, runs = next((row.arm for row in rows if row.kind == "full"), None), runs_of(rows, held)
    for arm in runs:
        if full is not None and full in runs and arm != full:
            sides = ([one.preserved for one in runs[name]] for name in (full, arm))
            yield full, arm, at_equal_metric(*sides)


def answers(comparison: Comparison) -> dict[str, str]:
    """Of each held method beside full: at the same metric, which one has moved generic text less?"""
    return {arm: _answer(comparison, full, arm, found) for full, arm, found in _pairs(comparison.rows, comparison.held)}


def forgets_less(rows: Sequence[ArmRow], held: Sequence[Held], arm: str) -> bool | None:
    """Whether a method forgets less than full at the same metric; None: these runs do not tell."""
    found = next((found for _, other, found in _pairs(rows, held) if other == arm), None)
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
            return f"{said} On generic text {arm} forgets less here: take it where that matters."
        case "first":
            return f"{said} On generic text {full} forgets less here: that is no reason to take {arm}."
    return (
        f"{said} On generic text no difference can be told: let the metric and the costs decide, or train more seeds."
    )


def in_short(rows: Sequence[ArmRow], decision: Decision, held: Sequence[Held]) -> dict[str, str]:
    """The same in a line of at most 73 columns each, for the terminal; ±: standard error."""
    write = Writer.of(decision)
    return {arm: _short(write, held[0].preserved.writes, full, arm, found) for full, arm, found in _pairs(rows, held)}


def _short(write: Writer, writes: bool, full: str, arm: str, found: Apart | None) -> str:
    names = map(words.one_line, (full, arm))
    first, second = (one if len(one) <= _NAME_LETTERS else f"{one[: _NAME_LETTERS - 1]}…" for one in names)
    if found is None:
        return f"{first}, {second}: not comparable, one is no better than untouched"
    answer = {"first": f"{first} less", "second": f"{second} less", None: "no telling"}[found.less]
    one, other, error = (words.as_share(value, writes) for value in (found.first, found.second, found.error))
    return f"at {write.value(found.metric)}: {first} {one}, {second} {other}, ±{error}: {answer}"


# ---- frontiers and certificates --------------------------------------------------------------------------------


def _frontiers(comparison: Comparison) -> Iterator[Frontier]:
    full = full_of(comparison)
    for arm, runs in runs_of(comparison.rows, comparison.held).items():
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
    for arm, runs in runs_of(comparison.rows, comparison.held).items():
        found = [one.preserved for one in runs]
        at = ([best_at(one, limit_of(budget, one.writes)).metric for one in found] for budget in BUDGETS)
        rows.append((foreign(arm), *(write.value(statistics.mean(metrics)) for metrics in at)))
    header = ("method", *(f"at {format_percent(budget)}" for budget in BUDGETS))
    caption = f"Best {write.name} on the eval rows by drift, of the points that were tried; mean over seeds"
    return Table(caption, header, tuple(rows), frozenset(range(1, len(header))))


def _on_task(found: Preserved) -> str:
    """What else the budget held for, in words."""
    if found.task is None:
        return ""
    return (
        f" The budget held for another task as well ({words.file_name(found.task)}): drift says nothing of that one, "
        "so a point may be kept back although its drift is within the budget."
    )


def _certificates(comparison: Comparison) -> Table:
    write, held = Writer.of(comparison.decision), comparison.held
    has_task = any(one.preserved.task is not None for one in held)
    rows: tuple[Row, ...] = tuple(
        (
            foreign(one.arm),
            str(one.seed),
            _certificate(one.preserved),
            *_upper_bounds(one.preserved, has_task),
            words.way(one.preserved.chosen.kind, one.preserved.chosen.share),
            write.value(one.preserved.chosen.metric),
        )
        for runs in runs_of(comparison.rows, comparison.held).values()
        for one in runs
    )
    task = ("other task, at most",) if has_task else ()
    header = ("method", "seed", "certificate", "drift, at most", *task, "kept", write.name)
    caption = "Certificates: the drift of what was kept, on sealed texts, is below this with 95%"
    if has_task:
        caption += "; so is the fall of the right label's probability, on sealed rows of the other task"
    return Table(caption, header, rows, frozenset({1, *range(3, len(header) - 2), len(header) - 1}))


def _certificate(found: Preserved) -> str:
    """PASS, or what a FAIL is about where it may be two things."""
    sealed, label = found.certificate, words.certificate(found)
    if sealed is not None and not sealed.passed and sealed.task_upper is not None:
        beyond = {"generic text": sealed.upper, "the other task": sealed.task_upper}
        label += f" ({' and '.join(what for what, upper in beyond.items() if not upper <= sealed.limit)})"
    return f"{label} (sealed texts read {len(found.opened)} times)" if len(found.opened) > 1 else label


def _upper_bounds(found: Preserved, has_task: bool) -> tuple[str, ...]:
    """Of the drift, and of the fall on the other task where there is one."""
    sealed = found.certificate
    drift = NOTHING if sealed is None else words.as_share(sealed.upper, found.writes)
    if not has_task:
        return (drift,)
    fall = None if sealed is None else sealed.task_upper
    return drift, NOTHING if fall is None else words.as_share(max(0.0, fall), False)
