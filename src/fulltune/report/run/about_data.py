from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fulltune.recipe.tasks import FORMS, FROM_FILE, Form
from fulltune.records.data import DataSummary, Segment, SplitSummary
from fulltune.report.format import words
from fulltune.report.format.blocks import (
    Bullets,
    Cell,
    Element,
    Facts,
    Folded,
    NameAndValue,
    Paragraph,
    Previews,
    Section,
    Table,
    TableRow,
    untrusted,
)
from fulltune.report.run.read import RunView
from fulltune.text import counted, format_number, format_percent


def choose_row_form(summary: DataSummary | None) -> Form:
    """Return the words that describe a run's rows. Without a summary, assume rows with one label."""
    form = summary.form if summary else FORMS["single_label"]
    if summary and has_images(summary):
        return replace(form, kind="images", question="IMAGE.png")
    return replace(form, question=FROM_FILE) if summary and "text_pair" in summary.columns else form


def has_images(summary: DataSummary) -> bool:
    return "image" in summary.columns


def describe_mixed_sources(
    summary: DataSummary, epochs: float | None = None, trained_token_shares: Sequence[float] = ()
) -> list[str]:
    """Describe each source mixed into the train rows, and how often its rows are read in `epochs` (default 1)."""
    lines = []
    for number, source in enumerate(summary.mixed):
        often = source.times_read(1 if epochs is None else epochs)
        share = source.tokens_per_epoch / max(1, summary.tokens_per_epoch)
        parts = [
            f"{source.where}: weight {source.weight:g}, {source.rows_per_epoch:,} of the "
            f"{counted(summary.rows_per_epoch, 'row')} per epoch, {format_percent(share)} of the tokens"
        ]
        if source.kind != summary.form.kind:
            parts.append(f"its rows are {source.kind}")
        if often > 1:
            in_what = "in an epoch" if epochs is None else "over the run"
            parts.append(f"each row is read {often:.1f} times {in_what}")
        elif epochs is not None:
            parts.append(f"{format_percent(often)} of its {counted(source.counts.rows, 'row')} are read")
        if trained_token_shares:
            parts.append(f"{format_percent(trained_token_shares[number])} of the trained tokens")
        lines.append("; ".join(parts))
    return lines


_PREVIEWS = 5
_LABELS_OPEN = 12
_TEXT_LIMIT = 1500
_CELL_LIMIT = 300


def build_data_section(view: RunView) -> Section | None:
    """Build the data section, or None if the data was not prepared."""
    summary = view.summary
    if summary is None:
        return None
    facts = [("row type", choose_row_form(summary).kind)]
    facts += [(f"{role.replace('_', ' ')} column", column) for role, column in summary.columns.items()]
    facts += _row_length_fact(summary)
    if summary.scale is not None:
        mean, spread = map(format_number, summary.scale)
        facts.append(("train targets", f"mean {mean}, standard deviation {spread}"))
    facts += [("read from", source.origin) for source in view.remote]
    facts.append(("fingerprint of files and settings", summary.fingerprint))
    blocks: list[Element] = [build_split_table(summary), *_mixed_source_blocks(view, summary), Facts(tuple(facts))]
    if summary.notes:
        blocks.append(Bullets(tuple(words.cut_text(note, _TEXT_LIMIT) for note in summary.notes)))
    blocks += [*_label_count_blocks(summary), *_dropped_row_blocks(summary), *_row_preview_blocks(summary)]
    return Section("data", "Data", tuple(blocks))


def build_data_terminal_report(summary: DataSummary) -> list[Element]:
    """Return the elements that are printed once the rows are prepared."""
    kind = f"{choose_row_form(summary).kind}{f', {len(summary.labels)} labels' if summary.labels else ''}"
    facts = [("kind of rows", kind), *_row_length_fact(summary)]
    blocks: list[Element] = [build_split_table(summary), Facts(tuple(facts)), *_row_preview_blocks(summary)]
    if notes := [*(f"mixed in: {line}" for line in describe_mixed_sources(summary)), *summary.notes]:
        blocks.append(Bullets(tuple(notes)))
    return blocks


def _row_length_fact(summary: DataSummary) -> list[NameAndValue]:
    """Return the maximum row length in tokens and its reason, or an empty list for images."""
    if has_images(summary):
        return []
    return [("maximum length", f"{counted(summary.max_length, 'token')} ({summary.max_length_reason})")]


