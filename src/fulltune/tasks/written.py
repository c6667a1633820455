from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import TYPE_CHECKING

import numpy as np

from fulltune.recipe.tasks import OF_ANSWERS
from fulltune.tasks import PLAIN_LOSS, FromSums, LossSettings, Predictions, RowFeatures, RowTerms, Target, Tensor
from fulltune.tasks.classes import ROWS, over_all, ratio, stack_arrays
from fulltune.tasks.columns import normalised
from fulltune.tasks.padding import IGNORED

if TYPE_CHECKING:
    from fulltune.models.chunked_loss import ChunkedLogits

    Logits = Tensor | ChunkedLogits
    """Logits [batch, tokens, vocabulary], or only of trained tokens [trained, vocabulary], perhaps chunked."""

TargetIds = Callable[[Tensor], Tensor]
"""Maps `labels[batch, tokens]` to the token that each logit should predict, or -100."""


def loss(
    target_ids: TargetIds, logits: Logits, labels: Tensor, target: Target, settings: LossSettings = PLAIN_LOSS
) -> Tensor:
    """Sum the trained tokens' cross entropy. `target_ids` maps `labels` to the tokens to predict."""
    import torch.nn.functional as F

    from fulltune.models.chunked_loss import ChunkedLogits

    if labels.dim() == 2:
        tokens = target_ids(labels)
        is_trained = tokens != IGNORED
        logits, labels = _select_logits(logits, is_trained), tokens[is_trained]
    if isinstance(logits, ChunkedLogits):
        return logits.loss(labels, settings.smoothing)
    return F.cross_entropy(logits.float(), labels, label_smoothing=settings.smoothing, reduction="sum")


def count_items(target_ids: TargetIds, labels: Tensor) -> int:
    return int((target_ids(labels) != IGNORED).sum())


def reduce_logits(target_ids: TargetIds, logits: Logits, labels: Tensor, target: Target) -> dict[str, Tensor]:
    """Return float64 sums per row [batch]: loss `nll` in nats, trained `tokens`, and correctly predicted tokens
    (`right`)."""
    import torch

    from fulltune.models.chunked_loss import token_scores

    tokens = target_ids(labels)
    is_trained = tokens != IGNORED
    rows = is_trained.nonzero()[:, 0]
    empty = torch.zeros(len(tokens), dtype=torch.float64, device=tokens.device)
    losses, right = token_scores(_select_logits(logits, is_trained), tokens[is_trained])
    return {
        "nll": empty.index_add(0, rows, losses.double()),
        "tokens": is_trained.sum(dim=1).double(),
        "right": empty.index_add(0, rows, right.double()),
    }


def _select_logits(logits: Logits, is_trained: Tensor) -> Logits:
    """Return only the trained tokens' logits. Logits that are already selected or chunked are returned unchanged."""
    from fulltune.models.chunked_loss import ChunkedLogits

    return logits if isinstance(logits, ChunkedLogits) or logits.ndim == 2 else logits[is_trained]


def metrics(predictions: Predictions, target: Target) -> dict[str, float]:
    """Compute loss in nats per token, perplexity, token accuracy, the answers' mean scores, and corpus BLEU."""
    names = set(predictions) | (set(_OF_TOKENS) if "tokens" in predictions else set())
    names |= {"bleu"} if "bleu_counts" in predictions else set()
    return over_all(
        {name: parts for name, parts in metrics_from_sums(target, "").items() if name in names}, predictions
    )


_OF_TOKENS = ("loss", "perplexity", "token_accuracy")
_PACKAGES = {"rougeL": "rouge_score", "chrf": "sacrebleu", "bleu": "sacrebleu"}
INSTALL = "pip install 'fulltune[text-metrics]'"


def can_score(metric: str) -> bool:
    return metric not in _PACKAGES or importlib.util.find_spec(_PACKAGES[metric]) is not None


