"""What stands on the proof card of a comparison, made from its record alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from fulltune.records.comparison import ArmRow, Comparison, Search, Tried
from fulltune.records.differences import Difference, VerdictKind
from fulltune.report.comparison import words as proof_words
from fulltune.report.comparison.words import NOTHING, Writer
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
    Paragraph,
    Section,
    Table,
    unless_empty,
)
from fulltune.report.format.plots import CostPlot, Dot, cost_plot
from fulltune.report.run.content import Report
from fulltune.report.verdict import Ruling

POINTER = "▸ "
"""Before the name of the arm to take."""
_KINDS: dict[VerdictKind, Literal["full", "peft", "equivalent", "undecided"]] = {
    "FULL": "full",
    "PEFT": "peft",
    "EQUIVALENT": "equivalent",
    "UNDECIDED": "undecided",
}


def build(comparison: Comparison, picture: str = "") -> Report:
    """Turn a comparison into what is said about it.

    Args:
        comparison: The record.
        picture: File name of the plot, for Markdown.
    """
    sections = (
        _why(comparison),
        _field(comparison),
        _plot(comparison, picture),
        _claims(comparison),
        _fairness(comparison),
        _how(comparison),
        _again(comparison),
    )
    return Report(
        title=comparison.name,
        subtitle=_subtitle(comparison),
        verdict=_ruling(comparison),
        key_figures=_key_figures(comparison),
        sections=tuple(section for section in sections if section is not None),
    )


def _subtitle(comparison: Comparison) -> str:
    rows = words.counted(comparison.train_rows, "train row")
    return f"Full fine-tuning or less? {words.file_name(comparison.model)} · {comparison.task} · {rows}"


def _ruling(comparison: Comparison) -> Ruling:
    decision = comparison.decision
    return Ruling(
        kind=_KINDS[decision.verdict],
        label=proof_words.label(decision),
        sentence=proof_words.headline(comparison),
        note=proof_words.terms(comparison),
        warning=proof_words.warning(comparison),
    )


def _key_figures(comparison: Comparison) -> tuple[tuple[str, str], ...]:
    trained = [row for row in comparison.rows if row.kind != "base"]
    most = max((len(row.seeds) for row in trained), default=0)
    figures = [
        ("methods trained", words.count(len(trained))),
        ("trials", words.count(comparison.num_trials)),
        ("seeds, at most", words.count(most)),
        ("took", words.duration(comparison.seconds)),
    ]
    if comparison.full_run_seconds > 0:
        times = proof_words.ratio(comparison.seconds / comparison.full_run_seconds).removesuffix("×")
        figures.append(("cost in full runs", times))
    return tuple(figures)


def _why(comparison: Comparison) -> Section | None:
    decision = comparison.decision
    to_do = (f"What to do: {one}" for one in proof_words.to_do(comparison))
    items = (*decision.because, *to_do, *decision.notes)
    return unless_empty("Why", [Bullets(items)] if items else [])


# ---- the field -------------------------------------------------------------------------------------------------


def name_of(row: ArmRow, comparison: Comparison) -> str:
    """The arm's name, pointed at when it is the one to take."""
    return f"{POINTER}{row.arm}" if row.arm == comparison.decision.recommended else row.arm


def difference_of(row: ArmRow, comparison: Comparison) -> Difference | None:
    return next((one for one in comparison.decision.differences if one.arm == row.arm), None)


def _field(comparison: Comparison) -> Section:
    blocks: list[Block] = [_quality(comparison), _cost(comparison)]
    if waited := proof_words.waited(comparison):
        blocks.append(Bullets((waited,)))
    return Section("field", "The field", tuple(blocks))


def _quality(comparison: Comparison) -> Table:
    write = Writer.of(comparison.decision)
    rows = []
    for row in comparison.rows:
        found = difference_of(row, comparison)
        apart = "reference" if row.kind == "full" else NOTHING if found is None else write.adjusted(found)
        rows.append(
            (
                Cell(name_of(row, comparison), foreign=True),
                _updated(row),
                write.estimate(row.metric),
                apart,
                NOTHING if row.gain_share is None else proof_words.fine_share(row.gain_share),
                NOTHING if row.drift is None else words.number(row.drift.value),
                _rate(row, comparison.searches),
                proof_words.seeds_of(row),
            )
        )
    level = f"{100 * comparison.decision.confidence:g}%"
    taken = f"{POINTER}the method to take. " if comparison.decision.recommended else ""
    spread = "rows and seeds" if proof_words.seeds_known(comparison) else "rows alone, since there is one seed"
    caption = (
        f"Quality on the sealed test rows. {taken}{write.name}: mean over seeds, its {level} interval over {spread}. "
        f"The difference's interval holds for all deciding methods together; above 0 full is better. Drift: "
        f"{comparison.drift_unit} on generic text. *: best rate at the edge of those tried"
    )
    header = (
        "method",
        "parameters updated",
        f"{write.name} [{level}]",
        f"full is better by{write.unit}",
        "of full's gain",
        "drift",
        "rate",
        "seeds",
    )
    return Table(caption, header, tuple(rows), frozenset(range(1, len(header))))


