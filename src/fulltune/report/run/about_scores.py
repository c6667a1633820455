"""Sections about the test rows: results, answers, confusion, mistakes, calibration."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass

from fulltune.records.scores import Answer, Calibration, Confusion, Scores
from fulltune.report.format import words
from fulltune.report.format.blocks import (
    Block,
    Cell,
    Exchange,
    Exchanges,
    Facts,
    Figure,
    Figures,
    Folded,
    Paragraph,
    Row,
    Section,
    Table,
    unless_empty,
)
from fulltune.report.format.plots import Bar, interval_plot
from fulltune.report.run import kinds
from fulltune.report.run.read import RunView
from fulltune.report.verdict import headline_row

_KIND_IN_WORDS = {"baseline": "baseline", "untouched": "before training", "trained": "trained"}
OF_ANSWERS = ("exact_match", "rougeL", "chrf", "bleu")
_LARGEST_HEAT_TABLE = 20
_CONFUSED_PAIRS = 20
_ANSWERS_OPEN = 5
_MISTAKES_OPEN = 10
_ANSWER_LIMIT = 1200
_MISTAKE_LIMIT = 500
_LABEL_LIMIT = 60


def results(view: RunView) -> Section | None:
    """Every row with every metric, and the main metric drawn."""
    if not view.scores:
        return None
    leading = headline_row(view.scores) or view.scores[-1]
    metrics = list(dict.fromkeys(name for row in (leading, *view.scores) for name in _main_first(row)))
    header = ("model", *(words.metric_name(name) for name in metrics), "test rows", "kind")
    rows = tuple(
        (
            row.name,
            *(words.estimate(name, row.metrics[name]) if name in row.metrics else "-" for name in metrics),
            words.count(row.rows),
            _KIND_IN_WORDS[row.kind],
        )
        for row in view.scores
    )
    level = " and ".join(sorted({f"{100 * row.confidence:g}%" for row in view.scores}))
    caption = f"Each metric on the test rows, with its {level} bootstrap interval in brackets"
    blocks: list[Block] = [Table(caption, header, rows, numeric=frozenset(range(1, len(header) - 1)))]
    if grouped := _groups(view.scores):
        blocks.append(Paragraph(grouped))
    if answered := [row for row in view.scores if row.answers and len(row.answers) < row.rows]:
        blocks.append(Paragraph(about_answers(answered[-1])))
    blocks += [
        Paragraph(f"{reason[:1].upper()}{reason[1:]}.") for reason in {row.left_out: 0 for row in view.scores} if reason
    ]
    main = leading.main_metric
    title = f"{words.metric_name(main)}, {'larger' if leading.greater_is_better else 'smaller'} is better"
    bars = [
        Bar(row.name, row.kind, estimate.value, estimate.low, estimate.high, words.metric(main, estimate.value))
        for row in view.scores
        if (estimate := row.metrics.get(main)) is not None
    ]
    if bars:
        legend = f"Mark and {level} interval; circle: baseline, square: before training, diamond: trained."
        blocks.append(Figures((Figure(interval_plot(title, bars, main), title, legend),), drawn_only=True))
    return Section("results", "Results on the test rows", tuple(blocks))


def _groups(scores: Sequence[Scores]) -> str:
    """What the intervals rest on, where rows depend on each other; empty where they do not."""
    found = {(one.rows, one.clusters) for row in scores for one in row.metrics.values() if one.rows and one.clusters}
    num_rows, num_groups = max(found, default=(0, 0))
    if num_rows == num_groups:
        return ""
    return (
        f"The {words.counted(num_rows, 'test row')} are {words.counted(num_groups, 'group')}: rows of one have the "
        "same text, prompt or passage, or nearly so. Intervals are drawn over groups: rows that depend on each other "
        "are not independent evidence."
    )


def about_answers(row: Scores) -> str:
    names = [words.metric_name(name) for name in row.metrics if name in OF_ANSWERS]
    drawn = words.counted(len(row.answers), "test row")
    distinct = " with different prompts" if len(row.answers) > 1 else ""
    return f"Answers were generated for {drawn}{distinct}, drawn at random; on these: {words.listed(names)}."


def answers(view: RunView) -> Section | None:
    """What a text generator said before and after training, to the same test rows."""
    before = next((row for row in view.scores if row.kind == "untouched" and row.answers), None)
    blocks: list[Block] = []
    for row in view.trained:
        exchanges = pair_answers(before.answers if before else (), row.answers)
        if exchanges:
            blocks += _fold(row, view, (Exchanges(exchanges[:_ANSWERS_OPEN]),))
            if rest := exchanges[_ANSWERS_OPEN:]:
                blocks.append(Folded(f"{words.counted(len(rest), 'more answer')} of {row.name}", (Exchanges(rest),)))
    if not blocks and before:
        blocks.append(Paragraph("Only the untouched model has answers; there are none after training."))
        blocks.append(Exchanges(pair_answers(before.answers, ())[:_ANSWERS_OPEN]))
    return unless_empty("Answers before and after training", blocks)


def pair_answers(before: Sequence[Answer], after: Sequence[Answer]) -> tuple[Exchange, ...]:
    """Put the answers of two models to the same row side by side.

    Rows are paired by their text; the same text twice is paired in order.
    """
    waiting: dict[str, deque[Answer]] = defaultdict(deque)
    for answer in before:
        waiting[answer.text].append(answer)
    exchanges = []
    for answer in after or before:
        earlier = waiting[answer.text].popleft() if waiting[answer.text] else None
        said = [("expected", answer.expected)]
        if earlier:
            said.append(("before training", earlier.predicted))
        if after:
            said.append(("after training", answer.predicted))
        shown = tuple((who, words.clipped(words.named(what), _ANSWER_LIMIT)) for who, what in said)
        exchanges.append(Exchange(words.clipped(answer.text, _ANSWER_LIMIT), shown))
    return tuple(exchanges)


def confusion(view: RunView) -> Section | None:
    """How well each label is found, and which are taken for which."""
    blocks: list[Block] = []
    for row in view.trained:
        if row.confusion:
            blocks += _fold(row, view, (label_table(row.confusion), confusion_table(row.confusion)))
    return unless_empty("Confusion", blocks)


def label_table(confusion: Confusion) -> Table:
    """Precision, recall and F1 of each label; of many the ones with the lowest F1."""
    found = [sum(counts) for counts in zip(*confusion.counts, strict=True)]
    labels = [
        _Label(name, counts[place], found[place], sum(counts))
        for place, (name, counts) in enumerate(zip(confusion.labels, confusion.counts, strict=True))
        if found[place] + sum(counts)
    ]
    caption = "Each label on the test rows"
    if len(labels) > _LARGEST_HEAT_TABLE:
        labels = sorted(labels, key=lambda label: label.f1)[:_LARGEST_HEAT_TABLE]
        caption = f"The {len(labels)} labels with the lowest F1 of {len(confusion.labels)}"
    rows = tuple(
        (
            Cell(words.clipped(words.named(label.name), _LABEL_LIMIT), foreign=True),
            words.count(label.expected),
            words.percent(label.right / label.found) if label.found else "-",
            words.percent(label.right / label.expected) if label.expected else "-",
            words.percent(label.f1),
        )
        for label in labels
    )
    return Table(caption, ("label", "test rows", "precision", "recall", "F1"), rows, frozenset({1, 2, 3, 4}))


@dataclass(frozen=True)
class _Label:
    """Test rows of a label: given it rightly, given it at all, and those that have it."""

    name: str
    right: int
    found: int
    expected: int

    @property
    def f1(self) -> float:
        return 2 * self.right / (self.found + self.expected)


def confusion_table(confusion: Confusion) -> Table | Paragraph:
    """All counts as a heat table; with many labels only the pairs that are confused most."""
    labels = [words.clipped(words.named(label), _LABEL_LIMIT) for label in confusion.labels]
    totals = [max(1, sum(counts)) for counts in confusion.counts]
    if len(labels) <= _LARGEST_HEAT_TABLE:
        rows = tuple(
            (
                Cell(label, foreign=True),
                *(Cell(words.count(value), heat=value / total) for value in counts),
            )
            for label, counts, total in zip(labels, confusion.counts, totals, strict=True)
        )
        caption = "Test rows by true label (down) and predicted label (across); the shade is the share of the row"
        numeric = frozenset(range(1, len(labels) + 1))
        return Table(caption, ("true label", *labels), rows, numeric=numeric, matrix=True)
    pairs = sorted(
        (-value, true, guess)
        for true, counts in enumerate(confusion.counts)
        for guess, value in enumerate(counts)
        if true != guess and value
    )
    if not pairs:
        return Paragraph(f"No test row of the {len(labels)} labels was given another label.")
    confused: tuple[Row, ...] = tuple(
        (
            Cell(labels[true], foreign=True),
            Cell(labels[guess], foreign=True),
            words.count(-negative),
            Cell(words.percent(-negative / totals[true]), bar=-negative / totals[true]),
        )
        for negative, true, guess in pairs[:_CONFUSED_PAIRS]
    )
    caption = (
        f"The {len(confused)} most confused of {words.counted(len(pairs), 'confused pair')} ({len(labels)} labels)"
    )
    header = ("true label", "predicted label", "test rows", "share of the true label's rows")
    return Table(caption, header, confused, frozenset({2}))


def mistakes(view: RunView) -> Section | None:
    """The wrong answers that the model was surest of."""
    blocks: list[Block] = []
    for row in view.trained:
        if not row.worst:
            continue
        caption = kinds.worst(view.summary.problem_type if view.summary else None)
        shown = list(_fold(row, view, (_mistake_table(caption, row.worst[:_MISTAKES_OPEN]),)))
        if rest := row.worst[_MISTAKES_OPEN:]:
            shown.append(Folded(f"{len(rest)} more of {row.name}", (_mistake_table("The next ones", rest),)))
        blocks += shown
    return unless_empty("Worst mistakes", blocks)


def _mistake_table(caption: str, rows: Sequence[Answer]) -> Table:
    return Table(
        caption,
        ("text", "expected", "predicted", "loss"),
        tuple(
            (
                Cell(words.clipped(row.text, _MISTAKE_LIMIT), foreign=True),
                Cell(words.clipped(words.named(row.expected), _MISTAKE_LIMIT), foreign=True),
                Cell(words.clipped(words.named(row.predicted), _MISTAKE_LIMIT), foreign=True),
                "-" if row.loss is None else words.number(row.loss),
            )
            for row in rows
        ),
        numeric=frozenset({3}),
    )


def calibration(view: RunView) -> Section | None:
    """How far the probabilities can be believed."""
    blocks: list[Block] = []
    for row in view.trained:
        if row.calibration and row.calibration.note:
            error = words.number(row.calibration.expected_calibration_error)
            facts = Facts((("temperature", "1, not fitted"), ("expected calibration error", error)))
            blocks += _fold(row, view, (facts, Paragraph(calibration_in_words(row.calibration))))
        elif row.calibration:
            facts = Facts(
                (
                    ("temperature, fitted on the eval rows", words.number(row.calibration.temperature)),
                    ("expected calibration error", words.number(row.calibration.expected_calibration_error)),
                    (
                        "after dividing the logits by the temperature",
                        words.number(row.calibration.expected_calibration_error_scaled),
                    ),
                )
            )
            blocks += _fold(row, view, (facts, Paragraph(calibration_in_words(row.calibration))))
    return unless_empty("Calibration", blocks)


def calibration_in_words(found: Calibration) -> str:
    """One line: what the temperature says, and whether it helped on the test rows; or why it was not fitted."""
    if found.note:
        return f"{found.note[0].upper()}{found.note[1:]}."
    if found.temperature > 1.02:
        sure = "The model is overconfident: it is right less often than its probabilities say (temperature above 1)"
    elif found.temperature < 0.98:
        sure = "The model is underconfident: it is right more often than its probabilities say (temperature below 1)"
    else:
        sure = "The model is right about as often as its probabilities say (temperature near 1)"
    before, after = found.expected_calibration_error, found.expected_calibration_error_scaled
    effect = "brings its probabilities closer to" if after < before else "does not bring its probabilities closer to"
    return f"{sure}; dividing the logits by the temperature {effect} how often it is right on the test rows."


def _main_first(row: Scores) -> list[str]:
    return sorted(row.metrics, key=lambda name: name != row.main_metric)


def _fold(row: Scores, view: RunView, blocks: tuple[Block, ...]) -> tuple[Block, ...]:
    """The headline's trial in the open, the others behind their name."""
    if row is headline_row(view.scores):
        return blocks
    return (Folded(f"the same for {row.name}", blocks),)
