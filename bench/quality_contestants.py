"""What `bench/quality.py` lets compete: one run each, all on the rows that fulltune's data stage left, scored alike.

A contestant gets a point (a set with so many train rows), a seed and a rate, and gives the metric on the eval rows and
what came out of each test row. It learns from train rows, chooses by eval rows, and test rows are only scored.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

FROZEN = ("frozen-logreg", "frozen-centroid", "frozen-twin")
"""What costs no training."""
OURS = ("fulltune", "fulltune-searched", "lora-random", "lora-probe")
PLAIN_BATCH, SCORED_TOGETHER = 32, 64
NUMBERS = (-30.0, 30.0)
"""Predictions beyond these count as these."""
STRENGTHS = (0.1, 1.0, 10.0, 100.0, 1000.0)
"""Of the logistic regression, `C`; of ridge regression its inverses."""


@dataclass(frozen=True)
class Point:
    """A set with so many train rows, prepared."""

    name: str
    rows: int
    """0: all."""
    epochs: float
    """Of contestants whose rate is searched."""
    metric: str
    """`accuracy`, `f1` (of entities) or `r2`."""
    recipe: str
    """Model, task and data."""
    folder: Path
    """With the files of the rows, the recipe, and fulltune's run folder `run` with data and plan."""

    @cached_property
    def job(self) -> Any:
        from fulltune import api

        return api.job(self.folder / "recipe.yaml", run_folder=self.folder / "run", listener=lambda event: None)

    @cached_property
    def scoring(self) -> Any:
        """fulltune's rows, task and target."""
        from fulltune import evaluate, pipeline

        reached = pipeline.run(self.job, until="plan")
        assert not reached.summary.dropped, f"{self.name} {self.rows}: {reached.summary.dropped}"
        return evaluate.scoring_of(self.job.recipe, reached.plan, reached.summary, self.job.folder, self.job.base)

    @property
    def precision(self) -> str:
        """What fulltune's plan takes here, for all contestants."""
        return str(self.scoring.plan.precision)

    def features(self, split: str) -> list[dict[str, Any]]:
        """The tokenised rows."""
        return list(self.scoring.rows(split))

    def labels(self, split: str) -> np.ndarray:
        """Classes or numbers, [rows]."""
        return np.asarray(self.scoring.rows(split)["labels"])

    def texts(self, split: str) -> list[list[str]]:
        """The text of each row, or both."""
        from fulltune.inference.store import texts

        columns = self.scoring.target.columns
        names = [columns[role] for role in ("text", "text_pair") if role in columns]
        return [[str(row[name]) for name in names] for row in texts(self.scoring.data / split)]


@dataclass(frozen=True)
class Result:
    """A run of a contestant."""

    eval_value: float
    outcomes: np.ndarray
    """accuracy: 0 or 1 [rows]; f1: entities that are right, found, expected [rows, 3]; r2: prediction and target [rows,
    2]."""
    seconds: float
    """Of all that a user waits for until the model is there."""
    notes: Mapping[str, Any]
    """What was chosen."""


def value_of(metric: str, outcomes: np.ndarray) -> float:
    """The metric of all rows."""
    if metric == "accuracy":
        return float(outcomes.mean())
    if metric == "f1":
        right, found, expected = outcomes.sum(axis=0, dtype=np.float64)
        return float(2 * right / (found + expected)) if found + expected else 0.0
    predicted, true = outcomes.astype(np.float64).T
    return float(1 - ((predicted - true) ** 2).sum() / ((true - true.mean()) ** 2).sum())


def outcomes_of(point: Point, split: str, predicted: Any) -> np.ndarray:
    """What came out of each row, from classes, numbers, or the label of each word that has a token."""
    if point.metric == "accuracy":
        return (np.asarray(predicted) == point.labels(split)).astype(np.uint8)
    if point.metric == "r2":
        # Weights that are not finite any more predict nothing.
        numbers = np.clip(np.nan_to_num(np.asarray(predicted, np.float64)), *NUMBERS)
        return np.stack([numbers, point.labels(split)], axis=-1)
    from fulltune.tasks import token_classification as task
    from fulltune.tasks.padding import ragged

    # A word without a token counts as O, as in fulltune's own scores.
    kept = {"predicted": ragged(predicted), "probability": ragged([np.ones(len(row), np.float32) for row in predicted])}
    counted = task.over_all_words(kept, point.scoring.rows(split), point.scoring.target)
    return np.asarray(counted["entities"].sum(axis=1), np.uint8)


