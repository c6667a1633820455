"""Models that write: loss on all test rows, generated answers for some; the untouched model is the baseline."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from fulltune.evaluate.scoring import Bench, Scored
from fulltune.inference.run import generate
from fulltune.records.scores import Answer
from fulltune.stats.metric_intervals import Resampled
from fulltune.tasks import causal_lm, seq2seq


def baselines(bench: Bench) -> dict[str, Callable[[], Scored]]:
    """File name to what makes it: the model before training; where there is a source, also its copy."""
    made = {"before-training": lambda: _scores(bench, *bench.load_pretrained(), "before training", "untouched")}
    if bench.target.problem_type == "source_target" and bench.recipe.evaluate.generate_rows:
        made["baseline-copy"] = lambda: _copy(bench)
    return made


def trained(bench: Bench, model: Any, tokenizer: Any) -> Scored:
    return _scores(bench, model, tokenizer, bench.plan.trial, "trained")


def _scores(bench: Bench, model: Any, tokenizer: Any, name: str, kind: Literal["untouched", "trained"]) -> Scored:
    test = bench.rows("test")
    kept = bench.run(model, tokenizer.pad_token_id, test)
    estimates = bench.estimates(kept, lambda rows: bench.task.metrics(rows, bench.target))
    answers: tuple[Answer, ...] = ()
    drawn = _drawn(bench)
    if drawn:
        rows = list(drawn.values())
        if bench.target.problem_type == "source_target":  # one example a row: cut as it is in training
            prompts = [list(map(int, test[position]["input_ids"])) for position in drawn]
        else:
            prompts = [causal_lm.generation_ids(row, bench.target, tokenizer) for row in rows]
        made = bench.in_batches(
            lambda batch_size: generate(
                model,
                tokenizer,
                prompts,
                max_new_tokens=bench.recipe.evaluate.max_new_tokens,
                batch_size=batch_size,
                precision=bench.plan.precision,
                watch=bench.watch("generating answers"),
            )
        )
        asked, expected = _words(bench, rows)
        positions = list(drawn)
        estimates |= _compared(bench, made, expected, positions) | bench.user_estimates(made, expected, positions)
        answers = tuple(
            Answer(text=text, expected=want, predicted=got)
            for text, want, got in zip(asked, expected, made, strict=True)
        )
    left_out = _left_out(bench) if drawn else ""
    count = len(next(iter(kept.values())))
    return bench.scores(name, kind, count, metrics=estimates, answers=answers, left_out=left_out)


def _copy(bench: Bench) -> Scored:
    """The source itself as the answer: what a summary, a correction or a paraphrase has to beat."""
    drawn = _drawn(bench)
    sources, expected = _words(bench, list(drawn.values()))
    metrics = _compared(bench, [source.strip() for source in sources], expected, list(drawn))
    return bench.scores("copy of the source", "baseline", len(drawn), metrics=metrics)


def _drawn(bench: Bench) -> dict[int, dict[str, Any]]:
    """Position and row of the test rows for which answers are generated, in the order of the file.

    Files are often sorted, and a prompt may stand there several times with other answers: the rows are drawn at random
    among different prompts. The draw depends on `data.split_seed` and the prompts alone.
    """
    wanted = bench.recipe.evaluate.generate_rows
    if bench.target.problem_type == "text" or not wanted:
        return {}
    task = seq2seq if bench.target.problem_type == "source_target" else causal_lm
    rows = bench.texts
    first: dict[str, int] = {}
    for position, row in enumerate(rows):
        # A conversation can be several examples, and one without a question has nothing to answer.
        if task.prompt_text(row, bench.target).strip():
            first.setdefault(task.group_key(row, bench.target), position)
    seed = bench.recipe.data.split_seed
    order = sorted(first, key=lambda prompt: hashlib.sha256(f"{seed}\0{prompt}".encode()).digest())
    return {position: rows[position] for position in sorted(first[prompt] for prompt in order[:wanted])}


def _left_out(bench: Bench) -> str:
    """The metrics of answers for which a package is missing here."""
    names = ("rougeL", "chrf", "bleu") if bench.target.problem_type == "source_target" else ("rougeL", "chrf")
    missing = [name for name in names if not causal_lm.can_score(name)]
    return f"not computed: {', '.join(missing)}; pip install 'fulltune[text-metrics]'" if missing else ""


def _words(bench: Bench, rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[str]]:
    """What is asked, and what should be answered."""
    task = seq2seq if bench.target.problem_type == "source_target" else causal_lm
    return [task.prompt_text(row, bench.target) for row in rows], [task.answer_text(row, bench.target) for row in rows]


def _compared(
    bench: Bench, answers: Sequence[str], expected: Sequence[str], positions: Sequence[int]
) -> dict[str, Resampled]:
    """The metrics of answers to the test rows at these positions, whoever gave them."""
    task = seq2seq if bench.target.problem_type == "source_target" else causal_lm
    kept = task.score_answers(answers, expected)
    return bench.estimates(kept, lambda rows: bench.task.metrics(rows, bench.target), positions)
