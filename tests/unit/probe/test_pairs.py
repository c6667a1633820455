"""The two texts of a pair, each read alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fulltune.models.encoders import model_class
from fulltune.probe import (
    fit_probe,
    initialise_head_from_probe,
    load_baseline_classifier,
    load_or_fit_probe,
    predict_baseline,
)
from fulltune.probe.features import FeatureExtractor, pair_separators, split_pairs
from fulltune.tasks import Target
from fulltune.tasks.padding import TEXT_LENGTHS
from tests.unit.probe.models import CONFIGS, LABELS, PAD, model_of

CLS, SEP = 2, 3
TARGET = Target("single_label", {"text": "a", "text_pair": "b", "label": "same"}, LABELS[:2])


@pytest.mark.parametrize(
    ("ids", "first", "second"),
    [
        ([CLS, 10, 11, SEP, 12, SEP], [CLS, 10, 11, SEP], [CLS, 12, SEP]),
        ([CLS, 10, SEP, SEP, 12, 13, SEP], [CLS, 10, SEP], [CLS, 12, 13, SEP]),  # RoBERTa's
        ([10, 11, SEP, 12, SEP], [10, 11, SEP], [12, SEP]),  # T5's
        ([10, SEP, 12, SEP, CLS], [10, SEP, CLS], [12, SEP, CLS]),  # XLNet's
    ],
)
def test_each_text_stands_between_what_stood_around_the_pair(
    ids: list[int], first: list[int], second: list[int]
) -> None:
    texts = split_pairs([{"input_ids": np.array(ids), "token_type_ids": ids, "labels": 1}], frozenset({CLS, SEP}))
    assert [{**row, "input_ids": row["input_ids"].tolist()} for row in texts] == [
        {"input_ids": first, "labels": 1},
        {"input_ids": second, "labels": 1},
    ]


class Tokenizer:
    """Puts tokens around two texts."""

    cls_token_id, sep_token_id, bos_token_id, eos_token_id = CLS, SEP, None, SEP

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids

    def __call__(self, first: str, second: str) -> dict[str, list[int]]:
        return {"input_ids": self.ids}


def test_only_pairs_have_separators() -> None:
    tokenizer = Tokenizer([CLS, 10, SEP, 10, SEP])
    assert pair_separators(tokenizer, TARGET) == {CLS, SEP}
    assert pair_separators(tokenizer, Target("single_label", {"text": "a", "label": "same"}, LABELS)) == set()


@pytest.mark.parametrize("ids", [[10, 10], [10, 10, SEP, 50], [CLS, SEP, SEP], []])
def test_texts_that_a_tokenizer_does_not_tell_apart_are_not_read_apart(ids: list[int]) -> None:
    """Nothing between them, or one more token, such as a language's, after the last separator."""
    assert pair_separators(Tokenizer(ids), TARGET) == set()


def _pairs(count: int) -> list[dict[str, Any]]:
    """The same words twice, or others: whether it is so stands in no text alone."""
    random = np.random.default_rng(0)
    rows = []
    for number in range(count):
        first, another = random.integers(10, 90, (2, 6))
        second = another if number % 2 else first
        ids = np.concatenate([[CLS], first, [SEP], second, [SEP]])
        rows.append({"input_ids": ids, "token_type_ids": [0] * 8 + [1] * 7, "labels": number % 2})
    return rows


