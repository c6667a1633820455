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
    Folded,
    Headline,
    NameAndValue,
    Paragraph,
    Report,
    Section,
    Table,
    unless_empty,
    untrusted,
)
from fulltune.report.format.words import NOTHING, MetricFormatter, format_large_number, format_ratio
from fulltune.text import counted, format_bytes, format_number, format_seconds, format_share, listed

_POINTER = "▸ "
_MADE_FROM = Paragraph("The file proof.json in this folder contains every number of this report.")


def build_comparison_report(comparison: Comparison) -> Report:
    sections = (
        _build_reasons_section(comparison),
        Section("field", "The methods", _build_method_tables(comparison)),
        Section("fairness", "Fairness", (_build_fairness_block(comparison),)),
        build_details_section(comparison),
        Section("again", "Reproduce", (Code(comparison.command, "sh"), _MADE_FROM)),
    )
    rows = counted(comparison.train_rows, "train row")
    return Report(
        title=comparison.name,
        subtitle=f"Is full fine-tuning worth it? {words.strip_folders(comparison.model)} · {comparison.task} · {rows}",
        headline=_build_headline(comparison),
        key_figures=(),
        sections=tuple(section for section in sections if section is not None),
    )


def build_comparison_terminal_report(comparison: Comparison) -> list[Headline | Section | Element]:
    """Return the parts that are printed at the end of a comparison."""
    took = tuple(one for one in list_comparison_facts(comparison) if one[0] == "took")
    parts = (
        _build_headline(comparison),
        _build_reasons_section(comparison),
        Section("field", "The methods", _build_method_tables(comparison)),
        Section("fairness", "Fairness", (_build_fairness_block(comparison),)),
        Section("how", "How it was made", (Facts(took),)),
    )
    return [part for part in parts if part is not None]


def format_verdict(decision: Decision) -> str:
    """Format the verdict, and name the recommended method unless it is full fine-tuning: `PEFT: lora`."""
    name = decision.recommended
    advice = {"PEFT": f": {name}", "VARIANT": f": {name}", "EQUIVALENT": f": use {name}"}
    return decision.verdict + advice.get(decision.verdict, "")


def _build_headline(comparison: Comparison) -> Headline:
    decision, write = comparison.decision, MetricFormatter.of(comparison.decision)
    rivals = sum(one.decides for one in decision.differences)
    together = f" jointly for {rivals} methods" if rivals > 1 else ""
    smaller = "" if comparison.decision.greater_is_better else f" Smaller {write.name} is better."
    terms = (
        f"Margin: differences below {write.amount(decision.margin)} of {write.name} do not matter. Confidence: "
        f"{_confidence_level(comparison)}{together}. Measured on {counted(decision.num_rows, 'test row')}.{smaller}"
    )
    sentence = f"{_baseline_note(comparison)} {decision.headline}".lstrip()
    findings, opened = list_warnings(comparison), comparison.verdicts_on_test_rows
    unfair = sum(one.startswith("Unfair") for one in findings)
    counts = ((unfair, "unfair setting"), (len(findings) - unfair, "note"))
    parts = [counted(count, noun) for count, noun in counts if count]
    again = f"These test rows were used for {opened} verdicts, which together keep this confidence. "
    warning = again * (opened > 1) + (f"{listed(parts)}: see Fairness." if parts else "")
    return Headline(decision.verdict.lower(), format_verdict(decision), sentence, note=terms, warning=warning)


def _baseline_note(comparison: Comparison) -> str:
    """Return a sentence unless the recommended (or best) method is clearly better than all baselines, else ""."""
    scored = [one for one in comparison.baselines if comparison.decision.metric in one.metrics]
    trained = [row for row in comparison.rows if row.seeds]
    if not scored:
        return ""
    sign = 1 if comparison.decision.greater_is_better else -1
    best = max(scored, key=lambda scores: sign * scores.metrics[comparison.decision.metric].value)
    row = max(trained, key=lambda row: (row.method == comparison.decision.recommended, sign * row.metric.value))
    value, write = best.metrics[comparison.decision.metric].value, MetricFormatter.of(comparison.decision)
    if sign * value < min(sign * row.metric.low, sign * row.metric.high):
        return ""
    how = "does not clearly beat it" if sign * row.metric.value > sign * value else "does not beat it"
    beaten = f"{row.method} {how} with {write.estimate(row.metric)}"
    return f"{best.name} needs no training and reaches {write.value(value)}; {beaten}."