def scored(point: Point, split: str, model: Any, pad_token_id: int) -> np.ndarray:
    """What a model makes of the rows of a split."""
    from fulltune.inference.run import Batching, run_rows
    from fulltune.tasks.classes import predict_labels

    scoring = point.scoring
    kept = run_rows(
        model,
        scoring.rows(split),
        scoring.task,
        scoring.target,
        pad_token_id,
        Batching(SCORED_TOGETHER, point.precision),
    )
    predicted = kept["predicted"] if point.metric == "f1" else predict_labels(kept["logits"], scoring.target)
    return outcomes_of(point, split, predicted)


# ---- the plain Trainer -----------------------------------------------------------------------------------------


def trainer_settings(name: str, point: Point) -> dict[str, Any]:
    """What `TrainingArguments` gets; the rest are its defaults."""
    common = {"train_sampling_strategy": "group_by_length", "use_cpu": True, "report_to": "none"}
    if name == "trainer-default":
        return common
    searched = {"num_train_epochs": point.epochs, "per_device_train_batch_size": PLAIN_BATCH, "warmup_steps": 0.1}
    return common | searched | {"weight_decay": 0.01}


def trainer(name: str, point: Point, seed: int, rate: float | None) -> Result:
    """transformers' Trainer; with a searched rate the epoch that is best on the eval rows."""
    from transformers import (
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
        DataCollatorForTokenClassification,
        DataCollatorWithPadding,
        Trainer,
        TrainerCallback,
        TrainingArguments,
        set_seed,
    )

    scoring, tokenizer = point.scoring, point.job.base.processor
    began = time.monotonic()
    set_seed(seed)
    tags = point.metric == "f1"
    kind = AutoModelForTokenClassification if tags else AutoModelForSequenceClassification
    model = kind.from_pretrained(model_path(point), num_labels=max(1, len(scoring.target.labels)), dtype="float32")
    read = ("input_ids", "token_type_ids", "labels")
    rows = [
        {name: value.tolist() if hasattr(value, "tolist") else value for name, value in row.items() if name in read}
        for row in point.features("train")
    ]
    best: dict[str, Any] = {}

    class KeepBest(TrainerCallback):
        def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            value = value_of(point.metric, scored(point, "eval", model, tokenizer.pad_token_id))
            if not best or value > best["value"]:
                weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
                best.update(value=value, epoch=round(state.epoch), weights=weights)

    searched = rate is not None
    arguments = TrainingArguments(
        output_dir=str(point.folder / "trainer"),
        **trainer_settings(name, point),
        **({"learning_rate": rate} if searched else {}),
        bf16=point.precision == "bf16",
        seed=seed,
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
    )
    collator = DataCollatorForTokenClassification(tokenizer) if tags else DataCollatorWithPadding(tokenizer)
    Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=collator,
        callbacks=[KeepBest()] if searched else None,
    ).train()
    if searched:
        model.load_state_dict(best["weights"])
    seconds = time.monotonic() - began
    shutil.rmtree(point.folder / "trainer", ignore_errors=True)
    eval_value = value_of(point.metric, scored(point, "eval", model, tokenizer.pad_token_id))
    notes = {"best_epoch": best["epoch"]} if searched else {}
    return Result(eval_value, scored(point, "test", model, tokenizer.pad_token_id), seconds, notes)


def model_path(point: Point) -> str:
    """The folder of a model in a package."""
    from importlib.util import find_spec

    package, _, inner = point.job.recipe.model.name.removeprefix("package:").partition("/")
    places = getattr(find_spec(package), "submodule_search_locations", None)
    assert places, f"{package} is not installed"
    return str(Path(places[0]) / inner)


# ---- fulltune --------------------------------------------------------------------------------------------------


def head_starts() -> bool:
    """Whether this fulltune can choose how a new head starts."""
    from fulltune.recipe.methods import LoraMethod

    return "head_init" in LoraMethod.model_fields


def our_settings(name: str, point: Point) -> dict[str, dict[str, Any]]:
    """Blocks of the recipe; the plain `fulltune` has nothing but the seed."""
    evaluate = {"metric": point.metric, "baselines": False}
    if name == "fulltune":
        return {"method": {"kind": "full"}, "evaluate": evaluate}
    train = {"num_train_epochs": point.epochs, "global_batch_size": PLAIN_BATCH}
    if name == "fulltune-searched":
        return {"method": {"kind": "full"}, "train": train, "evaluate": evaluate}
    return {"method": {"kind": "lora", "head_init": name.removeprefix("lora-")}, "train": train, "evaluate": evaluate}


