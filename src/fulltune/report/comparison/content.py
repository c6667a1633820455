"""What the report of a comparison says, made from its record alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fulltune.records.comparison import ArmRow, Comparison, Search, Tried
from fulltune.report.comparison import about_forgetting, sentences
from fulltune.report.comparison.sentences import NOTHING, Writer
from fulltune.report.format import words
from fulltune.report.format.blocks import (
    Block,
    Bullets,
    Cell,
    Code,
    Facts,
    Figure,
    Figures,
    Folded,
    Headline,
    Paragraph,
    Report,
    Section,
    Table,
    foreign,
    unless_empty,
)
from fulltune.report.format.plots import CostPlot, Mark, cost_plot
from fulltune.text import counted, format_bytes, format_number, format_seconds

_POINTER = "▸ "
"""Before the name of the recommended method."""


def build(comparison: Comparison, picture: str = "") -> Report:
    """Turn a comparison into what is said about it.

    Args:
        comparison: The record.
        picture: File name of the plots' picture, for Markdown.
    """
    decision = comparison.decision
    rows = counted(comparison.train_rows, "train row")
    sections = (
        _why(comparison),
        _methods(comparison),
        _plot(comparison, picture),
        about_forgetting.section(comparison),
        _claims(comparison),
        _fairness(comparison),
        _how(comparison),
        _again(comparison),
    )
    return Report(
        title=comparison.name,
        subtitle=f"Full fine-tuning or less? {words.file_name(comparison.model)} · {comparison.task} · {rows}",
        headline=Headline(
            kind=decision.verdict.lower(),
            label=sentences.label(decision),
            sentence=sentences.headline(comparison),
            note=sentences.terms(comparison),
            warning=sentences.warning(comparison),
        ),
        key_figures=tuple(_key_figures(comparison)),
        sections=tuple(section for section in sections if section is not None),
    )


def _key_figures(comparison: Comparison) -> list[tuple[str, str]]:
    trained = [row for row in comparison.rows if row.kind != "base"]
    figures = [
        ("methods trained", f"{len(trained):,}"),
        ("trials", f"{comparison.num_trials:,}"),
        ("seeds, at most", f"{max((len(row.seeds) for row in trained), default=0):,}"),
        ("took", format_seconds(comparison.seconds)),
    ]
    if comparison.full_run_seconds > 0:
        times = sentences.ratio(comparison.seconds / comparison.full_run_seconds).removesuffix("×")
        figures.append(("cost in full runs", times))
    return figures


def _why(comparison: Comparison) -> Section | None:
    decision = comparison.decision
    to_do = (f"What to do: {one}" for one in sentences.to_do(comparison))
    items = (*decision.because, *to_do, *decision.notes)
    return unless_empty("Why", [Bullets(items)] if items else [])


# ---- the methods -----------------------------------------------------------------------------------------------


def _methods(comparison: Comparison) -> Section:
    blocks: list[Block] = [_quality(comparison), _cost(comparison)]
    if waited := sentences.waited(comparison):
        blocks.append(Bullets((waited,)))
    return Section("field", "The methods", tuple(blocks))


def _name(row: ArmRow, comparison: Comparison) -> Cell:
    """The method's name, pointed at when it is the recommended one."""
    return foreign(f"{_POINTER}{row.arm}" if row.arm == comparison.decision.recommended else row.arm)


def _quality(comparison: Comparison) -> Table:
    write = Writer.of(comparison.decision)
    rows = []
    for row in comparison.rows:
        updated = sentences.short_count(row.num_trainable)
        if row.num_trainable and row.num_parameters:
            updated += f" ({sentences.fine_share(row.num_trainable / row.num_parameters)})"
        on_edge = any(search.on_edge for search in comparison.searches if search.arm == row.arm)
        rows.append(
            (
                _name(row, comparison),
                updated,
                write.estimate(row.metric),
                sentences.behind_full(row, comparison),
                NOTHING if row.gain_share is None else sentences.fine_share(row.gain_share),
                NOTHING if row.drift is None else format_number(row.drift.value),
                NOTHING if row.learning_rate is None else f"{format_number(row.learning_rate)}{'*' * on_edge}",
                str(len(row.seeds) or NOTHING),
            )
        )
    level = sentences.level(comparison)
    recommended = f"{_POINTER}the recommended method. " if comparison.decision.recommended else ""
    spread = "rows and seeds" if sentences.could_find(comparison) else "rows alone, since there is one seed"
    caption = (
        f"Quality on the sealed test rows. {recommended}{write.name}: mean over seeds, with its {level} interval over "
        f"{spread}. The difference's interval holds for all deciding methods together; above 0 full is better. Drift: "
        f"{comparison.drift_unit} on generic text. *: best rate at the edge of those tried"
    )
    metric, behind = f"{write.name} [{level}]", f"full is better by{write.unit}"
    header = ("method", "parameters updated", metric, behind, "of full's gain", "drift", "rate", "seeds")
    return Table(caption, header, tuple(rows), frozenset(range(1, len(header))))