def _confidence_level(comparison: Comparison) -> str:
    return f"{100 * comparison.decision.confidence:g}%"


def _build_reasons_section(comparison: Comparison) -> Section | None:
    decision, to_do = comparison.decision, list(comparison.decision.would_decide)
    if comparison.can_resume:
        limit = comparison.expectation.budget_seconds
        previous = f" (the budget was {format_seconds(limit)})" if limit else ""
        more = f"rerun the same command with a larger --budget{previous}; it resumes from these trials"
        to_do.insert(0, more)
    items = (*decision.because, *(f"What to do: {one}" for one in to_do), *decision.notes)
    return unless_empty("Why", [Bullets(items)] if items else [])


def _build_method_tables(comparison: Comparison) -> tuple[Element, ...]:
    fewer = [row.method for row in comparison.rows if row.waited and row.method != comparison.decision.recommended]
    tables = (_build_quality_table(comparison), _build_cost_table(comparison))
    if not fewer:
        return tables
    why = f"{', '.join(fewer)}: trained with fewer seeds, because full and the best other method come first"
    return (*tables, Bullets((why,)))


def _method_cell(row: MethodRow, comparison: Comparison) -> Cell:
    return untrusted(f"{_POINTER}{row.method}" if row.method == comparison.decision.recommended else row.method)


def _build_quality_table(comparison: Comparison) -> Table:
    write = MetricFormatter.of(comparison.decision)
    behind = {one.method: write.adjusted(one) for one in comparison.decision.differences}
    rows = []
    for row in comparison.rows:
        updated = words.format_count(row.num_trainable)
        if row.num_trainable and row.num_parameters:
            updated += f" ({format_share(row.num_trainable / row.num_parameters)})"
        rows.append(
            (
                _method_cell(row, comparison),
                updated,
                write.estimate(row.metric),
                "reference" if row.kind == "full" else behind.get(row.method, NOTHING),
                NOTHING if row.gain_share is None else format_share(row.gain_share),
                NOTHING if row.drift is None else format_number(row.drift.value),
                NOTHING if row.search is None else format_chosen_rate(row.search),
                str(len(row.seeds) or NOTHING),
            )
        )
    level = _confidence_level(comparison)
    recommended = f"{_POINTER}marks the recommended method. " if comparison.decision.recommended else ""
    spread = "rows and seeds" if differences_with_spread(comparison) else "rows only, because there is one seed"
    caption = (
        f"Quality on the test rows. {recommended}{write.name}: mean over seeds, with a {level} interval over {spread}. "
        "The intervals of the differences hold jointly for all methods that decide the verdict. "
        "Above 0, full is better. "
        f"Drift: {comparison.drift_unit} on generic text. *: the best rate is at the edge of those tried"
    )
    better = f"full is better by{' [points]' if write.in_points else ''}"
    metric = f"{write.name} [{level}]"
    header = ("method", "parameters updated", metric, better, "share of full's gain", "drift", "rate", "seeds")
    return Table(caption, header, tuple(rows), frozenset(range(1, len(header))))


