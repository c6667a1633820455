from __future__ import annotations

from collections.abc import Sequence

from fulltune.recipe.tasks import leaked_content
from fulltune.records.data import DataSummary
from fulltune.records.run import Access
from fulltune.records.scores import Answer, Calibration, Confusion, Estimate, Scores, Threshold
from fulltune.report.format import words
from fulltune.report.format.blocks import (
    Cell,
    Element,
    Exchange,
    Exchanges,
    Facts,
    Folded,
    Paragraph,
    Section,
    Table,
    TableRow,
    unless_empty,
    untrusted,
)
from fulltune.report.run.about_data import choose_row_form
from fulltune.report.run.read import RunView, trained_row
from fulltune.text import counted, format_metric, format_number, format_percent, listed

_KIND_IN_WORDS = {"baseline": "baseline", "untouched": "before training", "trained": "trained"}
_LARGEST_HEAT_TABLE = 20
_CONFUSED_PAIRS = 20
_ANSWERS_OPEN = 3
_MISTAKES_OPEN = 10
_ANSWER_LIMIT = 1200
_MISTAKE_LIMIT = 500
_LABEL_LIMIT = 60


def build_results_section(view: RunView) -> Section | None:
    if not view.scores:
        return None
    return Section("results", "Results on the test rows", (build_score_table(view), *list_score_notes(view)))


def _confidence_levels(view: RunView) -> str:
    return " and ".join(sorted({f"{100 * row.confidence:g}%" for row in view.scores}))


def build_score_table(view: RunView) -> Table:
    leading = view.trained or view.scores[-1]
    main = leading.main_metric
    metrics = sorted(
        dict.fromkeys(name for row in (leading, *view.scores) for name in row.metrics), key=lambda name: name != main
    )
    header = ("model", *(words.metric_name(name) for name in metrics), "test rows", "kind")
    rows = tuple(
        (
            row.name,
            *(words.format_estimate(name, row.metrics[name]) if name in row.metrics else "-" for name in metrics),
            f"{row.rows:,}",
            _KIND_IN_WORDS[row.kind],
        )
        for row in view.scores
    )
    caption = f"Each metric on the test rows, with its {_confidence_levels(view)} bootstrap interval in brackets"
    if view.summary and view.summary.positive_label is not None:
        label = words.text_or_empty(view.summary.positive_label)
        caption += f"; {listed([*map(words.metric_name, view.summary.form.of_one_class)])} are those of '{label}'"
    return Table(caption, header, rows, numeric=frozenset(range(1, len(header) - 1)))


def list_score_notes(view: RunView) -> list[Paragraph]:
    """Return notes on leaked rows, groups, generated answers, a poor slice and missing metrics."""
    sampled = [row for row in view.scores if row.answers and len(row.answers) < row.rows]
    reasons = dict.fromkeys(row.missing_metrics for row in view.scores if row.missing_metrics)
    sentences = (
        describe_leaks(view.scores, view.summary),
        _describe_groups(view.scores),
        *map(describe_answer_sample, sampled[-1:]),
        _describe_worst_slice(view.trained),
        *(f"{reason[:1].upper()}{reason[1:]}." for reason in reasons),
    )
    return [Paragraph(sentence) for sentence in sentences if sentence]


def describe_leaks(scores: Sequence[Scores], summary: DataSummary | None) -> str | None:
    """Compare the main metric with and without leaked test rows, or return None if no row leaked."""
    row = trained_row(scores) or scores[-1]
    whole = row.metrics.get(row.main_metric)
    if not row.num_leaks or whole is None:
        return None
    content = leaked_content(summary.columns if summary else (), row.near_leaks)
    leaks = f"{row.num_leaks:,} of {whole.rows or row.rows:,} test rows are leaked: their {content}"
    if row.metric_without_leaks is None:
        return f"{leaks}. Too few other rows remain to judge the model on unseen rows."
    name, value = words.metric_name(row.main_metric), words.format_estimate(row.main_metric, row.metric_without_leaks)
    return f"{leaks}. Without them: {name} {value} ({format_metric(row.main_metric, whole.value)} with them)."


def warn_of_repeated_scoring(accesses: Sequence[Access]) -> str:
    """Return a warning if several runs scored the same test rows, else an empty string."""
    runs = {(one.run, one.model) for one in accesses}
    if len(runs) < 2:
        return ""
    since = min(one.time for one in accesses)[:10]
    return (
        f"{len(runs)} runs in this folder have scored these test rows, the first on {since}. The best of "
        "several test scores is optimistic, so choose a run by its eval score."
    )


def _describe_groups(scores: Sequence[Scores]) -> str | None:
    """Explain that intervals are computed over groups of dependent rows, or return None without groups."""
    sizes = {(one.rows, one.clusters) for row in scores for one in row.metrics.values() if one.rows and one.clusters}
    num_rows, num_groups = max(sizes, default=(0, 0))
    if num_rows == num_groups:
        return None
    return (
        f"The {counted(num_rows, 'test row')} form {counted(num_groups, 'group')} with (nearly) the same text, prompt "
        "or passage. Intervals are computed over groups, because rows of the same group are not independent."
    )


