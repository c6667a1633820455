"""The page about the rows alone: `data.html` and `data.md`, before anything is trained."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from fulltune.records.audit import AUDIT, Audit, CheckFound, LabelErrors, Proof, Proofs, Remedy, proofs_of
from fulltune.report.format import words
from fulltune.report.format.blocks import (
    Block,
    Bullets,
    Code,
    Folded,
    Headline,
    Paragraph,
    Report,
    Row,
    Section,
    Table,
    foreign,
)
from fulltune.report.format.html import page
from fulltune.report.format.markdown import markdown
from fulltune.report.format.words import write_harmless
from fulltune.report.run import about_data
from fulltune.report.run.read import RunView, read_run
from fulltune.stats.shares import error_of_share
from fulltune.text import counted, format_metric, format_percent, format_share, is_share, listed

PAGE = "data.html"
_CELL = 160
_FEW_SUSPECTS, _FEW_OF_ROWS = 30, 0.02
"""So few, or so small a share of the rows, have been suspected among rows without any wrong label."""
_MOST_LANGUAGES = 6
_ABOUT = {
    "label error": "Train rows whose label is probably wrong; how far to trust that stands above.",
    "doubtful label": "Train rows with another label that is clearly likelier. Read some before you change any.",
    "outlier": "Rows that the untouched model takes for unlike all train rows: of another topic, or no text that makes "
    "sense, but also rare questions that belong there. Rows of another topic that are many are not found. Leaving out "
    "eval or test rows because they are odd flatters the model.",
    "high loss": "Train and eval rows on which the trained model has the highest loss: a list to read, and no claim. A "
    "model that has learned a wrong label by heart has a low loss on it, so the eval rows, which it did not learn "
    "from, tell more. Change only what is wrong: eval rows that are left out because they are hard flatter the model.",
    "duplicate": "Train rows that stand in train before, label or answer included. They count twice while training.",
    "near leak": "Train rows whose text is nearly one that is scored on: most runs of five letters are the same.",
    "leak": "Train rows whose text is scored on, too. The scores flatter the model: leave these rows out of train.",
    "conflicting labels": "Train rows with the same text and different labels: at most one of them can be learned.",
    "class names": "Rows of a class that is perhaps another one: the names differ in capitals, blanks, form or look.",
    "broken encoding": "Text that was read in the wrong encoding once ('Ã©' for 'é'); the repair is shown.",
    "control characters": "Characters that nobody sees (NUL, zero-width, direction marks) and that tokenizers do.",
    "empty": "Texts without anything to read.",
    "no words": "Texts with fewer than two letters.",
    "markup": "Texts that are HTML, or in which some of it is left.",
    "placeholder": "Templates that were not filled in.",
    "chat tokens": "Marks of a chat template inside a text: the model's own template would come on top.",
    "repetition": "The same again and again.",
    "secret": "Keys, tokens and passwords: a model may learn them by heart. They are masked here.",
    "personal data": "E-mail addresses, card and account numbers and the like. They are masked here.",
    "phone number": "Phone numbers, masked here.",
    "chat fault": "Conversations with an empty turn, turns in a wrong order, or calls and results that do not fit.",
    "other language": "Texts in a language that hardly any other row of their column is in.",
    "refusal": "Answers in which a model declines: a model that is trained on them declines, too.",
}


def write_data_page(folder: Path) -> Path:
    """Write `data.md` and `data.html` into a run folder whose rows were audited; gives the path of the latter."""
    view, audit = read_run(folder), Audit.load(folder / "data" / AUDIT)
    report = build(view, audit, proofs_of(folder, audit))
    write_harmless(folder / "data.md", markdown(report), private=True)
    write_harmless(folder / PAGE, page(report), private=True)
    return folder / PAGE


def build(view: RunView, audit: Audit, proofs: Sequence[Proofs] = ()) -> Report:
    """What is known about the rows of a run."""
    rows = sum(audit.rows.values())
    sections = [_found(audit), _cleaning(proofs), *map(_check, audit.checks), about_data.data(view), _next(view, audit)]
    dropped = sum(view.summary.dropped.values()) if view.summary else 0
    figures = [("rows looked at", f"{rows:,}"), ("dropped while reading", f"{dropped:,}")]
    if audit.labels is not None:
        figures.append(("labels suspected", f"{audit.labels.suspects:,}"))
    return Report(
        title=view.name,
        subtitle=f"The data · {view.task}",
        headline=_headline(audit, rows),
        key_figures=tuple(figures),
        sections=tuple(section for section in sections if section is not None),
    )


def _headline(audit: Audit, rows: int) -> Headline:
    if not audit.checks:
        return Headline("better", "Nothing found", f"None of {counted(len(audit.clean), 'check')} found anything.")
    most = ", ".join(f"{found.rows:,} × {found.check}" for found in audit.checks[:4])
    more = f" and {counted(len(audit.checks) - 4, 'more check')}" if len(audit.checks) > 4 else ""
    return Headline(
        "undecided",
        "Rows to look at",
        f"{counted(len(audit.checks), 'check')} found something in {rows:,} rows: {most}{more}.",
        note="Nothing was changed: each is a suspicion, with what could be done about it.",
    )


def in_short(audit: Audit, proofs: Sequence[Proofs]) -> list[Section]:
    """What stands in the terminal once the rows are audited."""
    return [part for part in (_found(audit), _cleaning(proofs)) if part is not None]


def _found(audit: Audit) -> Section:
    total = max(1, sum(audit.rows.values()))
    rows: list[Row] = []
    for found in audit.checks:
        first = found.examples[0]
        example = foreign(f"{first.place}: {first.reason}", _CELL)
        rows.append((found.check, f"{found.rows:,}", format_share(found.rows / total), example))
    blocks: list[Block] = []
    if rows:
        header = ("check", "rows", "of all", "for example")
        blocks.append(Table("Rows that each check found", header, tuple(rows), frozenset({1, 2})))
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
        f"each row by one that did not see it; they agree with {format_percent(found.agree)} of them. How good that is "
        f"was measured: {counted(found.planted, 'row')} were given a wrong label on purpose."
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
        few = "too few" if found.suspects < _FEW_SUSPECTS else "too small a share of the rows"
        few += " to tell, for rows without any wrong label may have as many; read them"
        return f"{told} between 0 and {found.suspects:,} are wrong: {few}.{doubt}"
    # The estimate rests on those that lie where the surest half of the planted errors lies.
    error = 1.96 * error_of_share(found.precision, found.suspects // 2)
    least, most = (max(0.0, min(1.0, found.precision + one)) * found.suspects for one in (-error, error))
    return (
        f"{told} about {found.precision:.0%} are wrong, by the same measure (between {least:,.0f} and {most:,.0f}), "
        f"and in all about {round(min(found.wrong, found.suspects / found.recall)):,} labels.{doubt}"
    )


def about_proofs(proofs: Proofs) -> str:
    """How cleaning steps were compared."""
    name, rows = words.metric_name(proofs.metric), counted(proofs.eval_rows, "eval row")
    how = (
        f"Linear classifiers on the untouched model were fitted {proofs.times} times with each step, and without"
        if proofs.by == "classifiers"
        else f"The model was trained with each step, and without, with {counted(proofs.times, 'seed')} each"
    )
    before = format_metric(proofs.metric, proofs.proofs[0].before) if proofs.proofs else "-"
    tried = f" Not tried, for too few rows or too many: {'; '.join(proofs.left_out)}." if proofs.left_out else ""
    return f"{how}, and compared on the same {rows}. Without any cleaning: {name} {before}.{tried}"


def proof_rows(proofs: Proofs) -> list[tuple[str, str, str, str, str, str]]:
    """The check, what is done with its rows, how many, the metric then, how it differs, and the verdict."""
    done = {"drop": "left out", "replace": "changed"}
    return [
        (
            one.check,
            done[one.action],
            f"{one.rows:,}",
            format_metric(proofs.metric, one.before + one.difference),
            _difference(proofs.metric, one),
            proofs.verdict(one),
        )
        for one in proofs.proofs
    ]


def _difference(metric: str, proof: Proof) -> str:
    scale, decimals = (100, 1) if is_share(metric) else (1, 3)
    values = (round(scale * one, decimals) + 0.0 for one in (proof.difference, proof.low, proof.high))
    value, low, high = (f"{one:+.{decimals}f}" for one in values)
    return f"{value} [{low}, {high}]"


def _cleaning(all_proofs: Sequence[Proofs]) -> Section | None:
    blocks: list[Block] = []
    for proofs in all_proofs:
        if not proofs.proofs:
            blocks.append(Paragraph(f"No step could be compared by {proofs.by}."))
            continue
        name, points = words.metric_name(proofs.metric), " in points" if is_share(proofs.metric) else ""
        header = ("check", "its rows", "rows", name, f"difference{points}", "verdict")
        over = "eval rows" if proofs.by == "classifiers" else "eval rows and seeds"
        caption = f"By {proofs.by}: {name} with each step alone; intervals over {over} that together hold in 95 %"
        blocks += [
            Paragraph(about_proofs(proofs)),
            Table(caption, header, tuple(proof_rows(proofs)), frozenset({2, 3, 4})),
            Paragraph(f"{_advice(proofs)} {_LIMITS}"),
        ]
    return Section("cleaning", "Would cleaning help?", tuple(blocks)) if blocks else None


_LIMITS = (
    "The eval rows are as they are: where their labels are wrong in the same way, cleaning looks worse than it is."
)


def _advice(proofs: Proofs) -> str:
    helping = [one for one in proofs.proofs if proofs.verdict(one) == "helps"]
    if not helping:
        return "No step helps as far as can be told: leave the rows as they are, or read some of them first."
    if proofs.by == "trainings":
        return f"What helped can be named as data.patch: {listed([one.patch for one in helping])}."
    checks = listed(list(dict.fromkeys(one.check for one in helping)))
    return f"Worth a few trainings (--trainings 3): {checks}. What helps classifiers need not help a trained model."


def _check(found: CheckFound) -> Section:
    rows: tuple[Row, ...] = tuple(
        (
            foreign(one.place, _CELL),
            foreign(one.text, _CELL),
            *([foreign(one.label or "-", _CELL)] if any(other.label for other in found.examples) else []),
            foreign(one.reason, _CELL),
            foreign(could_do(one.remedy), _CELL),
        )
        for one in found.examples
    )
    label = ["label"] if any(one.label for one in found.examples) else []
    first = f"The {len(rows)} surest" if any(one.score for one in found.examples) else f"The first {len(rows)}"
    caption = f"{first} of {found.rows:,}; data/issues.jsonl has all" if len(rows) < found.rows else "All of them"
    table = Table(caption, ("row", "text", *label, "why", "could be"), rows)
    title = f"{found.check[0].upper()}{found.check[1:]}: {counted(found.rows, 'row')}"
    about = [Paragraph(_ABOUT[found.check])] if found.check in _ABOUT else []
    return Section(found.check.replace(" ", "-"), title, (*about, table))


def could_do(remedy: Remedy) -> str:
    """What could be done with a row, in words."""
    if remedy.action == "drop":
        return "left out"
    value = ", ".join(remedy.value) if isinstance(remedy.value, list) else remedy.value
    return f"{remedy.column}: {value}"


def _next(view: RunView, audit: Audit) -> Section:
    folder = shlex.quote(str(view.folder))
    blocks: list[Block] = []
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
