from __future__ import annotations

from collections.abc import Callable, Mapping

from fulltune.records.comparison import Comparison, Decision, Difference, Expectation, MethodRow, Search
from fulltune.report.format import words
from fulltune.report.format.blocks import (
    Bullets,
    Cell,
    Code,
    Element,
    Facts,
    Figures,
    Folded,
    Headline,
    Paragraph,
    Report,
    Section,
    Table,
    unless_empty,
    untrusted,
)
from fulltune.report.format.plots import CostPlot, Mark, cost_plot
from fulltune.report.format.words import NOTHING, Writer, fine_share, ratio, short, short_count
from fulltune.text import counted, format_bytes, format_number, format_seconds, listed

_POINTER = "▸ "
_MADE_FROM = Paragraph("This report is made from proof.json beside it, which holds every number.")


def build(comparison: Comparison, picture: str = "") -> Report:
    sections = (
        _why_section(comparison),
        Section("field", "The methods", _method_tables(comparison)),
        _plot_section(comparison, picture),
        Section("fairness", "Fairness", (_fairness_block(comparison),)),
        how(comparison),
        Section("again", "Reproduce", (Code(comparison.command, "sh"), _MADE_FROM)),
    )
    rows = counted(comparison.train_rows, "train row")
    return Report(
        title=comparison.name,
        subtitle=f"Full fine-tuning or less? {words.file_name(comparison.model)} · {comparison.task} · {rows}",
        headline=_headline(comparison),
        key_figures=tuple(_key_figures(comparison)),
        sections=tuple(section for section in sections if section is not None),
    )


def for_terminal(comparison: Comparison) -> list[Headline | Section | Element]:
    """Return the parts that are printed at the end of a comparison."""
    parts = (
        _headline(comparison),
        _why_section(comparison),
        Section("field", "The methods", _method_tables(comparison)),
        Section("fairness", "Fairness", (_fairness_block(comparison),)),
        Section("how", "How it was made", (Facts(tuple(one for one in facts(comparison) if one[0] == "took")),)),
    )
    return [part for part in parts if part is not None]


def label(decision: Decision) -> str:
    """Return the verdict with the method that it recommends: `PEFT: lora`."""
    name = decision.recommended
    take = {"PEFT": f": {name}", "VARIANT": f": {name}", "EQUIVALENT": f": take {name}"}
    return decision.verdict + take.get(decision.verdict, "")


def _headline(comparison: Comparison) -> Headline:
    decision, write = comparison.decision, Writer.of(comparison.decision)
    rivals = sum(one.decides for one in decision.differences)
    together = f" for the {rivals} methods together" if rivals > 1 else ""
    smaller = "" if comparison.decision.greater_is_better else f" Smaller {write.name} is better."
    terms = (
        f"Margin: differences below {write.amount(decision.margin)} of {write.name} do not matter. Confidence: "
        f"{_confidence_level(comparison)}{together}. Measured on {counted(decision.num_rows, 'test row')}.{smaller}"
    )
    sentence = f"{_near_without_training(comparison)} {decision.headline}".lstrip()
    return Headline(decision.verdict.lower(), label(decision), sentence, note=terms, warning=_warning(comparison))


def _near_without_training(comparison: Comparison) -> str:
    """Say that the best baseline is no worse than the recommended or best method, or return an empty string."""
    scored = [one for one in comparison.baselines if comparison.decision.metric in one.metrics]
    trained = [row for row in comparison.rows if row.seeds]
    if not scored or not trained:
        return ""
    sign = 1 if comparison.decision.greater_is_better else -1
    best = max(scored, key=lambda scores: sign * scores.metrics[comparison.decision.metric].value)
    top = max(trained, key=lambda row: sign * row.metric.value)
    row = next((one for one in trained if one.method == comparison.decision.recommended), top)
    value, write = best.metrics[comparison.decision.metric].value, Writer.of(comparison.decision)
    if sign * value >= sign * top.metric.value:
        return f"No method beats {best.name}, which needs no training and has {write.value(value)}."
    if sign * value < min(sign * row.metric.low, sign * row.metric.high):
        return ""
    return (
        f"{best.name}, which needs no training, has {write.value(value)} on the same test rows, within the interval of "
        f"{row.method}, {write.estimate(row.metric)}."
    )


def _warning(comparison: Comparison) -> str:
    findings = marks(comparison)
    unfair = sum(one.startswith("Unfair") for one in findings)
    counts = ((unfair, "unfair setting"), (len(findings) - unfair, "note"))
    parts = [counted(count, noun) for count, noun in counts if count]
    opened = comparison.verdicts_on_test_rows
    again = f"The sealed test rows were used for {opened} verdicts. " if opened > 1 else ""
    return f"{again}{listed(parts)}: see Fairness." if parts else ""


