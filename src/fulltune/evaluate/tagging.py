"""Models that give each word a tag; baselines that need no training."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from fulltune.evaluate.scoring import WORST, Scored, Scoring
from fulltune.inference import store
from fulltune.inference.run import autocast, lengths_of, longest_first, watched
from fulltune.stats.bootstrap import Resampled
from fulltune.tasks import tags, token_classification
from fulltune.tasks.padding import ragged
from fulltune.tasks.token_classification import TAGS, WORD_IDS

_log = logging.getLogger(__name__)


def baselines(scoring: Scoring) -> dict[str, Callable[[], Scored]]:
    """File name to what makes it: no entity at all, a lexicon, and the simplest tagger on frozen embeddings."""
    return {
        "baseline-no-entity": lambda: _tagged(scoring, "every word O", _nothing(scoring)),
        "baseline-lexicon": partial(_lexicon, scoring),
        "baseline-frozen": partial(_frozen, scoring),
    }


def trained(scoring: Scoring, model: Any, tokenizer: Any) -> Scored:
    """The trained model; words that it never saw (cut off, or without a token) count as `O`."""
    target = scoring.target
    kept = token_classification.over_all_words(scoring.run(model, tokenizer), scoring.rows("test"), target)
    words = int(kept["words"].sum())
    if lost := words - int(kept["seen"].sum()):
        _log.warning(
            "%d of %d words of the test rows have no token (cut off at data.max_length, or unknown to the tokenizer); "
            "they count as O",
            *(lost, words),
        )
    sentences = [_words(scoring, row) for row in scoring.texts]
    kept["tokens"] = ragged(sentences)
    metrics = _estimates(scoring, kept)
    if scoring.user_metrics is not None:
        metrics |= scoring.user_estimates(_names(scoring, kept["predicted"]), _names(scoring, kept["gold"]))
    worst = token_classification.worst(kept, [" ".join(sentence) for sentence in sentences], target, WORST)
    return scoring.scores(scoring.plan.trial, "trained", len(sentences), metrics=metrics, worst=tuple(worst))


def _names(scoring: Scoring, rows: np.ndarray) -> list[list[str]]:
    """Tags by name, as a user's metric expects them."""
    return [[scoring.target.labels[label] for label in row] for row in rows]


def _words(scoring: Scoring, row: Mapping[str, Any]) -> list[str]:
    return tags.words_and_tags(row, scoring.target.columns)[0]


def _estimates(scoring: Scoring, kept: Mapping[str, np.ndarray]) -> dict[str, Resampled]:
    """Metrics with intervals; only sums per row are drawn again, so that many draws are fast."""
    return scoring.estimates(
        {name: kept[name] for name in ("entities", "words", "right", "nll", "seen") if name in kept}
    )


def _tagged(scoring: Scoring, name: str, predicted: Sequence[np.ndarray]) -> Scored:
    """Scores of a baseline that gives tags without probabilities."""
    gold = [np.asarray(row) for row in scoring.rows("test")[TAGS]]
    kept = token_classification.counts(gold, predicted, scoring.target)
    return scoring.scores(name, "baseline", len(gold), metrics=_estimates(scoring, kept))


def _nothing(scoring: Scoring) -> list[np.ndarray]:
    """For each test row the label O of each word."""
    return [np.zeros(len(row), np.int64) for row in scoring.rows("test")[TAGS]]


def _lexicon(scoring: Scoring) -> Scored:
    """For each word the tag it has most often in train; `O` for words that train does not have."""
    ids = {label: position for position, label in enumerate(scoring.target.labels)}
    seen: defaultdict[str, Counter[int]] = defaultdict(Counter)
    for row in store.texts(scoring.data / "train"):  # one by one: there may be many
        for word, tag in zip(*tags.words_and_tags(row, scoring.target.columns), strict=True):
            seen[word][ids[tag]] += 1
    lexicon = {word: min(counts, key=lambda label: (-counts[label], label)) for word, counts in seen.items()}
    predicted = [np.array([lexicon.get(word, 0) for word in _words(scoring, row)]) for row in scoring.texts]
    return _tagged(scoring, "most frequent tag of each word", predicted)


def _frozen(scoring: Scoring) -> Scored:
    """The pretrained model left as it is: each word's mean hidden state, and the tag whose mean is nearest."""
    model, tokenizer = scoring.load(None)
    return scoring.in_batches(lambda batch_size: _nearest(scoring, model, tokenizer.pad_token_id, batch_size))


def _nearest(scoring: Scoring, model: Any, pad_token_id: int, batch_size: int) -> Scored:
    vectors_of = partial(_word_vectors, scoring, model, pad_token_id, batch_size)
    num_labels, rows = len(scoring.target.labels), scoring.rows("train")
    sums, seen = np.zeros((num_labels, 1)), np.zeros(num_labels)
    for position, words, vectors in vectors_of("train"):
        marks = np.eye(num_labels)[np.asarray(rows[position][TAGS])[words]]
        sums, seen = sums + marks.T @ vectors, seen + marks.sum(axis=0)
    known = np.flatnonzero(seen)
    centres = sums[known] / seen[known, None]
    predicted = _nothing(scoring)
    for position, words, vectors in vectors_of("test"):
        # The squared distance without the part that is the same for all centres.
        distances = (centres**2).sum(axis=1) - 2 * vectors @ centres.T
        predicted[position][words] = known[distances.argmin(axis=1)]
    return _tagged(scoring, "nearest centroid (frozen embeddings)", predicted)


def _word_vectors(
    scoring: Scoring, model: Any, pad_token_id: int, batch_size: int, split: str
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """For each row its position, the words seen, and the mean of their sub-words' last hidden states, scaled to length
    1: float32 [words, hidden]."""
    import torch
    import torch.nn.functional as F

    body = getattr(model, model.base_model_prefix, model).eval()
    device, rows = next(model.parameters()).device, scoring.rows(split)
    lengths, watch = lengths_of(rows), scoring.watch(f"embedding {split} rows")
    for positions in watched(longest_first(lengths), batch_size, lengths, watch):
        chosen = [rows[i] for i in positions]
        batch = scoring.task.collate(chosen, pad_token_id)
        batch = {name: tensor.to(device) for name, tensor in batch.items() if name != "labels"}
        with torch.no_grad(), autocast(device.type, scoring.plan.precision):
            hidden = body(**batch).last_hidden_state.float().cpu()
        for position, row, states in zip(positions, chosen, hidden, strict=True):
            word_ids = torch.from_numpy(np.array(row[WORD_IDS], np.int64))
            inside = word_ids >= 0
            words, places = word_ids[inside].unique(return_inverse=True)
            # Scaled to length 1, the sum of a word's sub-words is their mean.
            total = torch.zeros(len(words), states.shape[-1]).index_add_(0, places, states[: len(inside)][inside])
            yield position, words.numpy(), F.normalize(total, dim=-1).numpy()
