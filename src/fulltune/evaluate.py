"""The evaluate stage: the same test rows and metrics for baselines and results. Stage: imports layers 0 and 1 only.

Three sets that never mix: train; eval (best checkpoint, early stopping, temperature); test (these scores).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fulltune import model as models
from fulltune.bootstrap import intervals
from fulltune.calibration import calibrate
from fulltune.errors import SetupError
from fulltune.inference import embeddings, generate, run_rows
from fulltune.recipe import Recipe
from fulltune.records import Answer, Confusion, DataSummary, Estimate, Outcome, Plan, Scores
from fulltune.store import load_split, load_texts
from fulltune.tasks import Predictions, Target, Task, causal_lm, task_named, text_classification

UserMetrics = Callable[[Any, Any], Mapping[str, float]]
WORST = 25


@dataclass(frozen=True)
class Bench:
    """What all contestants share."""

    recipe: Recipe
    plan: Plan
    task: Task
    target: Target
    data: Path
    user_metrics: UserMetrics | None

    @property
    def texts(self) -> list[dict[str, Any]]:
        return load_texts(self.data / "test")

    def estimates(self, kept: Mapping[str, np.ndarray], metrics: Callable[[Any], Mapping[str, float]]) -> Any:
        settings = self.recipe.evaluate
        return intervals(kept, metrics, samples=settings.bootstrap_samples, confidence=settings.confidence)


def check_extras(recipe: Recipe) -> None:
    """Fail before training, not after it, when scoring needs a package that is missing.

    Raises:
        SetupError: Naming the package.
    """
    if recipe.task == "causal-lm" and recipe.evaluate.generate_rows:
        causal_lm.score_answers(["a"], ["a"])


def baselines(recipe: Recipe, plan: Plan, summary: DataSummary, folder: Path) -> list[Scores]:
    """Score what costs no training: majority class and frozen embeddings, or the untouched language model.

    Results are kept in `scores/`; those that are there are not made again.
    """
    bench = _bench(recipe, plan, summary, folder, None)
    if recipe.task == "causal-lm":
        return [_kept(folder / "scores" / "before-training.json", lambda: _untouched(bench))]
    return [
        _kept(folder / "scores" / "baseline-majority.json", lambda: _majority(bench)),
        _kept(folder / "scores" / "baseline-frozen.json", lambda: _frozen(bench)),
    ]


def score(
    recipe: Recipe, plan: Plan, summary: DataSummary, outcome: Outcome, folder: Path, metrics: UserMetrics | None
) -> Scores:
    """Score the trained model on the test rows, fit its temperature on the eval rows and write that into its folder."""
    bench = _bench(recipe, plan, summary, folder, metrics)
    if outcome.model_folder is None:
        raise SetupError(f"{folder}: attempt {outcome.attempt} left no model to evaluate")
    model_folder = folder / outcome.model_folder
    path = folder / "scores" / f"{plan.trial}.json"
    if metrics is not None:
        path.unlink(missing_ok=True)  # the scores that are there may lack these metrics
    scores = _kept(path, lambda: _trained(bench, model_folder))
    if scores.calibration is not None:
        notes_path = model_folder / "fulltune.json"
        notes = json.loads(notes_path.read_text(encoding="utf-8"))
        notes["temperature"] = scores.calibration.temperature
        part = notes_path.with_name(notes_path.name + ".part")
        part.write_text(json.dumps(notes, indent=2) + "\n", encoding="utf-8")
        part.replace(notes_path)
    return scores


def _kept(path: Path, make: Callable[[], Scores]) -> Scores:
    if path.exists():
        return Scores.load(path)
    started = time.monotonic()
    scores = make()
    scores = scores.model_copy(update={"seconds": round(time.monotonic() - started, 3)})
    scores.save(path)
    return scores


def _bench(recipe: Recipe, plan: Plan, summary: DataSummary, folder: Path, metrics: UserMetrics | None) -> Bench:
    target = Target(summary.problem_type, summary.columns, summary.labels, summary.joint)
    return Bench(recipe, plan, task_named(recipe.task), target, folder / "data", metrics)


def _scores(
    bench: Bench, name: str, kind: Literal["baseline", "untouched", "trained"], rows: int, **fields: Any
) -> Scores:
    return Scores(
        name=name,
        kind=kind,
        rows=rows,
        main_metric=bench.plan.metric,
        greater_is_better=bench.plan.greater_is_better,
        confidence=bench.recipe.evaluate.confidence,
        **fields,
    )


# ---- classifiers -----------------------------------------------------------------------------------------------


def _labels(rows: Any) -> np.ndarray:
    return np.array(rows["labels"])


def _label_scores(bench: Bench, name: str, predicted: np.ndarray) -> Scores:
    """Scores of a baseline that gives labels without probabilities."""
    true = _labels(load_split(bench.data / "test"))
    kept = {"true": true, "predicted": predicted}
    metrics = bench.estimates(
        kept, lambda rows: text_classification.label_metrics(rows["true"], rows["predicted"], bench.target)
    )
    return _scores(bench, name, "baseline", len(true), metrics=metrics, confusion=_confusion(bench, true, predicted))


def _majority(bench: Bench) -> Scores:
    """The most frequent class of train (each label's majority; the mean) for every row."""
    from sklearn.dummy import DummyClassifier, DummyRegressor

    train, test = load_split(bench.data / "train"), load_split(bench.data / "test")
    regression = bench.target.problem_type == "regression"
    dummy = DummyRegressor() if regression else DummyClassifier(strategy="most_frequent")
    dummy.fit(np.zeros((len(train), 1)), _labels(train))
    name = {"regression": "mean of train", "multi_label": "majority of each label"}
    return _label_scores(
        bench, name.get(bench.target.problem_type, "majority class"), dummy.predict(np.zeros((len(test), 1)))
    )


def _frozen(bench: Bench) -> Scores:
    """The pretrained model left as it is: mean-pooled embeddings and the simplest classifier on them."""
    from sklearn.linear_model import LogisticRegression, RidgeCV
    from sklearn.multiclass import OneVsRestClassifier
    from sklearn.neighbors import NearestCentroid

    train, test = load_split(bench.data / "train"), load_split(bench.data / "test")
    model, pad_token_id = _load_pretrained(bench)
    embed = partial(
        embeddings,
        model,
        task=bench.task,
        pad_token_id=pad_token_id,
        batch_size=bench.plan.eval_batch_size,
        precision=bench.plan.precision,
    )
    match bench.target.problem_type:
        case "regression":
            name, head = "ridge regression (frozen embeddings)", RidgeCV(alphas=np.logspace(-3, 3, 7))
        case "multi_label":
            name, head = (
                "logistic regression (frozen embeddings)",
                OneVsRestClassifier(LogisticRegression(max_iter=1000)),
            )
        case _:
            name, head = "nearest centroid (frozen embeddings)", NearestCentroid()
    head.fit(embed(train), _labels(train))
    return _label_scores(bench, name, np.asarray(head.predict(embed(test))))


def _load_pretrained(bench: Bench) -> tuple[Any, int]:
    """The model before training, on the plan's device, and its padding token."""
    block = bench.recipe.model
    tokenizer = models.load_tokenizer(block, chat_template=bench.recipe.data.chat_template)
    changes = bench.task.config_changes(bench.target, tokenizer)
    model = models.load(block, bench.task.AUTO_CLASS, changes, head_is_new=bench.task.HEAD_IS_NEW)
    return _placed(model, bench), tokenizer.pad_token_id


def _placed(model: Any, bench: Bench) -> Any:
    return model.to(bench.plan.device)


def _confusion(bench: Bench, true: np.ndarray, predicted: np.ndarray) -> Confusion | None:
    if bench.target.problem_type != "single_label":
        return None
    from sklearn.metrics import confusion_matrix

    counts = confusion_matrix(true, predicted, labels=range(len(bench.target.labels)))
    return Confusion(labels=bench.target.labels, counts=tuple(tuple(int(n) for n in row) for row in counts))


def _user_estimates(bench: Bench, predictions: Any, references: Any) -> dict[str, Estimate]:
    """Intervals of the user's own metrics."""
    if bench.user_metrics is None:
        return {}
    call, plain = bench.user_metrics, isinstance(predictions, list)
    kept = {
        "predicted": np.array(predictions, dtype=object) if plain else predictions,
        "true": np.array(references, dtype=object) if plain else references,
    }

    def metrics(rows: Mapping[str, np.ndarray]) -> Mapping[str, float]:
        both = (rows["predicted"], rows["true"])
        one, two = (list(both[0]), list(both[1])) if plain else both
        try:
            return {str(name): float(value) for name, value in call(one, two).items()}
        except Exception as error:
            raise SetupError(
                f"metrics: your function failed on {len(one)} rows ({type(error).__name__}: {error}); it must return "
                "names and numbers for any selection of the test rows; the model is kept, call again with it repaired"
            ) from error

    return dict(bench.estimates(kept, metrics))


def _trained(bench: Bench, model_folder: Path) -> Scores:
    """The finished model, loaded from its folder as any user would."""
    # Keeps what the recipe says about remote code and attention; the revision belongs to the model before training.
    block = bench.recipe.model.model_copy(update={"name": str(model_folder), "revision": None})
    tokenizer = models.load_tokenizer(block)
    model = _placed(models.load(block, bench.task.AUTO_CLASS, {}, head_is_new=False), bench)
    if bench.recipe.task == "causal-lm":
        return _language_scores(bench, model, tokenizer, bench.plan.trial, "trained")
    run = partial(_run, bench, model, tokenizer.pad_token_id)
    test = load_split(bench.data / "test")
    kept = run(test)
    metrics = bench.estimates(kept, lambda rows: bench.task.metrics(rows, bench.target))
    predicted = text_classification.predict_labels(kept["logits"], bench.target)
    calibration = None
    if bench.target.problem_type == "single_label":
        chosen = run(load_split(bench.data / "eval"))
        calibration = calibrate(chosen["logits"], chosen["labels"], kept["logits"], kept["labels"])
    texts = [str(row[bench.target.columns["text"]]) for row in bench.texts]
    return _scores(
        bench,
        bench.plan.trial,
        "trained",
        len(test),
        metrics=metrics | _user_estimates(bench, predicted, kept["labels"]),
        calibration=calibration,
        confusion=_confusion(bench, kept["labels"], predicted),
        worst=tuple(bench.task.worst(kept, texts, bench.target, WORST)),
    )


def _run(bench: Bench, model: Any, pad_token_id: int, rows: Any) -> Predictions:
    return run_rows(
        model,
        rows,
        bench.task,
        bench.target,
        pad_token_id,
        batch_size=bench.plan.eval_batch_size,
        precision=bench.plan.precision,
    )


# ---- language models -------------------------------------------------------------------------------------------


def _untouched(bench: Bench) -> Scores:
    """The language model before training."""
    block = bench.recipe.model
    tokenizer = models.load_tokenizer(block, chat_template=bench.recipe.data.chat_template)
    model = _placed(models.load(block, bench.task.AUTO_CLASS, {}, head_is_new=False), bench)
    return _language_scores(bench, model, tokenizer, "before training", "untouched")


def _language_scores(
    bench: Bench, model: Any, tokenizer: Any, name: str, kind: Literal["untouched", "trained"]
) -> Scores:
    """Loss on all test rows; generated answers for the first `generate_rows` of them."""
    test = load_split(bench.data / "test")
    kept = _run(bench, model, tokenizer.pad_token_id, test)
    estimates = bench.estimates(kept, lambda rows: bench.task.metrics(rows, bench.target))
    answers: tuple[Answer, ...] = ()
    settings = bench.recipe.evaluate
    if settings.generate_rows:
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
        estimates |= _user_estimates(bench, made, expected)
        answers = tuple(
            Answer(text=causal_lm.prompt_text(row, bench.target), expected=want, predicted=got)
            for row, want, got in zip(rows, expected, made, strict=True)
        )
    return _scores(bench, name, kind, len(test), metrics=estimates, answers=answers)