def build_split_table(summary: DataSummary) -> Table:
    lengths = _format_token_counts(summary, next(iter(summary.splits.values())))
    row = choose_row_form(summary).row
    header = ("split", f"{row}s", *lengths, "dropped", "source")
    rows: tuple[TableRow, ...] = tuple(
        (
            split,
            f"{counts.rows:,}",
            *_format_token_counts(summary, counts).values(),
            f"{counts.dropped_rows:,}",
            Cell(source, untrusted=True),
        )
        for split, counts, source in [
            *((split, counts, summary.sources.get(split, "-")) for split, counts in summary.splits.items()),
            *(("mixed in", source.counts, f"file {source.where}") for source in summary.mixed),
        ]
    )
    caption = (
        "Each row is in one split: train fits the weights, eval chooses the checkpoint, test is for the final scores"
    )
    if lengths:
        caption += f". p50, p95, longest: tokens per {row}"
    return Table(caption, header, rows, numeric=frozenset(range(1, len(header) - 1)))


def _mixed_source_blocks(view: RunView, summary: DataSummary) -> list[Element]:
    if not summary.mixed:
        return []
    plan, tokens = view.plan, view.outcome.tokens_by_source if view.outcome else ()
    shares = [number / max(1, sum(tokens)) for number in tokens[1:]]
    lines = describe_mixed_sources(summary, plan.num_train_epochs if plan else None, shares)
    lead = "These rows are mixed into the train rows of each epoch and are never scored:"
    return [Paragraph(lead), Bullets(tuple(words.cut_text(line, _TEXT_LIMIT) for line in lines))]


def _format_token_counts(summary: DataSummary, split: SplitSummary) -> dict[str, str]:
    """Return a split's token counts as text by column name, or {} for images."""
    if has_images(summary):
        return {}
    trained = {"trained tokens": split.trained_tokens} if summary.form.writes_answers else {}
    at = {name: split.length_percentiles.get(key) for name, key in (("p50", "p50"), ("p95", "p95"), ("longest", "max"))}
    columns = {"tokens": split.tokens, **trained, **at, "truncated": split.truncated_rows}
    return {name: "-" if value is None else f"{value:,}" for name, value in columns.items()}


def _label_count_blocks(summary: DataSummary) -> list[Element]:
    """Build the table of rows per label, or an empty list without labels."""
    counts = {split: rows.label_counts for split, rows in summary.splits.items() if rows.label_counts}
    if not counts:
        return []
    # The labels of words are tags, but entities are counted.
    noun = summary.form.label
    named = summary.labels if noun == "label" else ()
    names = dict.fromkeys([*named, *(label for of_split in counts.values() for label in of_split)])
    order = sorted(names, key=lambda label: tuple(-of_split.get(label, 0) for of_split in counts.values()))
    first, *others = counts.values()
    most = max(1, *first.values())
    rows: tuple[TableRow, ...] = tuple(
        (
            untrusted(label, _CELL_LIMIT),
            Cell(f"{first.get(label, 0):,}", bar=first.get(label, 0) / most),
            *(f"{of_split.get(label, 0):,}" for of_split in others),
        )
        for label in order
    )
    header = (noun, *counts)
    table = Table(f"Rows per {noun}", header, rows, frozenset(range(2, len(header))))
    return [table] if len(rows) <= _LABELS_OPEN else [Folded(f"{len(rows)} {noun}s", (table,))]


def _dropped_row_blocks(summary: DataSummary) -> list[Element]:
    if not summary.dropped:
        return [Paragraph("No row was dropped.")]
    reasons = sorted(summary.dropped.items(), key=lambda item: -item[1])
    by_reason = tuple((untrusted(reason), f"{number:,}") for reason, number in reasons)
    caption = "Dropped rows, by reason (data/dropped.jsonl lists each row)"
    return [Table(caption, ("reason", "rows"), by_reason, frozenset({1}))]


def _row_preview_blocks(summary: DataSummary) -> list[Element]:
    shown = [*summary.previews[:_PREVIEWS], *(preview for source in summary.mixed for preview in source.previews)]
    items = tuple((tuple(map(_cut_segment, preview.segments)), preview.label) for preview in shown)
    if not items:
        return []
    origin = "" if has_images(summary) else ", decoded from its tokens"
    of_mixed = " (rows of mixed-in sources come last)" if summary.mixed else ""
    return [Paragraph(f"What the model sees{origin}{of_mixed}:"), Previews(items, choose_row_form(summary).target)]


def _cut_segment(segment: Segment) -> Segment:
    return Segment(text=words.cut_text(segment.text, _TEXT_LIMIT), trained=segment.trained)