def _cost(comparison: Comparison) -> Table:
    full = sentences.full_of(comparison)

    def cell(row: ArmRow, field: str, write: Callable[[float], str]) -> str:
        value = float(getattr(row, field))
        if value <= 0:
            return NOTHING
        share = "" if row is full else sentences.to_full(row, full, field)
        return f"{write(value)} · {share}" if share else write(value)

    rows = tuple(
        (
            _name(row, comparison),
            cell(row, "train_seconds", format_seconds),
            sentences.short(row.tokens_per_second) if row.tokens_per_second else NOTHING,
            cell(row, "train_flops", sentences.short),
            cell(row, "peak_memory_bytes", format_bytes),
            cell(row, "memory_growth_bytes", format_bytes),
            cell(row, "saved_bytes", format_bytes),
            f"{format_number(1000 * row.seconds_per_row)} ms" if row.seconds_per_row else NOTHING,
        )
        for row in comparison.rows
    )
    caption = (
        "Cost of one whole run: median over seeds, of memory the maximum; ×: relative to full. FLOP: all "
        "steps, forward and backward. Growth: memory beyond what the process held before the model was loaded. Saved: "
        "the trained weights on disk. Per row: time to answer one test row, in batches"
    )
    header = ("method", "training time", "tokens/s", "FLOP", "peak memory", "growth", "saved", "per row")
    return Table(caption, header, rows, frozenset(range(1, len(header))))


# ---- the plot --------------------------------------------------------------------------------------------------


def plots(comparison: Comparison) -> tuple[CostPlot, ...]:
    """Quality against time, and against operations where they are known."""
    full, write = sentences.full_of(comparison), Writer.of(comparison.decision)
    drawn = []
    for cost_name, field in (("training time", "train_seconds"), ("operations (FLOP)", "train_flops")):
        whole = getattr(full, field, 0.0)
        if whole <= 0:
            continue
        marks = tuple(
            Mark(
                *(row.arm, row.metric.value, row.metric.low, row.metric.high, write.value(row.metric.value)),
                marker="s" if row.kind == "full" else "o",
                filled=row.arm == comparison.decision.recommended,
                cost=getattr(row, field) / whole,
            )
            for row in comparison.rows
            if row.kind == "base" or getattr(row, field) > 0
        )
        title, better = f"Quality against {cost_name}", comparison.greater_is_better
        drawn.append(CostPlot(title, cost_name, write.metric, better, comparison.decision.margin, marks))
    return tuple(drawn)


def _plot(comparison: Comparison, picture: str) -> Section | None:
    found = plots(comparison)
    if not found:
        return None
    legend = (
        "Filled: the recommended method; square: full fine-tuning; the band around it: the margin. Triangles point to "
        f"methods far off. Whiskers: {sentences.level(comparison)} intervals."
    )
    figures = tuple(Figure(cost_plot(one), one.title, one.words, file=picture) for one in found)
    return Section("plot", "Quality against cost", (Figures(figures), Paragraph(legend)))


# ---- what else -------------------------------------------------------------------------------------------------


def _claims(comparison: Comparison) -> Section | None:
    rows = tuple(
        (f"“{one.claim}”", f"{sentences.held(one.holds).capitalize()}: {one.here}") for one in comparison.claims
    )
    return unless_empty("Common claims", [Facts(rows)] if rows else [])


def _fairness(comparison: Comparison) -> Section:
    found = sentences.marks(comparison)
    said: Block = Bullets(tuple(found)) if found else Paragraph("No unfair setting was found.")
    return Section("fairness", "Fairness", (said,))


def _how(comparison: Comparison) -> Section:
    blocks: list[Block] = [Facts(tuple(_facts(comparison))), _searches(comparison)]
    if comparison.baselines:
        blocks.append(_baselines(comparison))
    if comparison.looks:
        looks = tuple(
            f"{counted(look.num_seeds, 'seed')} of at most {look.max_seeds}: {look.reason}" for look in comparison.looks
        )
        blocks.append(Folded("After each seed", (Bullets(looks),)))
    if comparison.notes:
        blocks.append(Bullets(comparison.notes))
    blocks.append(Folded("Versions", (Facts(tuple(comparison.versions.items())),)))
    return Section("how", "How it was made", tuple(blocks))


