from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from transformers import PreTrainedModel

from fulltune.evaluate.scoring import WORST, Scored, Scoring
from fulltune.inference import store
from fulltune.tasks import Row, Tokenizer, token_classification
from fulltune.tasks.padding import object_array
from fulltune.tasks.token_classification import TAGS

_log = logging.getLogger(__name__)


def baseline_scorers(scoring: Scoring) -> dict[str, Callable[[], Scored]]:
    """Map names of score files to functions that score two baselines: no entities, and each word's most frequent
    tag."""
    return {
        "baseline-no-entity": lambda: _score_tags(scoring, "every word O", _all_outside_tags(scoring)),
        "baseline-lexicon": partial(_score_lexicon, scoring),
    }


def score_model(scoring: Scoring, model: PreTrainedModel, tokenizer: Tokenizer) -> Scored:
    """Score a model. Words without a token count as `O`."""
    target = scoring.target
    counts = token_classification.add_words_without_token(
        scoring.predict_split(model, tokenizer), scoring.rows("test"), target
    )
    words = int(counts["words"].sum())
    if lost := words - int(counts["seen"].sum()):
        _log.warning(
            "%d of %d words in the test rows count as O because they have no token (cut off at data.max_length, or "
            "unknown to the tokenizer)",
            *(lost, words),
        )
    sentences = [_words(scoring, row) for row in scoring.texts]
    counts["tokens"] = object_array(sentences)
    # Resampling only sums per row is fast.
    metrics = scoring.estimate_metrics({name: array for name, array in counts.items() if array.dtype != object})
    predicted, gold = (
        [[target.labels[label] for label in row] for row in counts[name]] for name in ("predicted", "gold")
    )
    metrics |= scoring.estimate_user_metrics(predicted, gold)
    worst = token_classification.worst_rows(counts, [" ".join(sentence) for sentence in sentences], target, WORST)
    return scoring.make_scores(scoring.plan.trial, "trained", len(sentences), metrics=metrics, worst=tuple(worst))


def _words(scoring: Scoring, row: Row) -> list[str]:
    return token_classification.words_and_tags(row, scoring.target.columns)[0]


def _score_tags(scoring: Scoring, name: str, predicted: Sequence[np.ndarray]) -> Scored:
    """Score a baseline by its predicted tags, an array of label ids for each row."""
    gold = [np.asarray(row) for row in scoring.rows("test")[TAGS]]
    counts = token_classification.count_spans(gold, predicted, scoring.target)
    return scoring.make_scores(name, "baseline", len(gold), metrics=scoring.estimate_metrics(counts))


def _all_outside_tags(scoring: Scoring) -> list[np.ndarray]:
    return [np.zeros(len(row), np.int64) for row in scoring.rows("test")[TAGS]]


def _score_lexicon(scoring: Scoring) -> Scored:
    """Score a baseline that gives each word its most frequent train tag, and unseen words `O`."""
    ids = {label: position for position, label in enumerate(scoring.target.labels)}
    tag_counts: defaultdict[str, Counter[int]] = defaultdict(Counter)
    for row in store.read_original_rows(scoring.data / "train"):  # read one at a time, as there may be many
        for word, tag in zip(*token_classification.words_and_tags(row, scoring.target.columns), strict=True):
            tag_counts[word][ids[tag]] += 1
    lexicon = {word: min(counts, key=lambda label: (-counts[label], label)) for word, counts in tag_counts.items()}
    predicted = [np.array([lexicon.get(word, 0) for word in _words(scoring, row)]) for row in scoring.texts]
    return _score_tags(scoring, "most frequent tag of each word", predicted)


def score_frozen_classifier(scoring: Scoring, name: str, predicted: Sequence[tuple[int, np.ndarray]]) -> Scored:
    """Score a tagger fitted on embeddings. `predicted` has each row's index and outputs: [words with a token,
    labels]."""
    rows, tagged = scoring.rows("test"), _all_outside_tags(scoring)
    for position, outputs in predicted:
        tagged[position][token_classification.words_with_token(rows[position])] = outputs.argmax(axis=1)
    return _score_tags(scoring, name, tagged)