def _build_cost_table(comparison: Comparison) -> Table:
    full = _full_row(comparison)

    def format_cost_and_ratio(row: MethodRow, field: str, format_value: Callable[[float], str]) -> str:
        value, whole = float(getattr(row, field)), float(getattr(full, field))
        if value <= 0:
            return NOTHING
        return format_value(value) + ("" if row is full or not whole else f" · {format_ratio(value / whole)}")

    rows = tuple(
        (
            _method_cell(row, comparison),
            format_cost_and_ratio(row, "train_seconds", format_seconds),
            format_large_number(row.tokens_per_second) if row.tokens_per_second else NOTHING,
            format_cost_and_ratio(row, "train_flops", format_large_number),
            format_cost_and_ratio(row, "peak_memory_bytes", format_bytes),
            format_cost_and_ratio(row, "memory_growth_bytes", format_bytes),
            format_cost_and_ratio(row, "saved_bytes", format_bytes),
            f"{format_number(1000 * row.seconds_per_row)} ms" if row.seconds_per_row else NOTHING,
        )
        for row in comparison.rows
    )
    caption = (
        "Cost of one whole run (median over seeds, maximum for memory). ×: relative to full. FLOP: forward "
        "and backward passes of all steps. Growth: memory beyond what was in use before the model was loaded. Saved: "
        "trained weights on disk. Per row: time to predict one test row in a batch"
    )
    header = ("method", "training time", "tokens/s", "FLOP", "peak memory", "growth", "saved", "per row")
    return Table(caption, header, rows, frozenset(range(1, len(header))))


def _full_row(comparison: Comparison) -> MethodRow:
    return next(row for row in comparison.rows if row.kind == "full")


def _build_fairness_block(comparison: Comparison) -> Element:
    findings = list_warnings(comparison)
    return Bullets(tuple(findings)) if findings else Paragraph("No unfair setting was found.")


def list_warnings(comparison: Comparison) -> list[str]:
    """List warnings about unfair settings and low statistical power. Unfair settings come first."""
    lines = [
        f"{'Unfair' if finding.level == 'unfair' else 'Note'}: {finding.where}: {finding.what}. To do: {finding.to_do}."
        for finding in comparison.findings
    ]
    decision = comparison.decision
    write, deciding = MetricFormatter.of(decision), differences_with_spread(comparison)
    still_open = [one for one in deciding if one.is_open]
    if any(one.detectable > decision.margin for one in still_open):
        lines.append(
            "Note: with these test rows and seeds, a comparison has an 80% chance of detecting differences "
            f"{listed([f'of {write.amount(one.detectable)} or more ({one.method})' for one in still_open])}, but the "
            f"margin is only {write.amount(decision.margin)}."
        )
    return lines


# ---- how it was made -----------------------------------------------------------------------------------------


def build_details_section(comparison: Comparison) -> Section:
    """Build the section on rows, time, learning rates, baselines, seeds and versions."""
    blocks: list[Element] = [Facts(tuple(list_comparison_facts(comparison))), _build_learning_rate_table(comparison)]
    if comparison.baselines:
        write = MetricFormatter.of(comparison.decision)
        scored = [one for one in comparison.baselines if comparison.decision.metric in one.metrics]
        rows = tuple((untrusted(one.name), write.estimate(one.metrics[comparison.decision.metric])) for one in scored)
        blocks.append(Table("Without training", ("baseline", write.name), rows, frozenset({1})))
    if comparison.looks:
        looks = tuple(f"{counted(look.num_seeds, 'seed')}: {look.reason}" for look in comparison.looks)
        blocks.append(Folded("After each seed", (Bullets(looks),)))
    if comparison.notes:
        blocks.append(Bullets(comparison.notes))
    blocks.append(Folded("Versions", (Facts(tuple(comparison.versions.items())),)))
    return Section("how", "How it was made", tuple(blocks))


def list_comparison_facts(comparison: Comparison) -> list[NameAndValue]:
    """List facts about rows, time, seeds and the use of the test rows."""
    expected, openings = comparison.expectation, comparison.openings
    cores, full_seconds = counted(comparison.cores, "core"), _full_row(comparison).train_seconds
    as_long = f"{format_ratio(comparison.seconds / full_seconds)} as long as"
    took = f"{format_seconds(comparison.seconds)} in total, {as_long} one full run ({format_seconds(full_seconds)})"
    times = "once" if len(openings) == 1 else f"{len(openings)} times"
    mixed = f" and {comparison.mixed_rows:,} mixed in per epoch" if comparison.mixed_rows else ""
    opened = f"{times}: " + "; ".join(opening.time for opening in openings)
    write = MetricFormatter.of(comparison.decision)
    spread = [f"{method} {write.amount(sd)}" for method, sd in comparison.decision.seed_sds.items()]
    lines = [
        (
            "rows",
            f"{comparison.train_rows:,} train{mixed}, {comparison.eval_rows:,} eval (to choose rates and checkpoints), "
            f"{comparison.test_rows:,} test; data fingerprint {comparison.data_fingerprint[:12]}",
        ),
        ("test rows used for a verdict", opened if openings else "not recorded"),
        ("took", f"{took}; {comparison.device}, {cores}"),
        ("standard deviation between seeds", ", ".join(spread)),
        ("design" if expected.budget_seconds is None else "budget", "; ".join(expected.notes)),
        ("drift", f"{comparison.drift_unit} relative to the pretrained model, on {comparison.generic_text}"),
    ]
    return [(name, value) for name, value in lines if value]


