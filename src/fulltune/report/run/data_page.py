"""The page about the rows alone: `data.html` and `data.md`, before anything is trained."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from fulltune.audit.texts.flaw import ABOUT
from fulltune.records.audit import AUDIT, Audit, LabelErrors, Proofs, Remedy, proofs_of
from fulltune.report.format import words
from fulltune.report.format.blocks import (
    Bullets,
    Code,
    Element,
    Folded,
    Headline,
    Paragraph,
    Report,
    Section,
    Table,
    TableRow,
    untrusted,
)
from fulltune.report.format.pages import write_pages
from fulltune.report.run.about_data import data
from fulltune.report.run.read import RunView, read_run
from fulltune.stats.curves import error_of_share
from fulltune.text import counted, format_percent, format_share, listed

_CELL = 160
_FEW_SUSPECTS, _FEW_OF_ROWS = 30, 0.02
"""So few, or so small a share of the rows, have been suspected among rows without any wrong label."""
_MOST_LANGUAGES = 6
_MARGIN = 0.01
"""How exactly differences are written: in hundredths of a point."""


def write_data_page(folder: Path) -> Path:
    """Write `data.md` and `data.html` into a run folder whose rows were audited; gives the path of the latter."""
    view, audit = read_run(folder), Audit.load(folder / "data" / AUDIT)
    rows, dropped = sum(audit.rows.values()), sum(view.summary.dropped.values()) if view.summary else 0
    figures = [("rows looked at", f"{rows:,}"), ("dropped while reading", f"{dropped:,}")]
    if audit.labels is not None:
        figures.append(("labels suspected", f"{audit.labels.suspects:,}"))
    headline = Headline("better", "Nothing found", f"None of {counted(len(audit.clean), 'check')} found anything.")
    if audit.checks:
        most = ", ".join(f"{count:,} × {check}" for check, count in list(audit.checks.items())[:4])
        more = f" and {counted(len(audit.checks) - 4, 'more check')}" if len(audit.checks) > 4 else ""
        headline = Headline(
            "undecided",
            "Rows to look at",
            f"{counted(len(audit.checks), 'check')} found something in {rows:,} rows: {most}{more}.",
            note="Nothing was changed: each is a suspicion, with what could be done about it.",
        )
    sections = [*audit_for_terminal(audit, proofs_of(folder, audit)), *(_check(audit, check) for check in audit.checks)]
    sections += [*filter(None, [data(view)]), _next(view, audit)]
    report = Report(view.name, f"The data · {view.task}", headline, tuple(figures), tuple(sections))
    return write_pages(folder / "data", report)


def audit_for_terminal(audit: Audit, proofs: Sequence[Proofs]) -> list[Section]:
    """What stands in the terminal once the rows are audited."""
    return [part for part in (_found(audit), _cleaning(proofs)) if part is not None]


def _found(audit: Audit) -> Section:
    total = max(1, sum(audit.rows.values()))
    blocks: list[Element] = []
    if audit.checks:
        rows = tuple(
            (check, f"{count:,}", format_share(count / total), untrusted(f"{first.place}: {first.reason}", _CELL))
            for check, count in audit.checks.items()
            for first in audit.examples_of(check)[:1]
        )
        header = ("check", "rows", "of all", "for example")
        blocks.append(Table("Rows that each check found", header, rows, frozenset({1, 2})))
    if audit.clean:
        blocks.append(Paragraph(f"Looked for, and not found: {', '.join(audit.clean)}."))
    if audit.labels is not None:
        blocks.append(Paragraph(about_labels(audit.labels, audit.rows["train"])))
    blocks += [Paragraph(_languages(column, counts, total)) for column, counts in audit.languages.items() if counts]
    if audit.not_run:
        said = tuple(words.clipped(f"{check}: {why}", 300) for check, why in audit.not_run.items())
        blocks += [Paragraph("Not looked at:"), Bullets(said)]
    return Section("found", "What was found", tuple(blocks))


def _languages(column: str, counts: Mapping[str, int], rows: int) -> str:
    """In which languages a column's texts are, the most frequent ones by name."""
    most, others = list(counts.items())[:_MOST_LANGUAGES], list(counts.values())[_MOST_LANGUAGES:]
    shares = [f"{code} {format_share(count / rows)}" for code, count in most]
    shares += [f"{counted(len(others), 'other')} {format_share(sum(others) / rows)}"] if others else []
    rest = format_share(1 - sum(counts.values()) / rows)
    return f"Languages of column '{words.clipped(column, 60)}': {', '.join(shares)}; too short to tell, or none {rest}."