def _confidence_level(comparison: Comparison) -> str:
    return f"{100 * comparison.decision.confidence:g}%"


def _key_figures(comparison: Comparison) -> list[tuple[str, str]]:
    trained = [row for row in comparison.rows if row.kind != "base"]
    return [
        ("methods trained", f"{len(trained):,}"),
        ("trials", f"{comparison.num_trials:,}"),
        ("seeds, at most", f"{max((len(row.seeds) for row in trained), default=0):,}"),
        ("took", format_seconds(comparison.seconds)),
    ]


def _why_section(comparison: Comparison) -> Section | None:
    decision, to_do = comparison.decision, list(comparison.decision.would_decide)
    if comparison.can_resume:
        limit = comparison.expectation.budget_seconds
        previous = f" (the budget was {format_seconds(limit)})" if limit else ""
        more = f"give more time{previous}: the same command with a larger --budget resumes from these trials"
        to_do.insert(0, more)
    items = (*decision.because, *(f"What to do: {one}" for one in to_do), *decision.notes)
    return unless_empty("Why", [Bullets(items)] if items else [])


def _method_tables(comparison: Comparison) -> tuple[Element, ...]:
    fewer = [row.method for row in comparison.rows if row.waited and row.method != comparison.decision.recommended]
    tables = (_quality_table(comparison), _cost_table(comparison))
    if not fewer:
        return tables
    why = f"{', '.join(fewer)}: fewer seeds, because full and the best other method were decided first"
    return (*tables, Bullets((why,)))


def _method_cell(row: MethodRow, comparison: Comparison) -> Cell:
    return untrusted(f"{_POINTER}{row.method}" if row.method == comparison.decision.recommended else row.method)


def _quality_table(comparison: Comparison) -> Table:
    write = Writer.of(comparison.decision)
    behind = {one.method: write.adjusted(one) for one in comparison.decision.differences}
    rows = []
    for row in comparison.rows:
        updated = short_count(row.num_trainable)
        if row.num_trainable and row.num_parameters:
            updated += f" ({fine_share(row.num_trainable / row.num_parameters)})"
        rows.append(
            (
                _method_cell(row, comparison),
                updated,
                write.estimate(row.metric),
                "reference" if row.kind == "full" else behind.get(row.method, NOTHING),
                NOTHING if row.gain_share is None else fine_share(row.gain_share),
                NOTHING if row.drift is None else format_number(row.drift.value),
                NOTHING if row.search is None else chosen_rate(row.search),
                str(len(row.seeds) or NOTHING),
            )
        )
    level = _confidence_level(comparison)
    recommended = f"{_POINTER}the recommended method. " if comparison.decision.recommended else ""
    spread = "rows and seeds" if known(comparison) else "rows alone, because there is one seed"
    caption = (
        f"Quality on the sealed test rows. {recommended}{write.name}: mean over seeds, with its {level} interval over "
        f"{spread}. Intervals of differences hold for all deciding methods together; above 0 full is better. "
        f"Drift: {comparison.drift_unit} on generic text. *: best rate at the edge of those tried"
    )
    better = f"full is better by{' [points]' if write.in_points else ''}"
    metric = f"{write.name} [{level}]"
    header = ("method", "parameters updated", metric, better, "share of full's gain", "drift", "rate", "seeds")
    return Table(caption, header, tuple(rows), frozenset(range(1, len(header))))


def _cost_table(comparison: Comparison) -> Table:
    full = _full_row(comparison)

    def cell(row: MethodRow, field: str, write: Callable[[float], str]) -> str:
        value, whole = float(getattr(row, field)), float(getattr(full, field, 0))
        if value <= 0:
            return NOTHING
        return write(value) if row is full or not whole else f"{write(value)} · {ratio(value / whole)}"

    rows = tuple(
        (
            _method_cell(row, comparison),
            cell(row, "train_seconds", format_seconds),
            short(row.tokens_per_second) if row.tokens_per_second else NOTHING,
            cell(row, "train_flops", short),
            cell(row, "peak_memory_bytes", format_bytes),
            cell(row, "memory_growth_bytes", format_bytes),
            cell(row, "saved_bytes", format_bytes),
            f"{format_number(1000 * row.seconds_per_row)} ms" if row.seconds_per_row else NOTHING,
        )
        for row in comparison.rows
    )
    caption = (
        "Cost of one whole run: median over seeds, for memory the maximum; ×: relative to full. FLOP: all steps, "
        "forward and backward. Growth: increase over the memory before the model was loaded. Saved: trained weights on "
        "disk. Per row: time to predict one test row, in batches"
    )
    header = ("method", "training time", "tokens/s", "FLOP", "peak memory", "growth", "saved", "per row")
    return Table(caption, header, rows, frozenset(range(1, len(header))))