def build_expectation_section(expected: Expectation, formatter: MetricFormatter) -> Section:
    """Build the section shown before a comparison: its trials, time and detectable differences."""
    search, whose = "", "of each method"
    if expected.num_search_trials:
        search = f"{expected.num_search_trials} short trials (more if the best rate is at the edge), then "
    if expected.sequential and expected.num_seeds > 1:
        whose = "of each method at most; a clear result needs fewer"
        if expected.budget_seconds is not None:
            rest = " and one of each other method" if len(expected.methods) > 2 else ""
            whose = f"of full and of the best other method{rest}"
    takes = f"about {format_seconds(expected.seconds)}"
    if expected.budget_seconds is not None:
        limit = format_seconds(expected.budget_seconds)
        takes += f" of the {limit} budget; the rest is a reserve, because forecasts can be wrong"
    rows = [
        ("methods", ", ".join(expected.methods)),
        ("trials", f"{search}{counted(expected.num_seeds, 'seed')} {whose}"),
        ("takes", takes),
        ("detectable", describe_detectable(expected, formatter)),
        *(("note" if expected.budget_seconds is None else "budget", note) for note in expected.notes),
    ]
    if expected.detectable is not None and expected.detectable[0] > formatter.margin:
        more = "too small to detect reliably, so the comparison may end UNDECIDED (more test rows or seeds help)"
        rows.append(("margin", f"{formatter.amount(formatter.margin)}, {more}"))
    return Section("comparison", "comparison", (Facts(tuple(rows)),))


def describe_detectable(expected: Expectation, formatter: MetricFormatter) -> str:
    """Describe how large a difference must be for this comparison to detect it."""
    if expected.num_seeds < 2:
        return "nothing, because one seed does not show the spread between seeds"
    if expected.detectable is None:
        reason = "" if formatter.in_points else f", because {formatter.name} is not a share of rows"
        return f"unknown until the first seeds are trained{reason}"
    alike, apart = (f"of {formatter.amount(size)} or more" for size in expected.detectable)
    return (
        f"differences {alike} if the standard deviation between seeds is half a point, {apart} if it is two (power 80%)"
    )


def _build_learning_rate_table(comparison: Comparison) -> Table:
    write = MetricFormatter.of(comparison.decision)
    rows = tuple(
        (
            untrusted(search.method),
            _rates_with_metrics(search.tried, write) or NOTHING,
            _rates_with_metrics(search.whole, write) or NOTHING,
            format_chosen_rate(search),
            search.reason,
        )
        for row in comparison.rows
        if (search := row.search) is not None
    )
    header = ("method", "short runs", "whole runs", "chosen", "why")
    caption = f"Scores ({write.name}) on the eval rows by learning rate. *: a better rate may lie beyond those tried"
    return Table(caption, header, rows, frozenset({3}))


def format_chosen_rate(search: Search) -> str:
    """Format the chosen rate, with a star if a better rate may lie beyond those tried."""
    return f"{format_number(search.chosen)}{'*' * search.on_edge}"


def _rates_with_metrics(tried: Mapping[float, float], formatter: MetricFormatter) -> str:
    return " · ".join(f"{format_number(rate)}: {formatter.value(tried[rate])}" for rate in sorted(tried))


def differences_with_spread(comparison: Comparison) -> list[Difference]:
    """Return the differences that decide the verdict and whose spread between seeds is known."""
    return [one for one in comparison.decision.differences if one.decides and one.seeds_known]
