"""How a comparison was made: its rows, its time, its searches, and what it could have found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fulltune.records.comparison import Comparison, Difference, Search
from fulltune.report.comparison import held
from fulltune.report.comparison.numbers import NOTHING, Writer, ratio
from fulltune.report.format.blocks import Block, Bullets, Facts, Folded, Section, Table, foreign
from fulltune.text import counted, format_number, format_seconds


def how(comparison: Comparison) -> Section:
    """The section: rows, time, what could be found, rates, baselines, versions."""
    blocks: list[Block] = [Facts(tuple(facts(comparison))), _searches(comparison)]
    if comparison.baselines:
        write = Writer.of(comparison.decision)
        scored = [one for one in comparison.baselines if comparison.metric in one.metrics]
        rows = tuple((foreign(one.name), write.estimate(one.metrics[comparison.metric])) for one in scored)
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
    expected, openings = comparison.expectation, comparison.openings
    cores, one = counted(comparison.cores, "core"), comparison.full_run_seconds
    took = f"{format_seconds(comparison.seconds)} in all"
    if one > 0:
        took += f", {ratio(comparison.seconds / one)} one full run ({format_seconds(one)})"
    times = "once" if len(openings) == 1 else f"{len(openings)} times"
    mixed = f" and {comparison.mixed_rows:,} mixed into each epoch" if comparison.mixed_rows else ""
    opened = f"{times}: " + "; ".join(f"{one.time} by {one.by}" for one in openings)
    write = Writer.of(comparison.decision)
    spread = [f"{arm} by {write.amount(one)}" for arm, one in comparison.decision.seed_sds.items()]
    found = [
        (
            "rows",
            f"{comparison.train_rows:,} to train{mixed}, {comparison.eval_rows:,} to choose rates and checkpoints, "
            f"{comparison.test_rows:,} to test; data {comparison.data_fingerprint[:12]}",
        ),
        ("test rows used for a verdict", opened if openings else "not noted"),
        ("took", f"{took}; {comparison.device}, {cores}"),
        ("could find", _could_find(comparison)),
        ("seeds differed", f"{', '.join(spread)} (standard deviation)" if spread else ""),
        ("design" if expected.budget_seconds is None else "budget", "; ".join(expected.notes)),
        held.fact(comparison),
        ("started", comparison.started),
    ]
    return [(name, value) for name, value in found if value]


def _could_find(comparison: Comparison) -> str:
    parts, expected, write = [], comparison.expectation, Writer.of(comparison.decision)
    if expected.detectable is not None:
        seeds, (alike, apart) = counted(expected.num_seeds, "seed"), map(write.found_from, expected.detectable)
        where = f"{alike}, where seeds differ by half a point, {apart} where by two"
        parts.append(f"expected before the start, with {seeds}: {where}")
    if found := found_from(known(comparison), write):
        parts.append(f"in the end: {found}; true differences of that size are found in 8 of 10 comparisons")
    return "; ".join(parts)


def _searches(comparison: Comparison) -> Table:
    write = Writer.of(comparison.decision)
    rows = tuple(
        (
            foreign(one.arm),
            _tried(one.tried, write) or NOTHING,
            _whole(one, write) or NOTHING,
            chosen_rate(one),
            one.reason,
        )
        for row in comparison.rows
        if (one := row.search) is not None
    )
    header = ("method", "short runs", "whole runs", "chosen", "why")
    caption = f"Learning rates with their {write.name} on the eval rows. *: a better one may lie beyond those tried"
    return Table(caption, header, rows, frozenset({3}))


def chosen_rate(search: Search) -> str:
    """`0.0002`, with a star where a better one may lie beyond those tried."""
    return f"{format_number(search.chosen)}{'*' * search.on_edge}"


def _whole(search: Search, write: Writer) -> str:
    """Whole runs at different rates, and how many were given up before (diverged, or below their short run)."""
    apart = max(0, search.other_runs - max(0, len(search.whole) - 1))
    return " · ".join([_tried(search.whole, write)] * bool(search.whole) + [f"{apart} given up"] * bool(apart))


def _tried(tried: Mapping[float, float], write: Writer) -> str:
    return " · ".join(f"{format_number(rate)}: {write.value(tried[rate])}" for rate in sorted(tried))


def known(comparison: Comparison) -> list[Difference]:
    """The deciding differences of which the spread between seeds is known."""
    return [one for one in comparison.decision.differences if one.decides and one.seeds_known]


def found_from(differences: Sequence[Difference], write: Writer) -> str:
    """From which size on a difference to each method is found in 8 of 10 cases."""
    return ", ".join(f"{write.found_from(one.detectable)} ({one.arm})" for one in differences)