def describe_answer_sample(row: Scores) -> str:
    """Describe how many test rows have generated answers, and which metrics need these answers."""
    names = [words.metric_name(name) for name in row.metrics if name in words.OF_ANSWERS]
    distinct = " with different prompts" if len(row.answers) > 1 else ""
    return (
        f"Answers were generated for {counted(len(row.answers), 'random test row')}{distinct}. Metrics measured on "
        f"these rows: {listed(names)}."
    )


def _describe_worst_slice(row: Scores | None) -> str | None:
    """Describe the worst slice, or return None unless its interval is worse than the value on all test rows."""
    if row is None or not row.slices or (worst := row.slices[0].metrics.get(row.main_metric)) is None:
        return None
    name, whole = row.main_metric, row.metrics[row.main_metric].value
    is_worse = worst.high < whole if row.greater_is_better else worst.low > whole
    value = words.one_line(words.cut_text(row.slices[0].value, _LABEL_LIMIT))
    sentence = (
        f"Worst {row.slice_by}: '{value}' has {words.metric_name(name)} {words.format_estimate(name, worst)} on "
        f"{counted(worst.rows or 0, 'test row')}, against {format_metric(name, whole)} on all."
    )
    return sentence if is_worse and not worst.no_interval_reason else None


def build_slices_section(view: RunView) -> Section | None:
    """Build the section of metrics by value of a column, or None if there are none."""
    row = view.trained
    if row is None or not row.slices:
        return None
    names = sorted(row.metrics, key=lambda name: name != row.main_metric)
    lines: list[TableRow] = []
    for part in row.slices:
        shown = (words.format_estimate(name, part.metrics[name]) if name in part.metrics else "-" for name in names)
        most = max(one.rows or 0 for one in part.metrics.values())
        lines.append((untrusted(part.value, _LABEL_LIMIT), *shown, f"{most:,}"))
    header = (str(row.slice_by), *map(words.metric_name, names), "test rows")
    caption = f"The trained model's metrics by '{row.slice_by}', worst {header[1]} first"
    note = f"Each interval has a level of {100 * row.confidence:g}%, so among many values the worst is partly chance."
    table = Table(caption, header, tuple(lines), frozenset(range(1, len(header))))
    return Section("slices", f"Results by {row.slice_by}", (table, Paragraph(note)))


def build_answers_section(view: RunView) -> Section | None:
    """Build the section of generated answers, or None without answers."""
    before = next((row.answers for row in view.scores if row.kind == "untouched" and row.answers), ())
    after = view.trained.answers if view.trained else ()
    answers_before = {answer.text: answer.predicted for answer in before}
    exchanges: tuple[Exchange, ...] = ()
    for answer in after or before:
        replies = {"expected": answer.expected}
        if answer.text in answers_before:
            replies["before training"] = answers_before[answer.text]
        if after:
            replies["after training"] = answer.predicted
        shown = tuple((who, words.cut_text(words.text_or_empty(what), _ANSWER_LIMIT)) for who, what in replies.items())
        exchanges += ((words.cut_text(answer.text, _ANSWER_LIMIT), shown),)
    if not exchanges:
        return None
    blocks: list[Element] = [Exchanges(exchanges[:_ANSWERS_OPEN])]
    if not after:
        blocks.insert(0, Paragraph("These answers are from the pretrained model; there are none after training."))
    elif rest := exchanges[_ANSWERS_OPEN:]:
        blocks.append(Folded(counted(len(rest), "more answer"), (Exchanges(rest),)))
    return Section("answers-before-and-after-training", "Answers before and after training", tuple(blocks))


def build_confusion_section(view: RunView) -> Section | None:
    counts = view.trained.confusion if view.trained else None
    return unless_empty("Confusion", [build_label_table(counts), _build_confusion_table(counts)] if counts else [])


def build_label_table(confusion: Confusion) -> Table:
    """Build a table of precision, recall and F1 per label, only for the lowest F1 if there are many labels."""
    predicted, rows = [sum(counts) for counts in zip(*confusion.counts, strict=True)], []
    for index, (name, counts) in enumerate(zip(confusion.labels, confusion.counts, strict=True)):
        right, predictions, expected = counts[index], predicted[index], sum(counts)
        if predictions + expected:
            f1 = 2 * right / (predictions + expected)
            precision = format_percent(right / predictions) if predictions else "-"
            recall = format_percent(right / expected) if expected else "-"
            rows.append((f1, (untrusted(name, _LABEL_LIMIT), f"{expected:,}", precision, recall, format_percent(f1))))
    caption = "Each label on the test rows"
    if len(rows) > _LARGEST_HEAT_TABLE:
        rows = sorted(rows, key=lambda row: row[0])[:_LARGEST_HEAT_TABLE]
        caption = f"The {len(rows)} of {len(confusion.labels)} labels with the lowest F1"
    header = ("label", "test rows", "precision", "recall", "F1")
    return Table(caption, header, tuple(row for _, row in rows), frozenset({1, 2, 3, 4}))


