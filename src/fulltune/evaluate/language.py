from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from fulltune.evaluate.scoring import Scored, Scoring
from fulltune.inference.answers import draw_rows, tokenised_prompts
from fulltune.inference.run import Batching, generate_answers
from fulltune.recipe.tasks import OF_ANSWERS
from fulltune.records.scores import Answer
from fulltune.system.memory import run_with_smaller_batches
from fulltune.tasks import Row, Tokenizer, written

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def baseline_scorers(scoring: Scoring) -> dict[str, Callable[[], Scored]]:
    """Map the score file's name to a function that scores the source copied as answer; return {} without a source."""
    if "source" not in scoring.target.columns or not scoring.recipe.evaluate.generate_rows:
        return {}
    return {"baseline-copy": lambda: _score_copied_source(scoring)}


def score_model(scoring: Scoring, model: PreTrainedModel, tokenizer: Tokenizer) -> Scored:
    """Score a model by its loss and by the answers that it generates."""
    predictions = scoring.predict_split(model, tokenizer)
    estimates = scoring.estimate_metrics(predictions)
    drawn = rows_to_answer(scoring)
    answers: tuple[Answer, ...] = ()
    if drawn:
        generated, positions = _generate_answers(scoring, model, tokenizer, drawn), list(drawn)
        prompts, expected = _prompts_and_answers(scoring, list(drawn.values()))
        scores = scoring.task.score_answers(generated, expected, scoring.plan.metric)
        estimates |= scoring.estimate_metrics(scores, positions)
        estimates |= scoring.estimate_user_metrics(generated, expected, positions)
        answers = tuple(
            Answer(text=text, expected=want, predicted=got)
            for text, want, got in zip(prompts, expected, generated, strict=True)
        )
    count = len(next(iter(predictions.values())))
    missing = missing_metrics(scoring) if drawn else None
    return scoring.make_scores(
        scoring.plan.trial, "trained", count, metrics=estimates, answers=answers, missing_metrics=missing
    )


def _generate_answers(
    scoring: Scoring, model: PreTrainedModel, tokenizer: Tokenizer, rows: Mapping[int, Row]
) -> list[str]:
    prompts = tokenised_prompts(rows, scoring.rows("test"), scoring.task, scoring.target, tokenizer)
    return run_with_smaller_batches(
        "evaluation",
        scoring.plan.eval_batch_size,
        lambda batch_size: generate_answers(
            model,
            tokenizer,
            prompts,
            scoring.recipe.evaluate.max_new_tokens,
            Batching(batch_size, scoring.plan.precision, on_progress=scoring.watch("generating answers")),
        ),
    )


def _score_copied_source(scoring: Scoring) -> Scored:
    drawn = rows_to_answer(scoring)
    sources, expected = _prompts_and_answers(scoring, list(drawn.values()))
    copied = [source.strip() for source in sources]
    scores = scoring.task.score_answers(copied, expected, scoring.plan.metric)
    metrics = scoring.estimate_metrics(scores, list(drawn))
    metrics |= scoring.estimate_user_metrics(copied, expected, list(drawn))
    return scoring.make_scores("copy of the source", "baseline", len(drawn), metrics=metrics)


def rows_to_answer(scoring: Scoring) -> dict[int, Row]:
    """Sample up to `evaluate.generate_rows` test rows with different prompts, and return them by index."""
    wanted = scoring.recipe.evaluate.generate_rows
    if not scoring.target.form.writes_answers or not wanted:
        return {}
    return draw_rows(scoring.texts, scoring.task, scoring.target, wanted, scoring.recipe.data.split_seed)


def missing_metrics(scoring: Scoring) -> str | None:
    """Return a message that names answer metrics whose package is missing and how to install it, or None."""
    missing = [name for name in OF_ANSWERS if not written.can_score(name)]
    return f"not computed: {', '.join(missing)} (to install: {written.INSTALL})" if missing else None


def _prompts_and_answers(scoring: Scoring, rows: Sequence[Row]) -> tuple[list[str], list[str]]:
    task, target = scoring.task, scoring.target
    return [task.prompt_text(row, target) for row in rows], [task.answer_text(row, target) for row in rows]