def ours(name: str, point: Point, seed: int, rate: float | None) -> Result:
    """A run of fulltune with the recipe of this contestant."""
    blocks = our_settings(name, point)
    if rate is not None:
        blocks["method"]["learning_rate"] = rate
    if not head_starts():
        blocks["method"].pop("head_init", None)  # every head starts at random there
    return trained(point, blocks, seed)


def trained(point: Point, blocks: dict[str, dict[str, Any]], seed: int) -> Result:
    """`fulltune train` with these blocks, then its model on eval and test rows."""
    import yaml

    from fulltune import api, evaluate, pipeline

    blocks.setdefault("train", {})["seed"] = seed
    folder = point.folder / "ours"
    shutil.rmtree(folder, ignore_errors=True)
    recipe = point.folder / "ours.yaml"
    recipe.write_text(point.recipe + yaml.safe_dump(blocks), encoding="utf-8")
    began = time.monotonic()
    job = api.job(recipe, run_folder=folder, listener=lambda event: None)
    reached = pipeline.run(job, until="train")
    seconds = time.monotonic() - began
    plan, outcome = reached.plan, reached.outcome
    assert plan is not None
    assert outcome is not None
    assert outcome.model_folder is not None
    scoring = evaluate.scoring_of(job.recipe, plan, reached.summary, folder, job.base)
    model, tokenizer = scoring.load(folder / outcome.model_folder)
    parts = [scored(point, split, model, tokenizer.pad_token_id) for split in ("eval", "test")]
    shutil.rmtree(folder)
    notes = {
        "learning_rate": plan.learning_rate,
        "epochs": plan.num_train_epochs,
        "batch": plan.global_batch_size,
        "steps": outcome.steps,
        "best_step": outcome.best_step,
        "train_seconds": round(outcome.train_seconds, 1),
    }
    return Result(value_of(point.metric, parts[0]), parts[1], seconds, notes)


# ---- what costs no training ------------------------------------------------------------------------------------


def frozen(name: str, point: Point, seed: int, rate: float | None) -> Result:
    """The untouched model's embeddings, scaled to length 1, and a simple model on them."""
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.neighbors import NearestCentroid

    began = time.monotonic()
    vectors_of = word_states if point.metric == "f1" else twin_embeddings if name == "frozen-twin" else embeddings
    splits = {split: vectors_of(point, split) for split in ("train", "eval", "test")}
    labels = word_labels(point) if point.metric == "f1" else point.labels("train")
    if name == "frozen-centroid":
        heads: list[tuple[float, Any]] = [(0.0, NearestCentroid())]
    elif point.metric == "r2":
        heads = [(strength, Ridge(alpha=1 / strength)) for strength in STRENGTHS]
    else:
        heads = [(strength, LogisticRegression(C=strength, max_iter=2000)) for strength in STRENGTHS]
    found = []
    for strength, head in heads:
        head.fit(np.concatenate(splits["train"]) if point.metric == "f1" else splits["train"], labels)
        value = value_of(point.metric, outcomes_of(point, "eval", _predicted(point, head, splits["eval"])))
        found.append((value, strength, head))
    value, strength, head = max(found, key=lambda one: one[0])
    seconds = time.monotonic() - began
    outcomes = outcomes_of(point, "test", _predicted(point, head, splits["test"]))
    return Result(value, outcomes, seconds, {"strength": strength} if len(heads) > 1 else {})


def _predicted(point: Point, head: Any, vectors: Any) -> Any:
    """Of each row, or of each row's words."""
    if point.metric != "f1":
        return head.predict(vectors)
    flat = head.predict(np.concatenate(vectors))
    return np.split(flat, np.cumsum([len(row) for row in vectors])[:-1])


def embeddings(point: Point, split: str) -> np.ndarray:
    """Mean of the last states of each row, both texts of a pair read together: [rows, hidden]."""
    model, tokenizer = point.scoring.load(None)
    return _means(point, model, tokenizer, point.scoring.rows(split))


def _means(point: Point, model: Any, tokenizer: Any, rows: Any) -> np.ndarray:
    """Mean of the last states of tokenised rows, scaled to length 1: [rows, hidden]."""
    from fulltune.probe import Extractor

    scoring = point.scoring
    extractor = Extractor(
        model, scoring.recipe.task, scoring.target, tokenizer.pad_token_id, SCORED_TOGETHER, point.precision
    )
    found = extractor.features(rows, layers=None).mean
    assert found is not None, "rows have a mean"
    return found


