from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from fulltune.audit.texts.flaw import ABOUT
from fulltune.records.audit import AUDIT, Audit, LabelErrors, Proofs, Remedy, load_proofs
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
from fulltune.report.run.about_data import build_data_section
from fulltune.report.run.read import RunView, read_run
from fulltune.stats.curves import standard_error_of_share
from fulltune.text import counted, format_percent, format_share, listed

_CELL = 160
_FEW_SUSPECTS, _FEW_OF_ROWS = 30, 0.02
_MOST_LANGUAGES = 6
_MARGIN = 0.01


def write_data_page(folder: Path) -> Path:
    """Write `data.md` and `data.html` for an audited run, and return the path of `data.html`."""
    view, audit = read_run(folder), Audit.load(folder / "data" / AUDIT)
    rows = sum(audit.rows.values())
    nothing = f"None of the {counted(len(audit.clean), 'check')} found anything in {counted(rows, 'row')}."
    headline = Headline("better", "Nothing found", nothing)
    if audit.checks:
        most = ", ".join(f"{count:,} × {check}" for check, count in list(audit.checks.items())[:4])
        more = f" and {counted(len(audit.checks) - 4, 'more check')}" if len(audit.checks) > 4 else ""
        headline = Headline(
            "undecided",
            "Rows to review",
            f"Of {rows:,} rows, some were found by {counted(len(audit.checks), 'check')}: {most}{more}.",
            note="No row was changed. Each finding is a suspicion with a suggested remedy.",
        )
    sections = [
        *audit_for_terminal(audit, load_proofs(folder, audit)),
        *(_build_check_section(audit, check) for check in audit.checks),
    ]
    sections += [*filter(None, [build_data_section(view)]), _build_next_steps_section(view, audit)]
    report = Report(view.name, f"The data · {view.task}", headline, (), tuple(sections))
    return write_pages(folder / "data", report)


def audit_for_terminal(audit: Audit, proofs: Sequence[Proofs]) -> list[Section]:
    """Return the sections that are printed after an audit."""
    blocks = [block for each in proofs for block in _build_cleaning_blocks(each)]
    cleaning = [Section("cleaning", "Would cleaning help?", tuple(blocks))] if blocks else []
    return [_build_findings_section(audit), *cleaning]


def _build_findings_section(audit: Audit) -> Section:
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
        blocks.append(Paragraph(f"Checks that found nothing: {', '.join(audit.clean)}."))
    if audit.labels is not None:
        blocks.append(Paragraph(describe_label_errors(audit.labels, audit.rows["train"])))
    blocks += [
        Paragraph(_describe_languages(column, counts, total)) for column, counts in audit.languages.items() if counts
    ]
    if audit.not_run:
        lines = tuple(words.cut_text(f"{check}: {why}", 300) for check, why in audit.not_run.items())
        blocks += [Paragraph("Not checked:"), Bullets(lines)]
    return Section("found", "Findings", tuple(blocks))


def _describe_languages(column: str, rows_by_language: Mapping[str, int], num_rows: int) -> str:
    most, others = list(rows_by_language.items())[:_MOST_LANGUAGES], list(rows_by_language.values())[_MOST_LANGUAGES:]
    shares = [f"{code} {format_share(count / num_rows)}" for code, count in most]
    shares += [f"{counted(len(others), 'other')} {format_share(sum(others) / num_rows)}"] if others else []
    rest = format_share(1 - sum(rows_by_language.values()) / num_rows)
    return f"Languages of column '{words.cut_text(column, 60)}': {', '.join(shares)}; undetermined {rest}."


