"""Models that give each word a tag; baselines that need no training."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from fulltune.evaluate.scoring import WORST, Bench, Scored
from fulltune.inference import store
from fulltune.inference.run import autocast, lengths_of, longest_first, watched
from fulltune.tasks import tags, token_classification

_log = logging.getLogger(__name__)


def baselines(bench: Bench) -> dict[str, Callable[[], Scored]]:
    """File name to what makes it: no entity at all, a lexicon, and the simplest tagger on frozen embeddings."""
    return {
        "baseline-no-entity": lambda: _no_entity(bench),
        "baseline-lexicon": lambda: _lexicon(bench),
        "baseline-frozen": lambda: _frozen(bench),
    }


def trained(bench: Bench, model: Any, tokenizer: Any) -> Scored:
    """The trained model; words that it never saw (cut off, or without a token) count as `O`."""
    rows = bench.rows("test")
    seen = bench.run(model, tokenizer.pad_token_id, rows)
    kept = token_classification.over_all_words(seen, rows, bench.target)
    if lost := int(kept["words"].sum() - kept["seen"].sum()):
        _log.warning(
            "%d of %d words of the test rows have no token (cut off at data.max_length, or unknown to the tokenizer); "
            "they count as O",
            *(lost, int(kept["words"].sum())),
        )
    sentences = [_words(bench, row) for row in bench.texts]
    kept["tokens"] = token_classification.ragged(sentences)
    texts = [" ".join(sentence) for sentence in sentences]
    metrics = _estimates(bench, kept)
    if bench.user_metrics is not None:
        metrics |= bench.user_estimates(_names(bench, kept["predicted"]), _names(bench, kept["gold"]))
    worst = tuple(bench.task.worst(kept, texts, bench.target, WORST))
    return bench.scores(bench.plan.trial, "trained", len(texts), metrics=metrics, worst=worst)


def _words(bench: Bench, row: Mapping[str, Any]) -> list[str]:
    return tags.words_and_tags(row, bench.target.columns)[0]


def _names(bench: Bench, rows: np.ndarray) -> list[list[str]]:
    """Tags by name, as a user's metric expects them."""
    return [[bench.target.labels[label] for label in row] for row in rows]


def _estimates(bench: Bench, kept: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Metrics with intervals; only sums per row are drawn again, so that many draws are fast."""
    sums = {name: kept[name] for name in ("entities", "words", "right", "nll", "seen") if name in kept}
    return bench.estimates(sums, lambda rows: bench.task.metrics(rows, bench.target))


def _tagged(bench: Bench, name: str, predicted: Sequence[np.ndarray]) -> Scored:
    """Scores of a baseline that gives tags without probabilities."""
    gold = [np.asarray(row) for row in bench.rows("test")[token_classification.TAGS]]
    kept = token_classification.counts(gold, predicted, bench.target)
    return bench.scores(name, "baseline", len(gold), metrics=_estimates(bench, kept))


def _no_entity(bench: Bench) -> Scored:
    rows = bench.rows("test")[token_classification.TAGS]
    return _tagged(bench, "every word O", [np.zeros(len(row), np.int64) for row in rows])


def _lexicon(bench: Bench) -> Scored:
    """For each word the tag it has most often in train; `O` for words that train does not have."""
    ids = {label: position for position, label in enumerate(bench.target.labels)}
    seen: defaultdict[str, Counter[int]] = defaultdict(Counter)
    for row in store.texts(bench.data / "train"):  # one by one: there may be many
        for word, tag in zip(*tags.words_and_tags(row, bench.target.columns), strict=True):
            seen[word][ids[tag]] += 1
    lexicon = {word: min(counts, key=lambda label: (-counts[label], label)) for word, counts in seen.items()}
    predicted = [np.array([lexicon.get(word, 0) for word in _words(bench, row)]) for row in bench.texts]
    return _tagged(bench, "most frequent tag of each word", predicted)


def _frozen(bench: Bench) -> Scored:
    """The pretrained model left as it is: each word's mean hidden state, and the tag whose mean is nearest."""
    model, tokenizer = bench.load_pretrained()
    return bench.in_batches(lambda batch_size: _nearest(bench, model, tokenizer.pad_token_id, batch_size))


def _nearest(bench: Bench, model: Any, pad_token_id: int, batch_size: int) -> Scored:
    num_labels = len(bench.target.labels)
    sums, seen = np.zeros((num_labels, 1)), np.zeros(num_labels)
    train, test = bench.rows("train"), bench.rows("test")
    for position, words, vectors in _word_vectors(bench, model, pad_token_id, batch_size, train, "train"):
        labels = np.asarray(train[position][token_classification.TAGS])[words]
        marks = np.eye(num_labels)[labels]
        sums, seen = sums + marks.T @ vectors, seen + marks.sum(axis=0)
    known = np.flatnonzero(seen)
    centres = sums[known] / seen[known, None]
    predicted = [np.zeros(len(row), np.int64) for row in test[token_classification.TAGS]]
    for position, words, vectors in _word_vectors(bench, model, pad_token_id, batch_size, test, "test"):
        # The squared distance without the part that is the same for all centres.
        distances = (centres**2).sum(axis=1) - 2 * vectors @ centres.T
        predicted[position][words] = known[distances.argmin(axis=1)]
    return _tagged(bench, "nearest centroid (frozen embeddings)", predicted)


def _word_vectors(
    bench: Bench, model: Any, pad_token_id: int, batch_size: int, rows: Any, split: str
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """For each row its position, the words seen, and the mean of their sub-words' last hidden states, scaled to length
    1: float32 [words, hidden]."""
    import torch
    import torch.nn.functional as F

    body = getattr(model, model.base_model_prefix, model).eval()
    device = next(model.parameters()).device
    lengths, watch = lengths_of(rows), bench.watch(f"embedding {split} rows")
    for positions in watched(longest_first(lengths), batch_size, lengths, watch):
        chosen = [rows[i] for i in positions]
        batch = bench.task.collate(chosen, pad_token_id)
        batch = {name: tensor.to(device) for name, tensor in batch.items() if name != "labels"}
        with torch.no_grad(), autocast(device.type, bench.plan.precision):
            hidden = body(**batch).last_hidden_state.float().cpu()
        for position, row, states in zip(positions, chosen, hidden, strict=True):
            word_ids = torch.from_numpy(np.array(row[token_classification.WORD_IDS], np.int64))
            inside = word_ids >= 0
            words, places = word_ids[inside].unique(return_inverse=True)
            # Scaled to length 1, the sum of a word's sub-words is their mean.
            total = torch.zeros(len(words), states.shape[-1]).index_add_(0, places, states[: len(inside)][inside])
            yield position, words.numpy(), F.normalize(total, dim=-1).numpy()
