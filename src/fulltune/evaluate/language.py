"""Language models: loss on all test rows, generated answers for some; the untouched model is the baseline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from fulltune.evaluate.bench import Bench
from fulltune.inference import generate
from fulltune.records import Answer, Scores
from fulltune.tasks import causal_lm


def baselines(bench: Bench) -> dict[str, Callable[[], Scores]]:
    """File name to what makes it: the language model before training."""
    return {"before-training": lambda: _scores(bench, *bench.load_pretrained(), "before training", "untouched")}


def trained(bench: Bench, model: Any, tokenizer: Any) -> Scores:
    return _scores(bench, model, tokenizer, bench.plan.trial, "trained")


def _scores(bench: Bench, model: Any, tokenizer: Any, name: str, kind: Literal["untouched", "trained"]) -> Scores:
    kept = bench.run(model, tokenizer.pad_token_id, bench.rows("test"))
    estimates = bench.estimates(kept, lambda rows: bench.task.metrics(rows, bench.target))
    answers: tuple[Answer, ...] = ()
    settings = bench.recipe.evaluate
    if settings.generate_rows and bench.target.problem_type != "text":
        # A conversation can be several examples, and one without a question has nothing to answer.
        conversations = {row["place"]: row for row in bench.texts}.values()
        rows = [row for row in conversations if causal_lm.prompt_text(row, bench.target).strip()]
        rows = rows[: settings.generate_rows]
        prompts = [causal_lm.generation_ids(row, bench.target, tokenizer) for row in rows]
        made = generate(
            model,
            tokenizer,
            prompts,
            max_new_tokens=settings.max_new_tokens,
            batch_size=bench.plan.eval_batch_size,
            precision=bench.plan.precision,
        )
        expected = [causal_lm.answer_text(row, bench.target) for row in rows]
        answer_scores = causal_lm.score_answers(made, expected)
        estimates |= bench.estimates(answer_scores, lambda rows: bench.task.metrics(rows, bench.target))
        estimates |= bench.user_estimates(made, expected)
        answers = tuple(
            Answer(text=causal_lm.prompt_text(row, bench.target), expected=want, predicted=got)
            for row, want, got in zip(rows, expected, made, strict=True)
        )
    return bench.scores(name, kind, len(next(iter(kept.values()))), metrics=estimates, answers=answers)