def _build_confusion_table(confusion: Confusion) -> Table | Paragraph:
    """Build the confusion matrix, or for many labels a table of the most confused pairs."""
    labels = [untrusted(label, _LABEL_LIMIT) for label in confusion.labels]
    totals = [max(1, sum(counts)) for counts in confusion.counts]
    if len(labels) <= _LARGEST_HEAT_TABLE:
        rows = tuple(
            (label, *(Cell(f"{value:,}", heat=value / total) for value in counts))
            for label, counts, total in zip(labels, confusion.counts, totals, strict=True)
        )
        caption = "Test rows by true label (down) and predicted label (across); shade: share of the true label"
        header = ("true label", *(label.text for label in labels))
        return Table(caption, header, rows, numeric=frozenset(range(1, len(header))), matrix=True)
    pairs = [
        (value, true, guess)
        for true, counts in enumerate(confusion.counts)
        for guess, value in enumerate(counts)
        if true != guess and value
    ]
    if not pairs:
        return Paragraph(f"All test rows of the {len(labels)} labels were predicted correctly.")
    confused = tuple(
        (labels[true], labels[guess], f"{value:,}", Cell(format_percent(share := value / totals[true]), bar=share))
        for value, true, guess in sorted(pairs, key=lambda pair: -pair[0])[:_CONFUSED_PAIRS]
    )
    caption = f"The {len(confused)} most frequent of {counted(len(pairs), 'confused pair')} ({len(labels)} labels)"
    header = ("true label", "predicted label", "test rows", "share of the true label's rows")
    return Table(caption, header, confused, frozenset({2}))


def build_mistakes_section(view: RunView) -> Section | None:
    """Build the section of the worst mistakes, or None without mistakes."""
    worst = view.trained.worst if view.trained else ()
    if not worst:
        return None
    blocks: list[Element] = [_build_mistake_table(choose_row_form(view.summary).worst, worst[:_MISTAKES_OPEN])]
    if rest := worst[_MISTAKES_OPEN:]:
        blocks.append(Folded(f"{len(rest)} more", (_build_mistake_table("Further mistakes", rest),)))
    return Section("worst-mistakes", "Worst mistakes", tuple(blocks))


def _build_mistake_table(caption: str, wrong_answers: Sequence[Answer]) -> Table:
    rows: tuple[TableRow, ...] = tuple(
        (
            *(untrusted(text, _MISTAKE_LIMIT) for text in (row.text, row.expected, row.predicted)),
            "-" if row.loss is None else format_number(row.loss),
        )
        for row in wrong_answers
    )
    return Table(caption, ("text", "expected", "predicted", "loss"), rows, numeric=frozenset({3}))


def build_calibration_blocks(row: Scores | None) -> list[Element]:
    if row is None or (calibration := row.calibration) is None:
        return []
    fitted = {
        "temperature, fitted on the eval rows": calibration.temperature,
        "expected calibration error": calibration.expected_calibration_error,
        "calibration error with this temperature": calibration.expected_calibration_error_scaled,
    }
    facts = [(name, format_number(value)) for name, value in fitted.items()]
    facts = [("temperature", "1, not fitted"), facts[1]] if calibration.note else facts
    about = [describe_calibration(calibration)]
    about += [describe_threshold(row.threshold, row.metrics["f1"])] if row.threshold else []
    return [Facts(tuple(facts)), *map(Paragraph, about)]


def describe_threshold(threshold: Threshold, f1: Estimate) -> str:
    """Say where a class is predicted, on what that rests, and what it changes."""
    return (
        f"'{words.text_or_empty(threshold.label)}' is predicted from a calibrated probability of "
        f"{words.format_estimate('', threshold.value)} on, which gives the highest F1 on the eval rows "
        f"({threshold.positives:,} of them have this class). F1 on the test rows: {words.format_estimate('f1', f1)}. "
        "Plain transformers ignores this threshold and predicts the most probable class, with F1 "
        f"{words.format_estimate('f1', threshold.f1_without)}."
    )


def describe_calibration(calibration: Calibration) -> str:
    """Explain the temperature, or say why none was fitted."""
    if calibration.note:
        return f"{calibration.note[0].upper()}{calibration.note[1:]}."
    sure = "is right about as often as its probabilities say (temperature near 1)"
    if calibration.temperature > 1.02:
        sure = "is overconfident: it is right less often than its probabilities say (temperature above 1)"
    elif calibration.temperature < 0.98:
        sure = "is underconfident: it is right more often than its probabilities say (temperature below 1)"
    return f"On the eval rows the model {sure}. Calibration errors are measured on the test rows."
