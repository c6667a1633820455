"""Cells, BIO tags, alignment of words and tokens, loss, and metrics against seqeval's own."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from seqeval.metrics import accuracy_score, f1_score, precision_score, recall_score
from seqeval.metrics.sequence_labeling import get_entities

from fulltune.errors import DataError, SetupError
from fulltune.recipe.data import DataBlock
from fulltune.tasks import LossSettings, Target
from fulltune.tasks import token_classification as task
from tests import tiny

COLUMNS = {"tokens": "tokens", "tags": "tags"}
TARGET = Target("tags", COLUMNS, ("O", "B-LOC", "B-PER", "I-LOC", "I-PER"))
BLOCK = DataBlock(train="rows.jsonl")


def row(tokens: Any, row_tags: Any) -> dict[str, Any]:
    return {"tokens": tokens, "tags": row_tags}


def target_of(*row_tags: str) -> Target:
    rows = [row("w " * len(line.split()), line) for line in row_tags]
    return task.find_target(iter(rows), COLUMNS, BLOCK, "rows.jsonl")


# ---- cells and tags --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cell", "found"),
    [
        (["a", "b c"], ["a", "b c"]),
        (("a", 5, None), ["a", "5", ""]),
        ('["a", "b c"]', ["a", "b c"]),
        ("['a', 'b c']", ["a", "b c"]),
        ("a  b\tc", ["a", "b", "c"]),
        ("[a b]", ["[a", "b]"]),
        ("['a' 'b']", ["['a'", "'b']"]),
        ("[]", []),
        (" ", []),
        (7, None),
        (None, None),
        ([["a"]], None),
    ],
)
def test_cell_in_each_form_is_read(cell: Any, found: list[str] | None) -> None:
    assert task.parse_word_list(cell) == found


def test_sentence_in_square_brackets_beside_plain_tags_is_a_word() -> None:
    assert task.words_and_tags(row("[1]", "O"), COLUMNS) == (["[1]"], ["O"])


def test_column_that_is_missing_is_named() -> None:
    with pytest.raises(DataError, match=r"f: no column found for data.tags; set it in the recipe"):
        task.find_columns(["tokens", "x"], [], BLOCK, "f")


def test_target_has_both_tags_of_every_type_and_o_first() -> None:
    assert target_of("O B-b-c", "B-a O").labels == ("O", "B-a", "B-b-c", "I-a", "I-b-c")


@pytest.mark.parametrize(
    ("found", "repaired"),
    [
        ("I-PER I-PER O I-LOC", "B-PER I-PER O B-LOC"),
        ("B-PER I-LOC I-LOC", "B-PER B-LOC I-LOC"),
        ("I-PER B-PER I-PER", "B-PER B-PER I-PER"),
        ("B-PER I-PER O", "B-PER I-PER O"),
    ],
)
def test_inside_tag_that_continues_nothing_begins_an_entity(found: str, repaired: str) -> None:
    assert task.to_strict_bio(found.split()) == repaired.split()
    assert task.entity_spans(found.split()) == task.entity_spans(repaired.split())


@pytest.mark.parametrize(
    ("lines", "advice"),
    [
        (["O PERSON", "B-a"], "holds tags that are not BIO, expected O, B-TYPE (first word of an entity) or I-TYPE"),
        (["0 3 0", "B-a"], "numbers are positions in a data set's list of labels"),
        (["S-PER O", "B-a"], "in other schemes, S- and U- mean B-"),
        (["O B-", "B-a"], "holds tags that are not BIO"),
        (["O o", "B-a"], "holds tags that are not BIO"),
    ],
)
def test_tags_that_are_not_bio_are_refused_with_advice(lines: list[str], advice: str) -> None:
    with pytest.raises(DataError) as caught:
        target_of(*lines)
    assert caught.value.problems[0].startswith("rows.jsonl: column 'tags' holds tags that are not BIO, expected O, ")
    assert advice in caught.value.problems[0]
    place = 1 if lines[0][0] in "0S" else 2
    assert caught.value.problems[1] == f"rows.jsonl: row 1, word {place}: tag {lines[0].split()[place - 1]!r}"


def test_rows_without_any_entity_are_refused() -> None:
    with pytest.raises(DataError, match="none of 2 rows has an entity"):
        target_of("O O", "O")


def test_row_that_can_be_used_has_types_and_a_key() -> None:
    good = row(["Ada", "in", "Rome"], ["I-PER", "O", "B-LOC"])
    assert task.row_labels(good, TARGET) == ["LOC", "PER"]
    assert task.row_labels(row("a", "O"), TARGET) == []
    assert task.group_key(good, TARGET) == task.group_key(row("ada in  rome", "O O O"), TARGET)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Ada's cat (Tom) isn't in St-Denis.", ["Ada's", "cat", "(", "Tom", ")", "isn't", "in", "St-Denis", "."]),
        ("see https://a.b/c, @you #now 3.5", ["see", "https://a.b/c", ",", "@you", "#now", "3.5"]),
        ("東京 😀!", ["東京", "😀", "!"]),
    ],
)
def test_running_text_is_split_into_words(text: str, words: list[str]) -> None:
    assert task.WORD.findall(text) == words


# ---- tokens ----------------------------------------------------------------------------------------------------


def word_piece() -> Any:
    from transformers import BertTokenizer

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "ada", "love", "##lace", "in", "rome", "of", "the"]
    return BertTokenizer(vocab={name: number for number, name in enumerate(names)})


SENTENCE = row(["Ada", "Lovelace", "in", "Rome"], ["B-PER", "I-PER", "O", "B-LOC"])


def encoded(tokenizer: Any, *rows: dict[str, Any], max_length: int = 99) -> list[Any]:
    return [examples[0] for examples in task.encode(rows, TARGET, tokenizer, max_length)]


def test_label_is_on_the_first_sub_word_of_each_word() -> None:
    tokenizer = word_piece()
    example = encoded(tokenizer, SENTENCE)[0]
    assert tokenizer.convert_ids_to_tokens(example.features["input_ids"]) == [
        *("[CLS]", "ada", "love", "##lace", "in", "rome", "[SEP]")
    ]
    assert example.features["labels"] == [-100, 2, 4, -100, 0, 1, -100]
    assert example.features["word_ids"] == [-1, 0, 1, 1, 2, 3, -1]
    assert example.features["tags"] == [2, 4, 0, 1]
    assert (example.trained_tokens, example.truncated) == (4, False)
    assert "attention_mask" not in example.features
    assert task.preview(example.features, TARGET, tokenizer).label == "[ada lovelace]PER in [rome]LOC"


def test_words_cut_off_are_counted_and_predicted_as_o() -> None:
    examples = encoded(word_piece(), SENTENCE, row(["Rome"], ["B-LOC"]), max_length=5)
    assert [(example.trained_tokens, example.truncated) for example in examples] == [(2, True), (1, False)]
    features = [example.features for example in examples]
    assert features[0]["input_ids"][-1] == 3
    kept = task.add_words_without_token(perfect(features), features, TARGET)
    assert kept["words"].tolist() == [4, 1]
    assert kept["seen"].tolist() == [2, 1]
    assert kept["right"].tolist() == [3, 1]  # the word cut off before Rome is O
    assert kept["predicted"][0].tolist() == [2, 4, 0, 0]
    assert kept["entities"].sum(axis=0).tolist() == [[1, 1, 2], [1, 1, 1]]


def test_word_without_a_token_keeps_the_place_of_those_after_it() -> None:
    odd = row(["Ada", "\u200b", "", "Rome"], ["B-PER", "I-PER", "O", "B-LOC"])
    features = [example.features for example in encoded(word_piece(), odd)]
    assert task.words_with_token(features[0]).tolist() == [0, 3]
    kept = task.add_words_without_token(perfect(features), features, TARGET)
    assert kept["predicted"][0].tolist() == [2, 0, 0, 1]
    # The expected person has two words, the predicted one: wrong by seqeval.
    assert kept["entities"].sum(axis=0).tolist() == [[1, 1, 1], [0, 1, 1]]


def perfect(features: Sequence[dict[str, Any]]) -> Any:
    """What is kept of a model that is right about every word it sees."""
    labels = task.collate(features, 0)["labels"]
    return task.reduce_logits(10.0 * F.one_hot(labels.clamp(min=0), 5), labels, TARGET)


@pytest.mark.parametrize("prefix", [True, False])
def test_byte_level_tokens_are_those_of_the_sentence(prefix: bool) -> None:
    from tokenizers import pre_tokenizers

    tokenizer = tiny.encoder_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    words = ["we", "eat", "bread", "in", "the", "town", "é"]
    features = encoded(tokenizer, row(words, ["O"] * 7))[0].features
    assert features["input_ids"] == tokenizer(" ".join(words))["input_ids"]
    assert task.words_with_token(features).tolist() == list(range(7))
    assert task.preview(features, TARGET, tokenizer).label == "we eat bread in the town é"


def test_slow_tokenizer_is_refused() -> None:
    from transformers import CanineTokenizer

    with pytest.raises(
        SetupError, match="needs the word of each token from a fast tokenizer, but CanineTokenizer is slow"
    ):
        encoded(CanineTokenizer(), SENTENCE)


def test_tag_of_a_type_that_train_lacks_is_refused() -> None:
    refused = encoded(word_piece(), row(["Ada"], ["B-DOG"]))[0].refused
    assert refused is not None
    assert refused.reason == "the type of tag 'B-DOG' does not occur in train"


@pytest.mark.parametrize("kind", [list, np.array])
def test_collate_pads_and_makes_the_mask(kind: Any) -> None:
    rows = [
        {"input_ids": kind([5, 6, 7]), "token_type_ids": kind([0, 0, 1]), "labels": kind([-100, 1, -100])},
        {"input_ids": kind([5]), "token_type_ids": kind([0]), "labels": kind([-100])},
    ]
    extra = {"tags": kind([1]), "word_ids": kind([-1]), "length": 3}
    batch = task.collate([{**one, **extra} for one in rows], 9)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[5, 6, 7], [5, 9, 9]],
        "token_type_ids": [[0, 0, 1], [0, 0, 0]],
        "labels": [[-100, 1, -100], [-100, -100, -100]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
    }
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


# ---- loss and metrics ------------------------------------------------------------------------------------------


def random_batch(rows: int, words: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 5, (rows, words), generator=draw)
    labels[torch.rand(rows, words, generator=draw) < 0.3] = -100
    noise = torch.randn(rows, words, 5, generator=draw)
    return noise + 1.5 * F.one_hot(labels.clamp(min=0), 5), labels


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.5, 3.0, 1.0]])
def test_loss_is_the_sum_over_labelled_words(smoothing: float, weights: list[float] | None) -> None:
    logits, labels = random_batch(3, 7, seed=0)
    found = task.loss(logits, labels, TARGET, LossSettings(smoothing, weights))
    expected = torch.nn.CrossEntropyLoss(
        weight=None if weights is None else torch.tensor(weights), label_smoothing=smoothing, reduction="sum"
    )(logits.reshape(-1, 5), labels.reshape(-1))
    assert torch.isclose(found, expected)
    assert task.count_items(labels) == int((labels >= 0).sum())


@pytest.mark.parametrize("seed", range(3))
def test_metrics_are_those_of_seqeval(seed: int) -> None:
    logits, labels = random_batch(40, 12, seed)
    kept = task.reduce_logits(logits, labels, TARGET)
    gold = [[TARGET.labels[i] for i in row if i >= 0] for row in labels.tolist()]
    predicted = [[TARGET.labels[i] for i in row] for row in kept["predicted"]]
    found = task.metrics(kept, TARGET)
    assert found["f1"] == pytest.approx(f1_score(gold, predicted))
    assert found["precision"] == pytest.approx(precision_score(gold, predicted))
    assert found["recall"] == pytest.approx(recall_score(gold, predicted))
    assert found["f1_macro"] == pytest.approx(f1_score(gold, predicted, average="macro"))
    assert found["accuracy"] == pytest.approx(accuracy_score(gold, predicted))
    mean = torch.nn.CrossEntropyLoss()(logits.reshape(-1, 5), labels.reshape(-1))
    assert found["loss"] == pytest.approx(float(mean), rel=1e-5)
    assert all(set(task.entity_spans(row)) == spans_of_seqeval(row) for row in [*gold, *predicted])


def spans_of_seqeval(row_tags: list[str]) -> set[tuple[str, int, int]]:
    return {(kind, start, last + 1) for kind, start, last in get_entities(row_tags)}


def test_metrics_without_a_prediction_are_zero() -> None:
    gold, nothing = [np.array([0, 1])], [np.array([0, 0])]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = task.metrics(task.count_spans(gold, nothing, TARGET), TARGET)
    assert found == {"f1": 0.0, "precision": 0.0, "recall": 0.0, "f1_macro": 0.0, "accuracy": 0.5}


def test_worst_rows_have_the_most_wrong_entities_then_the_highest_loss() -> None:
    gold = [np.array([1, 3, 0]), np.array([2, 0]), np.array([0, 1]), np.array([2, 1])]
    predicted = [np.array([1, 0, 0]), np.array([2, 0]), np.array([0, 0]), np.array([2, 0])]
    kept = {
        **task.count_spans(gold, predicted, TARGET),
        "nll": np.array([1.0, 9.0, 2.0, 3.0]),
        "gold": task.object_array(gold),
        "predicted": task.object_array(predicted),
        "tokens": task.object_array([["New", "York", "is"], ["Ada", "is"], ["in", "Rome"], ["Ada", "Rome"]]),
    }
    found = list(task.worst_rows(kept, ["one", "two", "three", "four"], TARGET, 3))
    assert [(answer.text, answer.expected, answer.predicted) for answer in found] == [
        ("one", "[New York]LOC is", "[New]LOC York is"),
        ("four", "[Ada]PER [Rome]LOC", "[Ada]PER Rome"),
        ("three", "in [Rome]LOC", "in Rome"),
    ]
    assert found[0].loss == 1.0