def _full_row(comparison: Comparison) -> MethodRow | None:
    return next((row for row in comparison.rows if row.kind == "full"), None)


def plots(comparison: Comparison) -> tuple[CostPlot, ...]:
    """Return a plot of quality against each measured cost: training time and operations."""
    full, write, drawn = _full_row(comparison), Writer.of(comparison.decision), list[CostPlot]()
    for cost, field in (("training time", "train_seconds"), ("operations (FLOP)", "train_flops")):
        if (whole := getattr(full, field, 0.0)) <= 0:
            continue
        marks = tuple(
            Mark(
                *(row.method, row.metric.value, row.metric.low, row.metric.high, write.value(row.metric.value)),
                is_full=row.kind == "full",
                filled=row.method == comparison.decision.recommended,
                cost=getattr(row, field) / whole,
            )
            for row in comparison.rows
            if row.kind == "base" or getattr(row, field) > 0
        )
        drawn.append(CostPlot(cost, marks, comparison.decision))
    return tuple(drawn)


def _plot_section(comparison: Comparison, picture: str) -> Section | None:
    legend = (
        "Filled: the recommended method. Square: full fine-tuning; the band around it is the margin. "
        f"Whiskers: {_confidence_level(comparison)} intervals."
    )
    drawn = tuple(map(cost_plot, plots(comparison)))
    blocks = (Figures(drawn, file=picture), Paragraph(legend))
    return Section("plot", "Quality against cost", blocks) if drawn else None


def _fairness_block(comparison: Comparison) -> Element:
    findings = marks(comparison)
    return Bullets(tuple(findings)) if findings else Paragraph("No unfair setting was found.")


def marks(comparison: Comparison) -> list[str]:
    """Return what a reader must know about fairness and statistical power, unfair findings first."""
    lines = [
        f"{'Unfair' if finding.level == 'unfair' else 'Note'}: {finding.where}: {finding.what}. To do: {finding.to_do}."
        for finding in comparison.findings
    ]
    decision = comparison.decision
    write, deciding = Writer.of(decision), known(comparison)
    still_open = [one for one in deciding if one.is_open]
    if any(one.detectable > decision.margin for one in still_open):
        lines.append(
            "Note: in 8 of 10 cases these test rows and seeds detect differences "
            f"{listed([f'{write.found_from(one.detectable)} ({one.method})' for one in still_open])}; the margin is "
            f"{write.amount(decision.margin)}."
        )
    return lines


# ---- how it was made -----------------------------------------------------------------------------------------


def how(comparison: Comparison) -> Section:
    """Build the section on how the comparison was made."""
    blocks: list[Element] = [Facts(tuple(facts(comparison))), _search_table(comparison)]
    if comparison.baselines:
        write = Writer.of(comparison.decision)
        scored = [one for one in comparison.baselines if comparison.decision.metric in one.metrics]
        rows = tuple((untrusted(one.name), write.estimate(one.metrics[comparison.decision.metric])) for one in scored)
        blocks.append(Table("Without training", ("baseline", write.name), rows, frozenset({1})))
    if comparison.looks:
        looks = tuple(
            f"{counted(look.num_seeds, 'seed')} of at most {look.max_seeds}: {look.reason}" for look in comparison.looks
        )
        blocks.append(Folded("After each seed", (Bullets(looks),)))
    if comparison.notes:
        blocks.append(Bullets(comparison.notes))
    blocks.append(Folded("Versions", (Facts(tuple(comparison.versions.items())),)))
    return Section("how", "How it was made", tuple(blocks))


