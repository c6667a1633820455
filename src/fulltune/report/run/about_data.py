"""The section about the rows: how many, where from, how long, which labels, what was left out, what the model sees."""

from __future__ import annotations

from fulltune.records.data import DataSummary, Segment, SplitSummary
from fulltune.report.format import words
from fulltune.report.format.blocks import Block, Bullets, Cell, Facts, Folded, Paragraph, Row, Rows, Section, Table
from fulltune.report.run import kinds
from fulltune.report.run.read import RunView

_PREVIEWS = 5
_LABELS_OPEN = 12
_TEXT_LIMIT = 1500
_CELL_LIMIT = 300


def data(view: RunView) -> Section | None:
    """What the model learned from and was judged on."""
    summary = view.summary
    if summary is None:
        return None
    blocks: list[Block] = [_splits(summary)]
    blocks.append(
        Facts(
            (
                ("kind of rows", kinds.kind(summary)),
                *((f"column for {role.replace('_', ' ')}", column) for role, column in summary.columns.items()),
                *_longest(summary),
                ("fingerprint of files and settings", summary.fingerprint),
            )
        )
    )
    if summary.notes:
        blocks.append(Bullets(tuple(words.clipped(note, _TEXT_LIMIT) for note in summary.notes)))
    blocks += _labels(summary)
    blocks += _dropped(view, summary)
    blocks += _previews(summary)
    return Section("data", "Data", tuple(blocks))


def _splits(summary: DataSummary) -> Table:
    lengths = _lengths(summary, next(iter(summary.splits.values())))
    header = ("split", kinds.row(summary), *lengths, "left out", "where from")
    rows: tuple[Row, ...] = tuple(
        (
            split,
            words.count(found.rows),
            *_lengths(summary, found).values(),
            words.count(found.dropped_rows),
            Cell(summary.sources.get(split, "-"), foreign=True),
        )
        for split, found in summary.splits.items()
    )
    caption = "Rows that never mix: train to learn, eval to choose, test to report"
    if lengths:
        caption += f". p50, p95, longest: tokens per {kinds.row(summary).removesuffix('s')}"
    return Table(caption, header, rows, numeric=frozenset(range(1, len(header) - 1)))


def _lengths(summary: DataSummary, split: SplitSummary) -> dict[str, str]:
    """Columns about tokens. Classifiers train rows, which the table has already."""
    if kinds.has_images(summary):
        return {}
    trained = {"trained tokens": words.count(split.trained_tokens)} if kinds.has_untrained_tokens(summary) else {}
    at = {name: split.length_percentiles.get(key) for name, key in (("p50", "p50"), ("p95", "p95"), ("longest", "max"))}
    return {
        "tokens": words.count(split.tokens),
        **trained,
        **{name: "-" if value is None else words.count(value) for name, value in at.items()},
        "truncated": words.count(split.truncated_rows),
    }


def _longest(summary: DataSummary) -> tuple[tuple[str, str], ...]:
    if kinds.has_images(summary):
        return ()
    return ((kinds.longest(summary), f"{words.counted(summary.max_length, 'token')}: {summary.max_length_reason}"),)


def _labels(summary: DataSummary) -> list[Block]:
    """Rows per label, most frequent in train first."""
    splits = [split for split, found in summary.splits.items() if found.label_counts]
    if not splits:
        return []
    counts = {split: summary.splits[split].label_counts for split in splits}
    # The labels of words are tags; what is counted are the entities that they mark.
    named = () if summary.problem_type == "tags" else summary.labels
    seen = dict.fromkeys([*named, *(label for split in splits for label in counts[split])])
    order = sorted(seen, key=lambda label: tuple(-counts[split].get(label, 0) for split in splits))
    most = max(1, *(counts[splits[0]].get(label, 0) for label in order))
    rows: tuple[Row, ...] = tuple(
        (
            Cell(words.clipped(words.named(label), _CELL_LIMIT), foreign=True),
            Cell(words.count(counts[splits[0]].get(label, 0)), bar=counts[splits[0]].get(label, 0) / most),
            *(words.count(counts[split].get(label, 0)) for split in splits[1:]),
        )
        for label in order
    )
    noun = "entity type" if summary.problem_type == "tags" else "label"
    header = (noun, *splits)
    numeric = frozenset(range(2, len(header)))
    if len(rows) <= _LABELS_OPEN:
        return [Table(f"Rows per {noun}", header, rows, numeric)]
    half = _LABELS_OPEN // 2
    ends = (*rows[:half], *rows[-half:])
    return [
        Table(
            f"Rows per {noun}: the {half} most and the {half} least frequent of {len(rows)} {noun}s",
            header,
            ends,
            numeric,
        ),
        Folded(f"all {len(rows)} {noun}s", (Table(f"Rows per {noun}", header, rows, numeric),)),
    ]


def _dropped(view: RunView, summary: DataSummary) -> list[Block]:
    if not summary.dropped:
        return [Paragraph("No row was left out.")]
    reasons = sorted(summary.dropped.items(), key=lambda item: -item[1])
    blocks: list[Block] = [
        Table(
            "Rows left out, by reason",
            ("reason", "rows"),
            tuple((Cell(reason, foreign=True), words.count(number)) for reason, number in reasons),
            frozenset({1}),
        )
    ]
    if view.dropped:
        columns = ("split", "row", "check", "reason")
        rows = tuple(
            tuple(Cell(words.clipped(str(row.get(key, "-")), _CELL_LIMIT), foreign=True) for key in columns)
            for row in view.dropped
        )
        total = sum(summary.dropped.values())
        title = f"the first {len(rows)} of {words.counted(total, 'row')} left out"
        blocks.append(Folded(title, (Table("From data/dropped.jsonl, which has all of them", columns, rows),)))
    return blocks


def _previews(summary: DataSummary) -> list[Block]:
    items = tuple(
        (_first(preview.segments, _TEXT_LIMIT), None if preview.label is None else preview.label)
        for preview in summary.previews[:_PREVIEWS]
    )
    if not items:
        return []
    origin = "" if kinds.has_images(summary) else ", decoded from its tokens"
    return [Paragraph(f"What the model sees{origin}:"), Rows(items, kinds.target(summary))]


def _first(segments: tuple[Segment, ...], limit: int) -> tuple[Segment, ...]:
    """The row's beginning: segments up to `limit` characters in all, and how many follow."""
    shown: list[Segment] = []
    left = limit
    for segment in segments:
        if left <= 0:
            break
        shown.append(Segment(text=segment.text[:left], trained=segment.trained))
        left -= len(segment.text)
    rest = sum(len(segment.text) for segment in segments) - limit
    if rest > 0:
        shown.append(Segment(text=f" … ({words.count(rest)} more characters)", trained=False))
    return tuple(shown)