def _updated(row: ArmRow) -> str:
    if not row.num_trainable or not row.num_parameters:
        return proof_words.short_count(row.num_trainable)
    share = proof_words.fine_share(row.num_trainable / row.num_parameters)
    return f"{proof_words.short_count(row.num_trainable)} ({share})"


def _rate(row: ArmRow, searches: Sequence[Search]) -> str:
    if row.learning_rate is None:
        return NOTHING
    on_edge = any(search.on_edge for search in searches if search.arm == row.arm)
    return f"{words.number(row.learning_rate)}{'*' if on_edge else ''}"


def _cost(comparison: Comparison) -> Table:
    full = proof_words.full_of(comparison)

    def cell(row: ArmRow, field: str, write: Callable[[float], str]) -> str:
        value = float(getattr(row, field))
        if value <= 0:
            return NOTHING
        share = proof_words.to_full(value, getattr(full, field)) if full and row is not full else ""
        return f"{write(value)} · {share}" if share else write(value)

    rows = tuple(
        (
            Cell(name_of(row, comparison), foreign=True),
            cell(row, "train_seconds", words.duration),
            proof_words.short(row.tokens_per_second) if row.tokens_per_second else NOTHING,
            cell(row, "train_flops", proof_words.short),
            cell(row, "peak_memory_bytes", _size),
            cell(row, "memory_growth_bytes", _size),
            cell(row, "saved_bytes", _size),
            proof_words.milliseconds(row.seconds_per_row),
        )
        for row in comparison.rows
    )
    caption = (
        f"Cost of one whole run, {comparison.costs} over seeds, of memory the most; ×: relative to full. FLOP: all "
        "steps, forward and backward. Growth: memory beyond what the process held before the model was loaded. Saved: "
        "the trained weights on disk. A row: time to answer one test row, in batches"
    )
    header = ("method", "training time", "tokens/s", "FLOP", "peak memory", "growth", "saved", "a row")
    return Table(caption, header, rows, frozenset(range(1, len(header))))


def _size(value: float) -> str:
    return words.size(round(value))


# ---- the plot --------------------------------------------------------------------------------------------------


def plots(comparison: Comparison) -> tuple[CostPlot, ...]:
    """Quality against time, and against operations where they are known."""
    full = proof_words.full_of(comparison)
    if full is None:
        return ()
    write = Writer.of(comparison.decision)
    drawn = []
    for cost_name, field in (("training time", "train_seconds"), ("operations (FLOP)", "train_flops")):
        whole = getattr(full, field)
        rows = [row for row in comparison.rows if row.kind == "base" or getattr(row, field) > 0]
        if whole <= 0:
            continue
        dots = [
            Dot(
                name=row.arm,
                cost=getattr(row, field) / whole,
                value=row.metric.value,
                low=row.metric.low,
                high=row.metric.high,
                full=row.kind == "full",
                taken=row.arm == comparison.decision.recommended,
                text=write.value(row.metric.value),
            )
            for row in rows
        ]
        title, better = f"Quality against {cost_name}", comparison.greater_is_better
        drawn.append(CostPlot(title, cost_name, write.metric, better, comparison.decision.margin, tuple(dots)))
    return tuple(drawn)


def _plot(comparison: Comparison, picture: str) -> Section | None:
    found = plots(comparison)
    if not found:
        return None
    level = f"{100 * comparison.decision.confidence:g}%"
    legend = (
        "Filled: the method to take; square: full fine-tuning; the band around it: the margin. Triangles point to "
        f"methods far off. Whiskers: {level} intervals."
    )
    figures = tuple(Figure(cost_plot(one), one.title, one.words, file=picture) for one in found)
    return Section("plot", "Quality against cost", (Figures(figures), Paragraph(legend)))


# ---- what else -------------------------------------------------------------------------------------------------


def _claims(comparison: Comparison) -> Section | None:
    rows = tuple(
        (f"“{one.claim}”", f"{proof_words.held(one.holds).capitalize()}: {one.here}") for one in comparison.claims
    )
    return unless_empty("What one often reads", [Facts(rows)] if rows else [])


def _fairness(comparison: Comparison) -> Section:
    found = proof_words.marks(comparison)
    said: Block = Bullets(tuple(found)) if found else Paragraph("Nothing was found that makes it unfair.")
    return Section("fairness", "Fairness", (said,))


def _how(comparison: Comparison) -> Section:
    blocks: list[Block] = [Facts(_facts(comparison)), _searches(comparison)]
    if comparison.baselines:
        blocks.append(_baselines(comparison))
    if comparison.looks:
        blocks.append(Folded("After each seed", (Bullets(tuple(_looks(comparison))),)))
    if comparison.notes:
        blocks.append(Bullets(comparison.notes))
    versions = tuple((name, version) for name, version in comparison.versions.items())
    blocks.append(Folded("Versions", (Facts(versions),)))
    return Section("how", "How it was made", tuple(blocks))


