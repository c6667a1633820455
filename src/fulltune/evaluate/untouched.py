"""Baselines that read the rows with the untouched model: a linear probe as its head, and a classifier on embeddings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType

import numpy as np

from fulltune import probe
from fulltune.evaluate.scoring import Scored, Scoring
from fulltune.models.base import opened
from fulltune.records.probe import FrozenRival, Probe

FROZEN = "baseline-frozen"
LINEAR_PROBE = "linear probe of the untouched model"
Predicted = Iterator[tuple[int, np.ndarray]]
"""Number of each test row, and the outputs of its items [items, outputs]: itself, its words, its choices."""


def baselines(scoring: Scoring, scorer: ModuleType) -> dict[str, Callable[[], Scored]]:
    """File name to what makes it; the scorer's `trained` scores the probe as the model's head, its `frozen` what
    embeddings give."""
    if scoring.plan.head_init is None:  # a head that is kept, or a run of an earlier version
        if scoring.target.form.has_windows:
            return {}
        if (scoring.data.parent / "scores" / f"{FROZEN}.json").exists():  # nothing has to be fitted for it
            return {FROZEN: lambda: _frozen(scoring, scorer, _probe(scoring))}
    found, made = _probe(scoring), {}
    if found.frozen is not None:
        made[FROZEN] = lambda: _frozen(scoring, scorer, found)
    if found.head is not None:
        made["baseline-probe"] = lambda: _as_head(scoring, scorer)
    return made


def _extractor(scoring: Scoring) -> probe.Extractor:
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(probe.SEED)  # what the head lacks is drawn
        model, processor = scoring.load(None)
    return probe.Extractor(
        model,
        scoring.recipe.task,
        scoring.target,
        processor.pad_token_id,
        scoring.plan.eval_batch_size,
        scoring.plan.precision,
        scoring.class_weights,
        probe.separators(processor, scoring.target),
        scoring.watch("reading rows with the untouched model"),
    )


def _probe(scoring: Scoring) -> Probe:
    """The run folder's; fitted here where no training needed it."""
    rows, eval_rows = (opened(scoring.rows(split), scoring.base.processor) for split in ("train", "eval"))
    with_head = scoring.plan.head_init is not None
    return probe.fitted(scoring.data.parent, lambda: _extractor(scoring), rows, eval_rows, with_head)


def _frozen(scoring: Scoring, scorer: ModuleType, found: Probe) -> Scored:
    assert found.frozen is not None, "asked before"
    rival, rows = found.frozen, opened(scoring.rows("test"), scoring.base.processor)
    extractor, folder = _extractor(scoring), scoring.data.parent
    if found.head is not None:
        probe.put_head(extractor.model, folder)  # embeddings as they were: layers that the checkpoint lacks give some
    predicted = probe.predicted(extractor, rows, rival, probe.rival_of(folder))
    scored: Scored = scorer.frozen(scoring, name_of(rival, found), predicted)
    return scored


def name_of(rival: FrozenRival, found: Probe) -> str:
    """`logistic regression (frozen embeddings of 20,000 train rows)`."""
    of = f" of {found.train_rows:,} train rows" if found.train_rows < found.of_rows else ""
    read = ", each text read alone" if rival.pooling == "apart" else ""
    return f"{rival.kind} (frozen embeddings{of}{read})"


def _as_head(scoring: Scoring, scorer: ModuleType) -> Scored:
    model, processor = scoring.load(None)
    probe.put_head(model, scoring.data.parent)
    found: Scored = scorer.trained(scoring, model, processor)
    changes = {"name": LINEAR_PROBE, "kind": "baseline", "calibration": None, "worst": ()}
    return replace(found, scores=found.scores.model_copy(update=changes))