def describe_label_errors(errors: LabelErrors, num_train_rows: int) -> str:
    """Describe how many suspected label errors are real, as estimated from labels changed on purpose."""
    some = "" if errors.judged_rows == num_train_rows else f" (a random sample of {num_train_rows:,})"
    text = (
        f"Linear classifiers on the pretrained model judged the labels of {errors.judged_rows:,} train rows{some}. "
        "Each row was judged by a classifier that was not fitted on it. The classifiers agree with "
        f"{format_percent(errors.agreement)} of the labels. To measure their reliability, "
        f"{counted(errors.planted, 'row')} were given a wrong label on purpose."
    )
    if not errors.suspects:
        return f"{text} Fewer than three in four flagged labels would really be wrong, so no row is flagged."
    text += f" {round(errors.recall * errors.planted):,} of these wrong labels would be flagged. Of the "
    text += counted(errors.suspects, "suspect")
    if errors.suspects < max(_FEW_SUSPECTS, _FEW_OF_ROWS * errors.judged_rows):
        few = "correct labels can look this suspicious too, so read the rows"
        return f"{text}, between 0 and {errors.suspects:,} are wrong: {few}."
    # The estimate rests on the suspects in the range of the surest half of the planted errors.
    error = 1.96 * standard_error_of_share(errors.precision, errors.suspects // 2)
    least, most = (max(0.0, min(1.0, errors.precision + one)) * errors.suspects for one in (-error, error))
    wrong = round(min(errors.estimated_errors, errors.suspects / errors.recall))
    return (
        f"{text}, about {errors.precision:.0%} ({least:,.0f} to {most:,.0f} rows) are mislabelled by the same "
        f"estimate, and about {wrong:,} labels in total."
    )


def _build_cleaning_blocks(proofs: Proofs) -> list[Element]:
    if not proofs.proofs:
        return [Paragraph(f"No cleaning step could be tested with {proofs.source}.")]
    write, rows = words.MetricFormatter(proofs.metric, _MARGIN), list[TableRow]()
    for proof in proofs.proofs:
        done, then = {"drop": "dropped", "replace": "changed"}[proof.action], proof.before + proof.difference
        difference = write.interval(proof.difference, proof.low, proof.high)
        rows.append((proof.check, done, f"{proof.rows:,}", write.value(then), difference, proofs.verdict(proof)))
    if proofs.source == "classifiers":
        over, how = "eval rows", f"Linear classifiers on the pretrained model were fitted {proofs.repetitions} times"
    else:
        over, how = "eval rows and seeds", f"The model was trained with {counted(proofs.repetitions, 'seed')}"
    tried = f" Not tried (too few or too many rows): {'; '.join(proofs.untried)}." if proofs.untried else ""
    difference = f"difference{' in points' if write.in_points else ''}"
    header = ("check", "action", "rows", write.name, difference, "verdict")
    caption = f"Measured with {proofs.source}: {write.name} after each step on its own; joint 95% intervals over {over}"
    return [
        Paragraph(
            f"{how} with and without each step, and compared on the same {counted(proofs.eval_rows, 'eval row')}. "
            f"Without cleaning: {write.name} {write.value(proofs.proofs[0].before)}.{tried}"
        ),
        Table(caption, header, tuple(rows), frozenset({2, 3, 4})),
        Paragraph(
            f"{_advise_on_cleaning(proofs)} The eval rows are not cleaned. If their labels are wrong in the same way, "
            "cleaning looks worse than it is."
        ),
    ]


def _advise_on_cleaning(proofs: Proofs) -> str:
    helping = [one for one in proofs.proofs if proofs.verdict(one) == "helps"]
    if not helping:
        return "No step helps measurably. Keep the rows unchanged, or read some of them first."
    if proofs.source == "trainings":
        patches = listed([one.patch for one in helping])
        return f"To apply the steps that helped, set data.patch to their patches: {patches}."
    checks = listed(list(dict.fromkeys(one.check for one in helping)))
    return f"Test these by training (--trainings 3): {checks}. What helps classifiers may not help a trained model."


def _build_check_section(audit: Audit, check: str) -> Section:
    count, examples = audit.checks[check], audit.examples_of(check)
    has_labels = any(one.label for one in examples)
    cells = (
        (row.place, row.text, *([row.label or "-"] if has_labels else []), row.reason, describe_remedy(row.remedy))
        for row in examples
    )
    rows = tuple(tuple(untrusted(text, _CELL) for text in row) for row in cells)
    first = f"The {len(rows)} most certain" if any(one.score for one in examples) else f"The first {len(rows)}"
    caption = f"{first} of {count:,}; data/issues.jsonl lists all" if len(rows) < count else "All rows"
    table = Table(caption, ("row", "text", *(["label"] if has_labels else []), "why", "remedy"), rows)
    title = f"{check[0].upper()}{check[1:]}: {counted(count, 'row')}"
    return Section(check.replace(" ", "-"), title, (Paragraph(ABOUT[check]), table))


def describe_remedy(remedy: Remedy) -> str:
    if remedy.action == "drop":
        return "drop the row"
    value = ", ".join(remedy.value) if isinstance(remedy.value, list) else remedy.value
    return f"{remedy.column}: {value}"


def _build_next_steps_section(view: RunView, audit: Audit) -> Section:
    folder = shlex.quote(str(view.folder))
    blocks: list[Element] = []
    if audit.checks:
        blocks = [
            Paragraph("Review these rows, the most certain findings first, and keep, drop or change each one."),
            Code(f"fulltune data {folder} --review", "sh"),
            Paragraph(
                "Your decisions are written to a patch file. Set data.patch to this file in the recipe. It is then "
                "applied whenever the data is read, so that every run uses the same rows."
            ),
        ]
    limits = (
        "Wrong facts and poor answers are not found, because each text is checked on its own.",
        "A label error is a label that disagrees with similar rows. If a whole class is mislabelled, none is found.",
        "Secrets and personal data are found by their format. Names and addresses have no format, so they are missed.",
    )
    blocks.append(Folded("what these checks cannot see", (Bullets(limits),)))
    return Section("next", "What to do next", tuple(blocks))