def _facts(comparison: Comparison) -> tuple[tuple[str, str], ...]:
    expected = comparison.expectation
    took, fixed = proof_words.spent(comparison)
    cores = words.counted(comparison.cores, "core")
    beside = f", {comparison.side_by_side} trials side by side" if comparison.side_by_side > 1 else ""
    facts = [
        (
            "rows",
            f"{words.count(comparison.train_rows)} to train, {words.count(comparison.eval_rows)} to choose rates and "
            f"checkpoints, {words.count(comparison.test_rows)} to test; data {comparison.data_fingerprint[:12]}",
        ),
        ("test rows opened", _opened(comparison)),
        ("took", f"{took}; {comparison.device}, {cores}{beside}"),
        ("all seeds", fixed),
    ]
    if could := _could_find(comparison):
        facts.append(("could find", could))
    if differed := _seeds_differed(comparison):
        facts.append(("seeds differed", differed))
    if expected.notes:
        facts.append(("design" if expected.budget_seconds is None else "budget", "; ".join(expected.notes)))
    facts.append(("drift", f"{comparison.drift_unit} against the untouched model, on {comparison.drift_text}"))
    facts.append(("started", comparison.started))
    return tuple(facts)


def _opened(comparison: Comparison) -> str:
    openings = comparison.openings
    if not openings:
        return "not noted"
    times = "once" if len(openings) == 1 else f"{len(openings)} times"
    return f"{times}: " + "; ".join(f"{one.time} by {one.by}" for one in openings)


def _could_find(comparison: Comparison) -> str:
    """The differences that this comparison would have called; 80 times out of 100."""
    parts = []
    expected, write = comparison.expectation, Writer.of(comparison.decision)
    if expected.detectable is not None:
        seeds = words.counted(expected.num_seeds, "seed")
        apart = "" if expected.detectable_apart is None else ", where seeds differ by half a point"
        parts.append(f"expected before the start, with {seeds}: {write.found_from(expected.detectable)}{apart}")
    if expected.detectable_apart is not None:
        parts[-1] += f", {write.found_from(expected.detectable_apart)} where by two"
    if found := proof_words.could_find(comparison):
        parts.append(f"in the end: {found}; true differences of that size are called in 8 of 10 comparisons")
    return "; ".join(parts)


def _seeds_differed(comparison: Comparison) -> str:
    """The spread between seeds, beyond what few rows make of it."""
    write = Writer.of(comparison.decision)
    known = [one for one in comparison.decision.scores if one.seed_sd is not None]
    parts = [f"{one.arm} by {write.amount(one.seed_sd)}" for one in known if one.seed_sd is not None]
    return f"{', '.join(parts)} (standard deviation)" if parts else ""


def _searches(comparison: Comparison) -> Table:
    write = Writer.of(comparison.decision)
    rows = []
    for one in comparison.searches:
        rows.append(
            (
                Cell(one.arm, foreign=True),
                _tried(one.tried, write) or NOTHING,
                _whole(one, write) or NOTHING,
                f"{words.number(one.chosen)}{'*' if one.on_edge else ''}",
                one.reason,
            )
        )
    header = ("method", "short runs", "whole runs", "chosen", "why")
    caption = f"Learning rates with their {write.name} on the eval rows. *: a better one may lie beyond those tried"
    return Table(caption, header, tuple(rows), frozenset({3}))


def _whole(search: Search, write: Writer) -> str:
    """Whole runs at different rates, and how many were given up before (diverged, or below their short run)."""
    apart = search.other_runs - max(0, len(search.whole) - 1)
    return " · ".join([_tried(search.whole, write)] * bool(search.whole) + [f"{apart} given up"] * bool(apart))


def _tried(tried: Sequence[Tried], write: Writer) -> str:
    by_rate = sorted(tried, key=lambda one: one.learning_rate)
    return " · ".join(f"{words.number(one.learning_rate)}: {write.value(one.metric)}" for one in by_rate)


def _baselines(comparison: Comparison) -> Table:
    write = Writer.of(comparison.decision)
    rows = [
        (Cell(one.name, foreign=True), write.estimate(one.metrics[comparison.metric]))
        for one in comparison.baselines
        if comparison.metric in one.metrics
    ]
    return Table("Without training", ("baseline", write.name), tuple(rows), frozenset({1}))


def _looks(comparison: Comparison) -> list[str]:
    said = []
    for look in comparison.looks:
        said.append(f"{words.counted(look.num_seeds, 'seed')} of at most {look.max_seeds}: {look.reason}")
    return said


def _again(comparison: Comparison) -> Section:
    return Section(
        "again",
        "Make it again",
        (
            Code(comparison.command, "sh"),
            Paragraph("This card is made from proof.json alone, which lies beside it and holds every number."),
        ),
    )
