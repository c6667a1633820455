"""The section about the rows: how many, where from, how long, which labels, what was left out, what the model sees."""

from __future__ import annotations

from fulltune.records import DataSummary, Segment
from fulltune.report import words
from fulltune.report.blocks import Block, Bullets, Cell, Facts, Folded, Paragraph, Row, Rows, Section, Table
from fulltune.report.read import RunView

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
                ("kind of rows", summary.problem_type.replace("_", " ")),
                *((f"column for {role}", column) for role, column in summary.columns.items()),
                ("longest row", f"{words.counted(summary.max_length, 'token')}: {summary.max_length_reason}"),
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
    generates = summary.problem_type in ("prompt_completion", "chat")
    trained = ("trained tokens",) if generates else ()  # a classifier trains rows, which the table has already
    lengths = ("p50", "p95", "longest")
    header = ("split", "rows", "tokens", *trained, *lengths, "truncated", "left out", "where from")
    rows: tuple[Row, ...] = tuple(
        (
            split,
            words.count(found.rows),
            words.count(found.tokens),
            *((words.count(found.trained_tokens),) if generates else ()),
            *(
                words.count(found.length_percentiles[key]) if key in found.length_percentiles else "-"
                for key in ("p50", "p95", "max")
            ),
            words.count(found.truncated_rows),
            words.count(found.dropped_rows),
            Cell(summary.sources.get(split, "-"), foreign=True),
        )
        for split, found in summary.splits.items()
    )
    caption = "Rows that never mix: train to learn, eval to choose, test to report. p50, p95, longest: tokens per row"
    return Table(caption, header, rows, numeric=frozenset(range(1, len(header) - 1)))


def _labels(summary: DataSummary) -> list[Block]:
    """Rows per label, most frequent in train first."""
    splits = [split for split, found in summary.splits.items() if found.label_counts]
    if not splits:
        return []
    counts = {split: summary.splits[split].label_counts for split in splits}
    seen = dict.fromkeys([*summary.labels, *(label for split in splits for label in counts[split])])
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
    header = ("label", *splits)
    numeric = frozenset(range(2, len(header)))
    if len(rows) <= _LABELS_OPEN:
        return [Table("Rows per label", header, rows, numeric)]
    half = _LABELS_OPEN // 2
    ends = (*rows[:half], *rows[-half:])
    return [
        Table(
            f"Rows per label: the {half} most and the {half} least frequent of {len(rows)} labels",
            header,
            ends,
            numeric,
        ),
        Folded(f"all {len(rows)} labels", (Table("Rows per label", header, rows, numeric),)),
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
    return [Paragraph("What the model sees, decoded from its tokens:"), Rows(items)]


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
