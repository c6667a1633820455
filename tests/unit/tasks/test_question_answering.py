"""Answers in a context: cells, windows, loss, the most probable span, merged windows, SQuAD's scores."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from fulltune.errors import DataError
from fulltune.evaluate import spans
from fulltune.recipe.data import DataBlock
from fulltune.tasks import LossSettings, Target, question_answering
from fulltune.tasks.question_answering import parse_answers
from tests import tiny

COLUMNS = {"context": "c", "question": "q", "answers": "a"}
TARGET = Target("span", COLUMNS)
CONTEXT = "the sun shines over the town; in the town we cook soup, and he says hello"


@pytest.mark.parametrize(
    ("cell", "found"),
    [
        ("soup", [("soup", CONTEXT.index("soup"))]),
        ("town", [("town", CONTEXT.index("town"))]),
        ("he", [("he", CONTEXT.index("he says"))]),
        ({"text": ["town"], "answer_start": [CONTEXT.rindex("town")]}, [("town", CONTEXT.rindex("town"))]),
        ({"text": "sun", "answer_start": 4}, [("sun", 4)]),
        ({"text": ["sun", "town"], "answer_start": [4, 24]}, [("sun", 4), ("town", 24)]),
        ([{"text": "sun", "answer_start": 4}, {"text": "town"}], [("sun", 4), ("town", 24)]),
        (["moon", "sun"], [("sun", 4)]),
        ('{"text": ["sun"], "answer_start": [4]}', [("sun", 4)]),
        ("{'text': ['sun'], 'answer_start': [4]}", [("sun", 4)]),
        ({"text": [], "answer_start": []}, []),
        ('{"text": [], "answer_start": []}', []),
        ("", []),
        (None, []),
        ([], []),
        (float("nan"), []),
    ],
)
def test_cell_with_answers_in_each_form_is_read(cell: Any, found: list[tuple[str, int]]) -> None:
    assert parse_answers(cell, CONTEXT) == found


@pytest.mark.parametrize(
    ("cell", "problem"),
    [
        ("moon", "the answer 'moon' is not in the context"),
        (["moon", "mars"], "the answer 'moon' is not in the context"),
        ({"text": ["sun"], "answer_start": [5]}, "the context has 'un ' at character 5, expected the answer 'sun'"),
        ({"text": ["sun"], "answer_start": [999]}, "the context has '' at character 999, expected the answer 'sun'"),
        ({"text": ["sun"], "answer_start": [4, 5]}, "found 1 answers, but 2 values of answer_start"),
        ({"answer": "sun"}, "expected an object with 'text' and 'answer_start', found ['answer']"),
    ],
)
def test_answer_that_does_not_stand_in_the_context_is_refused(cell: Any, problem: str) -> None:
    with pytest.raises(DataError) as caught:
        parse_answers(cell, CONTEXT)
    assert str(caught.value) == problem
    refused = question_answering.why_unusable({"c": CONTEXT, "q": "what?", "a": cell}, TARGET)
    assert refused is not None
    assert (refused.check, refused.reason) == ("answer not in context", problem)


def test_rows_without_any_answer_are_an_error() -> None:
    data = DataBlock(train="x", stride=5)
    rows = [{"c": CONTEXT, "q": "what?", "a": ""}, {"c": CONTEXT, "q": "what?", "a": "soup"}]
    assert question_answering.find_target(iter(rows), COLUMNS, data, "f").stride == 5
    with pytest.raises(DataError, match="no row has an answer in column 'a'"):
        question_answering.find_target(iter(rows[:1]), COLUMNS, data, "f")


def windows(row: dict[str, Any], kind: str = "bert", max_length: int = 99, target: Target = TARGET) -> list[Any]:
    return question_answering.encode([row], target, tiny.usual_tokenizer(kind), max_length)[0]


def answered(features: Any, context: str) -> str:
    start, end, *_ = features["labels"]
    return context[features["starts"][start] : features["ends"][end]].strip()


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2"])
@pytest.mark.parametrize("answer", ["the", "sun", "cook soup", "hello", CONTEXT])
def test_labels_point_at_the_answer(kind: str, answer: str) -> None:
    (example,) = windows({"c": CONTEXT, "q": " where is it? ", "a": answer}, kind)
    assert answered(example.features, CONTEXT) == answer
    _, _, first, last, tokens = example.features["labels"]
    assert tokens == len(example.features["input_ids"])
    places = [number for number, start in enumerate(example.features["starts"]) if start >= 0]
    assert (places[0], places[-1], len(places)) == (first, last, last - first + 1)
    assert ("token_type_ids" in example.features) == (kind == "bert")
    assert (example.trained_tokens, example.truncated) == (1, False)


@pytest.mark.parametrize(("stride", "overlap"), [(None, 10), (4, 4), (0, 0)])
def test_long_context_becomes_windows_that_overlap_and_cover_it(stride: int | None, overlap: int) -> None:
    context = f"{CONTEXT} and then {CONTEXT}"
    row = {"c": context, "q": "what?", "a": {"text": ["hello"], "answer_start": [CONTEXT.index("hello")]}}
    found = windows(row, max_length=30, target=Target("span", COLUMNS, stride=stride))
    assert len(found) > 2
    assert all(len(example.features["input_ids"]) <= 30 for example in found)
    covered = [{place for place in example.features["starts"] if place >= 0} for example in found]
    (whole,) = windows(row, max_length=120)
    assert set().union(*covered) == {place for place in whole.features["starts"] if place >= 0}
    assert all(len(one & two) == overlap for one, two in itertools.pairwise(covered))
    for example in found:
        start, _, first, last, _ = example.features["labels"]
        whole = (
            example.features["starts"][first] <= CONTEXT.index("hello")
            and len(CONTEXT) <= example.features["ends"][last]
        )
        assert answered(example.features, context) == "hello" if whole else start == 0
    assert any(example.features["labels"][0] for example in found)


def test_question_that_leaves_no_room_is_refused_and_others_are_kept() -> None:
    rows = [{"c": CONTEXT, "q": f"{CONTEXT} {CONTEXT}", "a": "sun"}, {"c": CONTEXT, "q": "what?", "a": "sun"}]
    first, second = question_answering.encode(rows, TARGET, tiny.encoder_tokenizer(), 30)
    assert first[0].refused is not None
    assert first[0].refused.check == "question too long"
    assert all(example.refused is None for example in second)


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2"])
@pytest.mark.parametrize("stride", [28, 500])
def test_stride_that_leaves_no_step_is_shortened(kind: str, stride: int) -> None:
    """A question of many tokens leaves less room than one of few: each row has its own overlap."""
    target = Target("span", COLUMNS, stride=stride)
    rows = [{"c": CONTEXT, "q": question, "a": "sun"} for question in ("what?", "what do we cook in the town?", "why?")]
    tokenizer = tiny.usual_tokenizer(kind)
    encoded = question_answering.encode(rows, target, tokenizer, 30)
    for row, examples in zip(rows, encoded, strict=True):
        assert all(example.refused is None for example in examples)
        covered = [{place for place in example.features["starts"] if place >= 0} for example in examples]
        (whole,) = question_answering.encode([row], target, tokenizer, 500)[0]
        assert set().union(*covered) == {place for place in whole.features["starts"] if place >= 0}
        assert all(len(one & two) == len(two) - 1 for one, two in itertools.pairwise(covered))
        assert examples == question_answering.encode([row], target, tokenizer, 30)[0]


def test_answer_that_is_whole_in_no_window_is_refused() -> None:
    rows = [{"c": CONTEXT, "q": "what?", "a": answer} for answer in (CONTEXT, "sun", "")]
    cut, found, none = question_answering.encode(rows, TARGET, tiny.encoder_tokenizer(), 18)
    (example,) = cut
    assert example.refused is not None
    assert (example.refused.check, example.trained_tokens) == ("answer cut off", 0)
    assert f"{len(CONTEXT)} characters" in example.refused.reason
    assert len(found) == len(none) > 1
    assert all(example.refused is None for example in [*found, *none])
    assert {example.features["labels"][0] for example in none} == {0}


def test_questions_about_one_passage_stay_together() -> None:
    rows = [{"c": CONTEXT, "q": "what?", "a": "sun"}, {"c": f" {CONTEXT.upper()}", "q": "where?", "a": ""}]
    assert len({question_answering.group_key(row, TARGET) for row in rows}) == 1
    assert question_answering.group_key({**rows[0], "c": "sun"}, TARGET) == "sun"


@pytest.fixture
def scored() -> tuple[torch.Tensor, torch.Tensor]:
    """Two windows of 12 and 9 tokens, the second one without an answer."""
    logits = torch.randn(2, 12, 2, generator=torch.Generator().manual_seed(3))
    return logits, torch.tensor([[5, 6, 4, 10, 12], [0, 0, 3, 7, 9]])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_is_the_mean_of_two_cross_entropies_without_padding(
    scored: tuple[torch.Tensor, torch.Tensor], smoothing: float
) -> None:
    logits, labels = scored
    expected = 0.0
    for window, (start, end, _, _, tokens) in zip(logits, labels.tolist(), strict=True):
        entropy = torch.nn.CrossEntropyLoss(label_smoothing=smoothing)
        expected += (
            float(sum(entropy(window[:tokens, side], torch.tensor(place)) for side, place in enumerate((start, end))))
            / 2
        )
    found = question_answering.loss(logits, labels, TARGET, LossSettings(smoothing))
    assert float(found) == pytest.approx(expected, rel=1e-5)
    assert question_answering.count_items(labels) == 2


def test_best_span_is_that_of_a_search_over_all(scored: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, labels = scored
    logits[0, 3] += 50  # a token of the question must not be answered
    logits[1, 10] += 50  # nor padding
    kept = {name: value.numpy() for name, value in question_answering.reduce_logits(logits, labels, TARGET).items()}
    for row, (start, end, first, last, tokens) in enumerate(labels.tolist()):
        chances = logits[row, :tokens].log_softmax(dim=0)
        spans_of = {
            (i, j): float(chances[i, 0] + chances[j, 1]) for i in range(first, last + 1) for j in range(i, last + 1)
        }
        best = max(spans_of, key=lambda span: spans_of[span])
        assert (kept["first"][row], kept["last"][row]) == best
        assert kept["chance"][row] == pytest.approx(spans_of[best], rel=1e-5)
        assert kept["nowhere"][row] == pytest.approx(float(chances[0].sum()), rel=1e-5)
        assert kept["loss"][row] == pytest.approx(-float(chances[start, 0] + chances[end, 1]) / 2, rel=1e-5)


def test_answer_has_at_most_thirty_tokens() -> None:
    logits = torch.zeros(1, 60, 2)
    logits[0, 2, 0] = logits[0, 50, 1] = 20
    logits[0, 45, 0] = 5
    kept = question_answering.reduce_logits(logits, torch.tensor([[2, 50, 1, 58, 60]]), TARGET)
    assert (int(kept["first"]), int(kept["last"])) == (45, 50)


def test_metrics_of_windows_count_shared_tokens() -> None:
    kept = {
        "first": np.array([4, 4, 7, 2, 5]),
        "last": np.array([6, 6, 8, 3, 6]),
        "chance": np.array([-1.0, -1, -1, -9, -9]),
        "nowhere": np.array([-9.0, -9, -9, -1, -1]),
        "true_first": np.array([4, 5, 2, 0, 5]),
        "true_last": np.array([6, 8, 4, 0, 6]),
        "loss": np.array([1.0, 2, 3, 4, 5]),
    }
    values = question_answering.metrics(kept, TARGET)
    assert values["exact_match"] == pytest.approx(2 / 5)
    assert values["f1"] == pytest.approx((1 + 2 * 2 / 7 + 0 + 1 + 0) / 5)
    assert values["loss"] == 3.0


def test_windows_of_a_question_give_one_answer() -> None:
    context = "one two three"
    window = {"starts": [-1, 0, 3, 7], "ends": [-1, 3, 7, 13]}
    kept = {
        "first": np.array([1, 2, 3]),
        "last": np.array([1, 2, 3]),
        "chance": np.log([0.1, 0.7, 0.2]),
        "nowhere": np.log([0.8, 0.2, 0.7]),
    }
    found = question_answering.best_answers(kept, [window] * 3, ["a", "a", "b"], [context] * 3)
    assert found["a"] == {"answer": "two", "start": 4, "probability": pytest.approx(0.7)}
    assert found["b"] == {"answer": "", "start": None, "probability": pytest.approx(0.7)}


def test_scores_of_texts_are_squads() -> None:
    predicted = ["The Sun!", "a big town", "", "soup", "x"]
    accepted_texts = [["sun"], ["town", "small town hall"], [], [], ["soup"]]
    scores = spans.squad_scores(predicted, accepted_texts)
    assert scores["exact_match"].tolist() == [1, 0, 1, 0, 0]
    assert scores["f1"] == pytest.approx([1, 2 / 3, 1, 0, 0])


def test_nearest_sentence_shares_most_words() -> None:
    context = "We met in the garden. The soup was cooked by Ann. Rain fell."
    assert spans.nearest_sentence("Who cooked the soup?", context) == "The soup was cooked by Ann."
    assert spans.nearest_sentence("Why?", context) == "We met in the garden."