def _facts(comparison: Comparison) -> list[tuple[str, str]]:
    expected, openings = comparison.expectation, comparison.openings
    took, fixed = sentences.spent(comparison)
    cores = counted(comparison.cores, "core")
    parallel = f", {comparison.side_by_side} trials side by side" if comparison.side_by_side > 1 else ""
    times = "once" if len(openings) == 1 else f"{len(openings)} times"
    mixed = f" and {comparison.mixed_rows:,} mixed into each epoch" if comparison.mixed_rows else ""
    opened = f"{times}: " + "; ".join(f"{one.time} by {one.by}" for one in openings)
    facts = [
        (
            "rows",
            f"{comparison.train_rows:,} to train{mixed}, {comparison.eval_rows:,} to choose rates and checkpoints, "
            f"{comparison.test_rows:,} to test; data {comparison.data_fingerprint[:12]}",
        ),
        ("test rows used for a verdict", opened if openings else "not noted"),
        ("took", f"{took}; {comparison.device}, {cores}{parallel}"),
        ("all seeds", fixed),
        ("could find", _could_find(comparison)),
        ("seeds differed", _seeds_differed(comparison)),
        ("design" if expected.budget_seconds is None else "budget", "; ".join(expected.notes)),
        ("drift", f"{comparison.drift_unit} against the untouched model, on {comparison.drift_text}"),
        ("started", comparison.started),
    ]
    return [(name, value) for name, value in facts if value]


def _could_find(comparison: Comparison) -> str:
    """The differences that this comparison would have found in 8 of 10 cases."""
    parts = []
    expected, write = comparison.expectation, Writer.of(comparison.decision)
    if expected.detectable is not None:
        seeds = counted(expected.num_seeds, "seed")
        apart = "" if expected.detectable_apart is None else ", where seeds differ by half a point"
        parts.append(f"expected before the start, with {seeds}: {write.found_from(expected.detectable)}{apart}")
        if expected.detectable_apart is not None:
            parts[-1] += f", {write.found_from(expected.detectable_apart)} where by two"
    if found := sentences.could_find(comparison):
        parts.append(f"in the end: {found}; true differences of that size are found in 8 of 10 comparisons")
    return "; ".join(parts)


def _seeds_differed(comparison: Comparison) -> str:
    """The spread between seeds, beyond what few rows make of it."""
    write = Writer.of(comparison.decision)
    parts = [
        f"{one.arm} by {write.amount(one.seed_sd)}" for one in comparison.decision.scores if one.seed_sd is not None
    ]
    return f"{', '.join(parts)} (standard deviation)" if parts else ""


def _searches(comparison: Comparison) -> Table:
    write = Writer.of(comparison.decision)
    rows = tuple(
        (
            foreign(one.arm),
            _tried(one.tried, write) or NOTHING,
            _whole(one, write) or NOTHING,
            f"{format_number(one.chosen)}{'*' * one.on_edge}",
            one.reason,
        )
        for one in comparison.searches
    )
    header = ("method", "short runs", "whole runs", "chosen", "why")
    caption = f"Learning rates with their {write.name} on the eval rows. *: a better one may lie beyond those tried"
    return Table(caption, header, rows, frozenset({3}))


def _whole(search: Search, write: Writer) -> str:
    """Whole runs at different rates, and how many were given up before (diverged, or below their short run)."""
    apart = max(0, search.other_runs - max(0, len(search.whole) - 1))
    return " · ".join([_tried(search.whole, write)] * bool(search.whole) + [f"{apart} given up"] * bool(apart))


def _tried(tried: Sequence[Tried], write: Writer) -> str:
    by_rate = sorted(tried, key=lambda one: one.learning_rate)
    return " · ".join(f"{format_number(one.learning_rate)}: {write.value(one.metric)}" for one in by_rate)


def _baselines(comparison: Comparison) -> Table:
    write = Writer.of(comparison.decision)
    rows = tuple(
        (foreign(one.name), write.estimate(one.metrics[comparison.metric]))
        for one in comparison.baselines
        if comparison.metric in one.metrics
    )
    return Table("Without training", ("baseline", write.name), rows, frozenset({1}))


def _again(comparison: Comparison) -> Section:
    said = Paragraph("This report is made from proof.json alone, which lies beside it and holds every number.")
    return Section("again", "Make it again", (Code(comparison.command, "sh"), said))