def twin_embeddings(point: Point, split: str) -> np.ndarray:
    """Of pairs: each text read alone, their distance and their product in each direction, [rows, 2 hidden + 1]."""
    model, tokenizer = point.scoring.load(None)
    one, other = (_embedded(point, model, tokenizer, column) for column in zip(*point.texts(split), strict=True))
    both = one * other
    # Scaled to size 1 as a whole, so that one strength fits all columns.
    return np.concatenate([np.abs(one - other), both, both.sum(axis=1, keepdims=True)], axis=1)


def _embedded(point: Point, model: Any, tokenizer: Any, texts: Sequence[str]) -> np.ndarray:
    """Mean of the last states of texts, scaled to length 1: [texts, hidden]."""
    ids = tokenizer(list(texts), truncation=True, max_length=128)["input_ids"]
    rows = [{"input_ids": one, "labels": 0} for one in ids]
    return _means(point, model, tokenizer, rows)


def word_states(point: Point, split: str) -> list[np.ndarray]:
    """Of each row the last states of its words' first sub-words, scaled to length 1: [words, hidden] each."""
    import torch
    import torch.nn.functional as F

    from fulltune.inference.run import autocast, by_length

    model, tokenizer = point.scoring.load(None)
    body, rows = getattr(model, model.base_model_prefix).eval(), point.features(split)
    found: list[Any] = [None] * len(rows)
    order = by_length(rows)
    for start in range(0, len(order), SCORED_TOGETHER):
        chosen = order[start : start + SCORED_TOGETHER]
        batch = point.scoring.task.collate([rows[i] for i in chosen], tokenizer.pad_token_id)
        labels = batch.pop("labels")
        with torch.no_grad(), autocast(model, point.precision):
            hidden = F.normalize(body(**batch).last_hidden_state.float(), dim=-1)
        for place, states, mask in zip(chosen, hidden, labels != -100, strict=True):
            found[place] = states[mask].numpy()
    return found


def word_labels(point: Point) -> np.ndarray:
    """Of all words of the train rows that have a token."""
    flat = np.concatenate([np.asarray(row["labels"]) for row in point.features("train")])
    return flat[flat != -100]


# ---- SetFit ----------------------------------------------------------------------------------------------------


SETFIT = {"num_iterations": 5}
"""Beside its defaults: with all pairs of rows it would take hours."""


def setfit(name: str, point: Point, seed: int, rate: float | None) -> Result:
    """SetFit with its defaults, except for the number of pairs; it chooses nothing by eval rows."""
    import torch
    from datasets import Dataset
    from setfit import SetFitModel, Trainer, TrainingArguments

    parts = {}
    for split in ("train", "eval", "test"):
        texts = [one for [one] in point.texts(split)]
        parts[split] = Dataset.from_dict({"text": texts, "label": point.labels(split).tolist()})
    began = time.monotonic()
    torch.manual_seed(seed)
    arguments = TrainingArguments(
        output_dir=str(point.folder / "setfit"), seed=seed, report_to="none", save_strategy="no", **SETFIT
    )
    trained = Trainer(SetFitModel.from_pretrained(model_path(point)), arguments, train_dataset=parts["train"])
    # It has no setting for bf16. Without a cache, which would keep the weights as they were at first.
    with torch.autocast("cpu", torch.bfloat16, enabled=point.precision == "bf16", cache_enabled=False):
        trained.train()
        seconds = time.monotonic() - began
        found = [
            outcomes_of(point, split, np.asarray(trained.model.predict(parts[split]["text"])))
            for split in ("eval", "test")
        ]
    shutil.rmtree(point.folder / "setfit", ignore_errors=True)
    return Result(value_of(point.metric, found[0]), found[1], seconds, {})


# ---- all of them -----------------------------------------------------------------------------------------------


def settings(name: str, point: Point) -> dict[str, Any]:
    """What tells a run of this contestant from one that was made otherwise; no seed and no rate."""
    if name.startswith("trainer"):
        return trainer_settings(name, point)
    if name in OURS:
        return our_settings(name, point)
    return dict(SETFIT) if name == "setfit" else {"strengths": STRENGTHS}


def run(name: str, point: Point, seed: int, rate: float | None) -> Result:
    """One run.

    Args:
        name: Of the contestant.
        point: The rows.
        seed: Of everything that is drawn.
        rate: Peak learning rate; None: the contestant's own.
    """
    runs: dict[str, Callable[[str, Point, int, float | None], Result]] = {"setfit": setfit}
    runs |= dict.fromkeys(OURS, ours) | dict.fromkeys(FROZEN, frozen)
    return runs.get(name, trainer)(name, point, seed, rate)