def facts(comparison: Comparison) -> list[tuple[str, str]]:
    """Return facts about rows, openings, time and design as pairs of name and value."""
    expected, openings = comparison.expectation, comparison.openings
    cores, full = counted(comparison.cores, "core"), _full_row(comparison)
    took = f"{format_seconds(comparison.seconds)} in all"
    if full is not None and full.train_seconds > 0:
        full_seconds = full.train_seconds
        took += f", {ratio(comparison.seconds / full_seconds)} one full run ({format_seconds(full_seconds)})"
    times = "once" if len(openings) == 1 else f"{len(openings)} times"
    mixed = f" and {comparison.mixed_rows:,} mixed into each epoch" if comparison.mixed_rows else ""
    opened = f"{times}: " + "; ".join(f"{full_seconds.time} by {full_seconds.by}" for full_seconds in openings)
    write, seeds = Writer.of(comparison.decision), counted(expected.num_seeds, "seed")
    detectable = f"expected before the start, with {seeds}: {can_find(expected, write)}"
    spread = [
        f"{method} by {write.amount(full_seconds)}" for method, full_seconds in comparison.decision.seed_sds.items()
    ]
    lines = [
        (
            "rows",
            f"{comparison.train_rows:,} train{mixed}, {comparison.eval_rows:,} eval (choose rates and checkpoints), "
            f"{comparison.test_rows:,} test; data {comparison.data_fingerprint[:12]}",
        ),
        ("test rows used for a verdict", opened if openings else "not recorded"),
        ("took", f"{took}; {comparison.device}, {cores}"),
        ("detectable", detectable if expected.detectable else ""),
        ("seeds differed", f"{', '.join(spread)} (standard deviation)" if spread else ""),
        ("design" if expected.budget_seconds is None else "budget", "; ".join(expected.notes)),
        ("drift", f"{comparison.drift_unit} against the untouched model, on {comparison.generic_text}"),
    ]
    return [(name, value) for name, value in lines if value]


def expectation(expected: Expectation, write: Writer) -> Section:
    """Build the section that is printed before a comparison starts."""
    search, whose = "", "of each method"
    if expected.num_search_trials:
        search = f"{expected.num_search_trials} short trials to choose rates, more if the best is at an edge; then "
    if expected.sequential and expected.num_seeds > 1:
        whose = "of each method at most; clear answers need fewer"
        if expected.budget_seconds is not None:
            rest = ", one of the rest" if len(expected.methods) > 2 else ""
            whose = f"of full and the best other method{rest}"
    takes = f"about {format_seconds(expected.seconds)}"
    if expected.budget_seconds is not None:
        limit = format_seconds(expected.budget_seconds)
        takes += f" of the {limit} budget; the rest is a reserve, because forecasts err"
    rows = [
        ("methods", ", ".join(expected.methods)),
        ("trials", f"{search}{counted(expected.num_seeds, 'seed')} {whose}"),
        ("takes", takes),
        ("detectable", can_find(expected, write)),
        *(("note" if expected.budget_seconds is None else "budget", note) for note in expected.notes),
    ]
    if expected.detectable is not None and expected.detectable[0] > write.margin:
        more = "smaller than detectable: the comparison may end UNDECIDED; more test rows or seeds would help"
        rows.append(("margin", f"{write.amount(write.margin)}, {more}"))
    return Section("comparison", "comparison", (Facts(tuple(rows)),))


def can_find(expected: Expectation, write: Writer) -> str:
    """Describe which differences such a comparison usually detects."""
    if expected.num_seeds < 2:
        return "nothing: one seed does not show the spread between seeds"
    if expected.detectable is None:
        return f"unknown before the first seeds{'' if write.in_points else f': {write.name} is no share of rows'}"
    alike, apart = map(write.found_from, expected.detectable)
    return f"differences {alike} if seeds differ by half a point, {apart} if by two (power 80 %)"


def _search_table(comparison: Comparison) -> Table:
    write = Writer.of(comparison.decision)
    rows = tuple(
        (
            untrusted(search.method),
            _rates_with_metrics(search.tried, write) or NOTHING,
            _rates_with_metrics(search.whole, write) or NOTHING,
            chosen_rate(search),
            search.reason,
        )
        for row in comparison.rows
        if (search := row.search) is not None
    )
    header = ("method", "short runs", "whole runs", "chosen", "why")
    caption = f"Learning rates with their {write.name} on the eval rows. *: a better rate may lie beyond those tried"
    return Table(caption, header, rows, frozenset({3}))


def chosen_rate(search: Search) -> str:
    """Format a rate, with a star if a better rate may lie beyond those tried."""
    return f"{format_number(search.chosen)}{'*' * search.on_edge}"


def _rates_with_metrics(tried: Mapping[float, float], write: Writer) -> str:
    return " · ".join(f"{format_number(rate)}: {write.value(tried[rate])}" for rate in sorted(tried))


def known(comparison: Comparison) -> list[Difference]:
    """Return the decisive differences whose spread between seeds is known."""
    return [one for one in comparison.decision.differences if one.decides and one.seeds_known]