@pytest.mark.parametrize("name", ["Bert", "ModernBert"])
def test_rival_that_reads_each_text_alone_sees_whether_they_are_alike(name: str, tmp_path: Path) -> None:
    """Read together, a pretrained model that never saw pairs does not."""
    model, rows = model_of(name, "text-classification", 2), _pairs(400)
    if name != "Bert":
        rows = [{key: value for key, value in row.items() if key != "token_type_ids"} for row in rows]

    def extractor(around: frozenset[int]) -> FeatureExtractor:
        return FeatureExtractor(model, "text-classification", TARGET, PAD, 16, "fp32", pair_separators=around)

    together = load_or_fit_probe(tmp_path / "together", lambda: extractor(frozenset()), rows[:300], rows[300:]).baseline
    apart = load_or_fit_probe(
        tmp_path / "apart", lambda: extractor(frozenset({CLS, SEP})), rows[:300], rows[300:]
    ).baseline
    assert together is not None
    assert apart is not None
    assert together.pooling != "pair"
    assert apart.pooling == "pair"
    assert apart.loss < 0.1 < together.loss
    answers = dict(
        predict_baseline(
            extractor(frozenset({CLS, SEP})), rows[300:], apart, load_baseline_classifier(tmp_path / "apart")
        )
    )
    assert len(answers) == 100
    right = [answers[number][0].argmax() == row["labels"] for number, row in enumerate(rows[300:])]
    assert np.mean(right) > 0.9


def test_no_pass_has_more_rows_than_a_batch() -> None:
    model, sizes = model_of("Bert", "text-classification", 2), list[int]()
    model.bert.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    extractor = FeatureExtractor(
        model, "text-classification", TARGET, PAD, 16, "fp32", pair_separators=frozenset({CLS, SEP})
    )
    assert extractor.features(_pairs(40), None).pair is not None
    assert max(sizes) == 16


# ---- the model itself reads the texts apart ----------------------------------------------------------------------


def _apart(name: str, num_labels: int, pooling: str = "mean") -> Any:
    import torch
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**CONFIGS[name], num_labels=num_labels)
    config.pooling = pooling
    model: Any = model_class("TextPairs").from_config(config)
    return model.eval()


def _alike(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Two texts and the share of their words that are the same, with noise."""
    random = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        first, second = random.integers(10, 90, (2, 8))
        same = number % 9
        ids = [CLS, *first, SEP, CLS, *first[:same], *second[same:], SEP]
        noise = random.normal(0, 0.2)
        rows.append({"input_ids": ids, TEXT_LENGTHS: [10, 10], "length": 20, "labels": same / 8 + noise})
    return rows


def _extractor(model: Any, target: Target) -> FeatureExtractor:
    return FeatureExtractor(model, "text-pairs", target, PAD, 16, "fp32")


@pytest.mark.parametrize("name", ["Bert", "DistilBert", "ModernBert", "DebertaV2", "MPNet", "GPT2", "Llama"])
def test_the_head_starts_from_the_probe_of_what_it_reads(name: str, tmp_path: Path) -> None:
    model, rows = _apart(name, 2, "last" if name in ("GPT2", "Llama") else "mean"), _alike(120)
    rows = [{**row, "labels": int(row["labels"] > 0.5)} for row in rows]
    probed = load_or_fit_probe(tmp_path, lambda: _extractor(model, TARGET), rows, [])
    assert probed.failure is None
    assert probed.head is not None
    assert probed.baseline is not None
    assert probed.baseline.pooling == "pair"
    initialise_head_from_probe(model, tmp_path)
    batch = _extractor(model, TARGET).task.collate(rows, PAD)
    labels = batch.pop("labels").numpy()
    assert np.mean(model(**batch).logits.argmax(dim=1).numpy() == labels) > 0.75


def test_few_rows_start_no_lower_than_the_cosine_of_the_untouched_model() -> None:
    """With fewer rows than features a ridge regression without a cosine of its own ranks other rows far worse."""
    from scipy.stats import spearmanr

    model, target = _apart("Bert", 1), Target("regression", {"text": "a", "text_pair": "b", "label": "n"})
    rows, others = _alike(45), _alike(400, seed=1)
    _, head, start, _ = fit_probe(_extractor(model, target), rows, [])
    features, numbers = (_extractor(model, target).features(others, None).pair, [row["labels"] for row in others])
    assert features is not None
    assert not start
    ranked = spearmanr(features @ head["classifier.weight"][0], numbers).statistic
    cosine = spearmanr(features[:, 96:].sum(axis=1), numbers).statistic
    assert cosine > 0.5
    assert ranked > cosine - 0.02
