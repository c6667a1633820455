"""Models that write: loss over trained tokens, and scores of generated answers; for language models and seq2seq."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fulltune.tasks import Count, Predictions, Target, Tensor, Value
from fulltune.tasks.classes import ROWS, arrays, over_all, ratio
from fulltune.tasks.columns import normalised
from fulltune.tasks.padding import IGNORED

Wanted = Callable[[Tensor], Tensor]
"""From `labels[batch, tokens]` to the token that each logit should give, -100 where nothing is trained."""


def loss(
    wanted: Wanted,
    logits: Any,
    labels: Tensor,
    target: Target,
    smoothing: float = 0.0,
    class_weights: Sequence[float] | None = None,
) -> Tensor:
    """Cross entropy of the trained tokens, summed: a scalar. Other places are left out before the float32 copy.

    `logits[batch, tokens, vocabulary]` and `labels[batch, tokens]`; or of the trained tokens only what they should
    give, `labels[trained]`, with `logits[trained, vocabulary]`.
    """
    from fulltune.models import chunked_loss

    if labels.dim() == 2:
        tokens = wanted(labels)
        chosen = tokens != IGNORED
        logits, labels = _picked(logits, chosen), tokens[chosen]
    return chunked_loss.summed_loss(logits, labels, smoothing)


def count_items(wanted: Wanted, labels: Tensor) -> int:
    """Trained tokens of `labels[batch, tokens]`."""
    return int((wanted(labels) != IGNORED).sum())


def reduce(wanted: Wanted, logits: Any, labels: Tensor, target: Target) -> dict[str, Tensor]:
    """Three numbers a row: summed `nll` (nats), number of `tokens`, number of `right` greedy tokens: float64 [batch];
    of `logits[batch, tokens, vocabulary]`, or of those of trained tokens only."""
    import torch

    from fulltune.models.chunked_loss import token_scores

    tokens = wanted(labels)
    chosen = tokens != IGNORED
    rows = chosen.nonzero()[:, 0]
    empty = torch.zeros(len(tokens), dtype=torch.float64, device=tokens.device)
    losses, right = token_scores(_picked(logits, chosen), tokens[chosen])
    return {
        "nll": empty.index_add(0, rows, losses.double()),
        "tokens": chosen.sum(dim=1).double(),
        "right": empty.index_add(0, rows, right.double()),
    }


def _picked(logits: Any, places: Tensor) -> Any:
    """`logits[trained, vocabulary]` of the chosen places, which a selective head has picked already."""
    return logits[places] if getattr(logits, "ndim", 2) == 3 else logits


def metrics(kept: Predictions, target: Target) -> dict[str, float]:
    """Loss per token in nats, perplexity, accuracy of the next token, and mean scores of answers; BLEU is that of the
    whole corpus, an order of n-grams without a match smoothed (`exp`), so that few or short answers do not get 0."""
    of_tokens = "tokens" in kept
    wanted = {
        name: part for name, part in sums(target, "").items() if name in kept or (of_tokens and name in _OF_TOKENS)
    }
    values = over_all(wanted, kept)
    if "bleu_counts" in kept:
        from sacrebleu.metrics.bleu import BLEU

        orders = BLEU().max_ngram_order
        counted = kept["bleu_counts"].sum(axis=0).tolist()
        counts, totals, (written, expected) = counted[:orders], counted[orders : 2 * orders], counted[2 * orders :]
        values["bleu"] = BLEU.compute_bleu(counts, totals, written, expected, smooth_method="exp").score
    return values


_OF_TOKENS = ("loss", "perplexity", "token_accuracy")
_PACKAGES = {"rougeL": "rouge_score", "chrf": "sacrebleu", "bleu": "sacrebleu"}


def can_score(metric: str) -> bool:
    """Whether the package that a metric of answers needs is installed."""
    return metric not in _PACKAGES or importlib.util.find_spec(_PACKAGES[metric]) is not None


def score_answers(answers: Sequence[str], expected: Sequence[str]) -> dict[str, np.ndarray]:
    """Exact match of each generated answer; with their packages also ROUGE-L (0 to 1) and chrF (0 to 100)."""
    pairs = list(zip(answers, expected, strict=True))
    kept = {"exact_match": np.array([float(normalised(one) == normalised(two)) for one, two in pairs])}
    if can_score("rougeL"):
        from rouge_score.rouge_scorer import RougeScorer

        rouge = RougeScorer(["rougeL"])
        kept["rougeL"] = np.array([rouge.score(two, one)["rougeL"].fmeasure for one, two in pairs])
    if can_score("chrf"):
        from sacrebleu.metrics.chrf import CHRF

        chrf = CHRF()
        kept["chrf"] = np.array([chrf.sentence_score(one, [two]).score for one, two in pairs])
    return kept


def bleu_counts(answers: Sequence[str], expected: Sequence[str]) -> dict[str, np.ndarray]:
    """What BLEU is made of, with sacrebleu: matching n-grams and n-grams of each order, then the lengths of answer and
    target: `bleu_counts[rows, 10]`."""
    if not can_score("bleu"):
        return {}
    from sacrebleu.metrics.bleu import BLEU

    bleu = BLEU(effective_order=True)  # the counts do not depend on it; without it each short row would be warned of
    scores = [bleu.sentence_score(one, [two]) for one, two in zip(answers, expected, strict=True)]
    counts = [[*row.counts, *row.totals, row.sys_len, row.ref_len] for row in scores]
    return {"bleu_counts": np.array(counts, np.int64)}


def sums(target: Target, metric: str) -> dict[str, tuple[Count, Value]]:
    """All metrics but BLEU, which is no function of sums over rows that one would keep."""
    return {
        "loss": (arrays("nll", "tokens"), ratio),
        "perplexity": (arrays("nll", "tokens"), lambda sums: np.exp(np.minimum(ratio(sums), 700.0))),
        "token_accuracy": (arrays("right", "tokens"), ratio),
        **{name: (arrays(name, ROWS), ratio) for name in ("exact_match", "rougeL", "chrf")},
    }


def full_row(target: Target, length: int) -> dict[str, Any]:
    """A row of which all tokens are trained."""
    ids = np.ones(length, np.int64)
    return {"input_ids": ids, "labels": ids}