def score_answers(answers: Sequence[str], expected: Sequence[str], chosen: str = "") -> dict[str, np.ndarray]:
    """Return each answer's scores by metric, and `bleu_counts` for corpus BLEU.

    Metrics without their package are left out. Unless `chosen` names them, so are `number_match` and `json_equal` if
    half of the expected answers have no number or are not JSON.
    """
    pairs = list(zip(answers, expected, strict=True))
    scores = {"exact_match": np.array([float(normalised(one) == normalised(two)) for one, two in pairs])}
    for name, read in (("number_match", _last_number), ("json_equal", _parsed_json)):
        wanted = [read(text) for text in expected]
        if chosen == name or 2 * wanted.count(None) < len(wanted):
            same = [two is not None and read(one) == two for one, two in zip(answers, wanted, strict=True)]
            scores[name] = np.array(same, np.float64)
    if can_score("rougeL"):
        from rouge_score.rouge_scorer import RougeScorer

        rouge = RougeScorer(["rougeL"])
        scores["rougeL"] = np.array([rouge.score(two, one)["rougeL"].fmeasure for one, two in pairs])
    if can_score("chrf"):
        from sacrebleu.metrics.chrf import CHRF

        chrf = CHRF()
        scores["chrf"] = np.array([chrf.sentence_score(one, [two]).score for one, two in pairs])
    return scores | bleu_counts(answers, expected)


_NUMBER = re.compile(r"(?:(?<!\d)-)?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")


def _last_number(text: str) -> Decimal | None:
    """Return the last number in a text, read without its commas, or None. `1,250.0` equals `1250`."""
    matches = _NUMBER.findall(text.replace("\u2212", "-"))
    return Decimal(matches[-1].replace(",", "")) if matches else None


def _parsed_json(text: str) -> str | None:
    """Return JSON text in a normal form (1 equals 1.0, but not `true`), or None if it is not JSON."""
    try:
        return json.dumps(json.loads(text, parse_int=float), sort_keys=True)
    except (ValueError, RecursionError):
        return None


def bleu_counts(answers: Sequence[str], expected: Sequence[str]) -> dict[str, np.ndarray]:
    """Return each answer's n-gram matches, totals and both lengths as `bleu_counts` [answers, 10], or {} without
    sacrebleu."""
    if not can_score("bleu"):
        return {}
    from sacrebleu.metrics.bleu import BLEU

    bleu = BLEU(effective_order=True)  # does not change the counts, but avoids a warning per short row
    scores = [bleu.sentence_score(one, [two]) for one, two in zip(answers, expected, strict=True)]
    counts = [[*row.counts, *row.totals, row.sys_len, row.ref_len] for row in scores]
    return {"bleu_counts": np.array(counts, np.int64)}


def _corpus_bleu(sums: np.ndarray) -> np.ndarray:
    """Compute sacrebleu's corpus BLEU from sums of `bleu_counts` [..., 10]; smoothed, so that few or short answers do
    not get 0."""
    matches, totals, length, reference = sums[..., :4], sums[..., 4:8], sums[..., 8], sums[..., 9]
    # Each n-gram order without a match counts as half of the match of the order before it ("exp").
    halves = 0.5 ** np.cumsum(matches == 0, axis=-1)
    precisions = np.where(matches > 0, matches, halves) / np.maximum(totals, 1)
    brevity = np.exp(np.minimum(0.0, 1 - reference / np.maximum(length, 1)))
    scores = 100 * brevity * np.exp(np.log(precisions).mean(axis=-1))
    return np.where((totals > 0).all(axis=-1) & (matches > 0).any(axis=-1), scores, 0.0)


def metrics_from_sums(target: Target, metric: str) -> dict[str, tuple[RowTerms, FromSums]]:
    """Map each metric (ignoring `metric`) to two functions: one computes its row terms, the other its value from their
    sums."""
    return {
        "loss": (stack_arrays("nll", "tokens"), ratio),
        "perplexity": (stack_arrays("nll", "tokens"), lambda sums: np.exp(np.minimum(ratio(sums), 700.0))),
        "token_accuracy": (stack_arrays("right", "tokens"), ratio),
        **{name: (stack_arrays(name, ROWS), ratio) for name in OF_ANSWERS},
        "bleu": (lambda predictions: predictions["bleu_counts"].astype(np.float64), _corpus_bleu),
    }


def full_row(target: Target, length: int) -> RowFeatures:
    ids = np.ones(length, np.int64)
    return {"input_ids": ids, "labels": ids}
