from __future__ import annotations

from collections.abc import Iterator

from fulltune.report.format import words
from fulltune.report.format.blocks import Element, Exchange, Exchanges, Folded, Paragraph, Section
from fulltune.report.run.read import RunView, after_start
from fulltune.stats.curves import Curves
from fulltune.text import counted, format_metric, format_percent, format_seconds

_OPEN, _MOST_STEPS, _LONGEST, _FOLDED_AFTER = 2, 6, 1200, 160
_MANY_UNFINISHED = 0.05


def build_training_answers_section(view: RunView) -> Section | None:
    """Build the section of answers by step, or None if none were generated during training."""
    answers = view.history.answers
    if not answers:
        return None
    shown = next((one for one in answers if one.step == view.kept_step), answers[-1])
    took, share = format_seconds(sum(one.took for one in answers)), shown.unfinished / max(1, shown.rows)
    times, rows = counted(len(answers), "evaluation"), counted(shown.rows, "eval row")
    text = f"At {times}, the model answered the same {rows} greedily, which took {took} in total."
    if share > _MANY_UNFINISHED:
        text += (
            f" At step {shown.step:,}, {format_percent(share)} of the answers reached the length limit. If expected "
            "answers are longer, raise evaluate.max_new_tokens. If not, the model has not learned where to stop."
        )
    exchanges = tuple(_list_answers_by_step(view))
    blocks: list[Element] = [Paragraph(text), Exchanges(exchanges[:_OPEN], _FOLDED_AFTER)]
    if rest := exchanges[_OPEN:]:
        blocks.append(Folded(counted(len(rest), "more prompt"), (Exchanges(rest, _FOLDED_AFTER),)))
    return Section("answers-during-training", "Answers during training", tuple(blocks))


def _list_answers_by_step(view: RunView) -> Iterator[Exchange]:
    """Yield each sample prompt with its answers at the first, the last, the kept and evenly chosen steps."""
    answers, kept_step = view.history.answers, view.kept_step
    places = {round((len(answers) - 1) * part / (_MOST_STEPS - 1)) for part in range(_MOST_STEPS)}
    shown = [one for place, one in enumerate(answers) if place in places or one.step == kept_step]
    for sample in answers[-1].answers:
        replies = {"expected": sample.expected} | {
            f"step {event.step:,}" + ", kept" * (event.step == kept_step): answer.predicted
            for event in shown
            for answer in event.answers
            if answer.text == sample.text
        }
        texts = {who: words.cut_text(words.text_or_empty(text), _LONGEST) for who, text in replies.items()}
        yield words.cut_text(sample.text, _LONGEST), tuple(texts.items())


def compare_loss_and_answers(view: RunView) -> Iterator[str]:
    """Yield where the loss and the answers' metric are best, and which weights are kept; nothing without answers."""
    curves, plan, metric, kept_step = view.history.evaluation, view.plan, view.answer_metric or "", view.kept_step
    rises = plan is None or plan.metric != metric or plan.greater_is_better
    lowest, _ = Curves(metric=after_start(curves.get("loss", ())), greater_is_better=False).best
    points = sorted(after_start(curves.get(metric, ())), key=lambda point: point[0] != kept_step)  # first among equals
    step, value = Curves(metric=tuple(points), greater_is_better=rises).best
    if not lowest or not step:
        return
    highest = f"{words.metric_name(metric)} is {'highest' if rises else 'lowest'}"
    place = f"and {highest} there" if step == lowest else f"but {highest} at step {step:,}"
    why = view.outcome.weights_reason if view.outcome and step != kept_step else None
    ending = (
        "" if kept_step is None else f" The kept weights are those of step {kept_step:,}{f': {why}' if why else ''}."
    )
    yield f"Loss is lowest at step {lowest:,}, {place} ({format_metric(metric, value)}).{ending}"