def about_labels(found: LabelErrors, of_rows: int) -> str:
    """How far the suspicion about labels can be trusted, by wrong labels that were planted."""
    some = "" if found.judged_rows == of_rows else f" of {of_rows:,}, drawn at random"
    told = (
        f"Labels of {found.judged_rows:,} train rows{some} were judged by linear classifiers on the untouched model, "
        f"each row by one that did not see it; they agree with {format_percent(found.agreement)} of them. How good "
        f"that is was measured: {counted(found.planted, 'row')} were given a wrong label on purpose."
    )
    doubt = (
        f" {counted(found.doubtful, 'further row' if found.suspects else 'row')} have another label that is clearly "
        "likelier. Where classes are mixed up again and again, nothing but a look tells how many of these are wrong."
    )
    doubt = doubt if found.doubtful else ""
    if not found.suspects:
        return f"{told} By that measure no suspicion would be right for three rows in four, so none is raised.{doubt}"
    told += f" {round(found.recall * found.planted):,} of these would be among the suspects; of the "
    told += counted(found.suspects, "suspect")
    if found.suspects < max(_FEW_SUSPECTS, _FEW_OF_ROWS * found.judged_rows):
        few = "too few to tell, for rows without any wrong label may have as many; read them"
        return f"{told} between 0 and {found.suspects:,} are wrong: {few}.{doubt}"
    # The estimate rests on those that lie where the surest half of the planted errors lies.
    error = 1.96 * error_of_share(found.precision, found.suspects // 2)
    least, most = (max(0.0, min(1.0, found.precision + one)) * found.suspects for one in (-error, error))
    return (
        f"{told} about {found.precision:.0%} are wrong, by the same measure (between {least:,.0f} and {most:,.0f}), "
        f"and in all about {round(min(found.estimated_errors, found.suspects / found.recall)):,} labels.{doubt}"
    )


def _cleaning(all_proofs: Sequence[Proofs]) -> Section | None:
    blocks = [block for proofs in all_proofs for block in _proved(proofs)]
    return Section("cleaning", "Would cleaning help?", tuple(blocks)) if blocks else None


def _proved(proofs: Proofs) -> list[Element]:
    """What came of each cleaning step, and how that was found."""
    if not proofs.proofs:
        return [Paragraph(f"No step could be compared by {proofs.source}.")]
    write, rows = words.Writer(proofs.metric, _MARGIN), list[TableRow]()
    for one in proofs.proofs:
        done, then = {"drop": "left out", "replace": "changed"}[one.action], write.value(one.before + one.difference)
        difference = write.interval(one.difference, one.low, one.high)
        rows.append((one.check, done, f"{one.rows:,}", then, difference, proofs.verdict(one)))
    if proofs.source == "classifiers":
        over, how = "eval rows", f"Linear classifiers on the untouched model were fitted {proofs.repetitions} times"
    else:
        over, how = "eval rows and seeds", f"The model was trained with {counted(proofs.repetitions, 'seed')}"
    tried = f" Not tried, for too few rows or too many: {'; '.join(proofs.untried)}." if proofs.untried else ""
    difference = f"difference{' in points' if write.in_points else ''}"
    header = ("check", "its rows", "rows", write.name, difference, "verdict")
    caption = f"By {proofs.source}: {write.name} with each step alone; intervals over {over} that together hold in 95 %"
    return [
        Paragraph(
            f"{how} with each step, and without, and compared on the same {counted(proofs.eval_rows, 'eval row')}. "
            f"Without any cleaning: {write.name} {write.value(proofs.proofs[0].before)}.{tried}"
        ),
        Table(caption, header, tuple(rows), frozenset({2, 3, 4})),
        Paragraph(
            f"{_advice(proofs)} The eval rows are as they are: where their labels are wrong in the same way, cleaning "
            "looks worse than it is."
        ),
    ]


def _advice(proofs: Proofs) -> str:
    helping = [one for one in proofs.proofs if proofs.verdict(one) == "helps"]
    if not helping:
        return "No step helps as far as can be told: leave the rows as they are, or read some of them first."
    if proofs.source == "trainings":
        return f"What helped can be named as data.patch: {listed([one.patch for one in helping])}."
    checks = listed(list(dict.fromkeys(one.check for one in helping)))
    return f"Worth a few trainings (--trainings 3): {checks}. What helps classifiers need not help a trained model."


def _check(audit: Audit, check: str) -> Section:
    count, examples = audit.checks[check], audit.examples_of(check)
    has_labels = any(one.label for one in examples)
    cells = (
        (one.place, one.text, *([one.label or "-"] if has_labels else []), one.reason, could_do(one.remedy))
        for one in examples
    )
    rows = tuple(tuple(untrusted(text, _CELL) for text in row) for row in cells)
    first = f"The {len(rows)} surest" if any(one.score for one in examples) else f"The first {len(rows)}"
    caption = f"{first} of {count:,}; data/issues.jsonl has all" if len(rows) < count else "All of them"
    table = Table(caption, ("row", "text", *(["label"] if has_labels else []), "why", "could be"), rows)
    title = f"{check[0].upper()}{check[1:]}: {counted(count, 'row')}"
    return Section(check.replace(" ", "-"), title, (Paragraph(ABOUT[check]), table))


def could_do(remedy: Remedy) -> str:
    """What could be done with a row, in words."""
    if remedy.action == "drop":
        return "left out"
    value = ", ".join(remedy.value) if isinstance(remedy.value, list) else remedy.value
    return f"{remedy.column}: {value}"


def _next(view: RunView, audit: Audit) -> Section:
    folder = shlex.quote(str(view.folder))
    blocks: list[Element] = []
    if audit.checks:
        blocks = [
            Paragraph("Go through these rows, the surest first, and decide: keep, leave out or change."),
            Code(f"fulltune data {folder} --review", "sh"),
            Paragraph(
                "What you decide is written into a patch file. Name it in the recipe as data.patch: it is applied each "
                "time the data is read, so that every run is made from the same rows."
            ),
        ]
    limits = (
        "Texts are looked at one by one: a wrong fact or a poor answer is not found.",
        "A label error is a label that disagrees with rows alike. Where a whole class is labelled wrongly, all agree.",
        "Secrets and personal data are found by their form. Names and addresses of people have none.",
    )
    blocks.append(Folded("what these checks cannot see", (Bullets(limits),)))
    return Section("next", "What to do next", tuple(blocks))
