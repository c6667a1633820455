"""Near-duplicates: planted ones are found, others are left alone, and a split keeps them together."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fulltune import data
from fulltune.data import groups as near
from fulltune.errors import RecipeError
from fulltune.inference.store import CLUSTERS, IN_TRAIN, Rows, read_original_rows
from fulltune.recipe.fields import Recipe
from fulltune.records.data import DataSummary
from tests import tiny
from tests.unit.data.stage import prepare

WORDS = ["".join(random.Random(number).choices("abcdefghijklmnoprstuvwyz", k=3 + number % 7)) for number in range(800)]


def sentence(chance: random.Random, size: int = 20) -> list[str]:
    return chance.choices(WORDS, k=size)


def jaccard(one: str, two: str) -> float:
    grams = [{text[place : place + 5] for place in range(len(text) - 4)} for text in (one, two)]
    return len(grams[0] & grams[1]) / len(grams[0] | grams[1])


def test_signatures_estimate_the_share_of_common_grams() -> None:
    chance, errors = random.Random(0), []
    for number in range(200):
        words = sentence(chance)
        other = list(words)
        for _ in range(number % 8):
            other[chance.randrange(len(other))] = chance.choice(WORDS)
        first, two = near.minhash([" ".join(words), " ".join(other)])
        errors.append((first == two).mean() - jaccard(" ".join(words), " ".join(other)))
    assert abs(np.mean(errors)) < 0.01
    assert np.std(errors) < 0.06


def test_signatures_do_not_depend_on_neighbours_or_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [" ".join(sentence(random.Random(number), number % 30)) for number in range(50)] + [
        "",
        "é",
        "a\ud800b",
        "🙂 ok",
    ]
    together = near.minhash(texts)
    assert (together == np.concatenate([near.minhash([text]) for text in texts])).all()
    monkeypatch.setattr(near, "_CHARACTERS_AT_ONCE", 100)
    assert (near.minhash(texts) == together).all()
    assert near.minhash([]).shape == (0, near.NUM_HASHES)


@pytest.mark.parametrize("threshold", [0.6, 0.8, 0.9])
def test_clusters_find_planted_pairs_and_no_others(threshold: float) -> None:
    chance = random.Random(1)
    texts, planted = [], set()
    for number in range(1500):
        words = sentence(chance)
        texts.append(" ".join(words))
        if number % 3 == 0:
            for _ in range(chance.choice((1, 1, 2, 6))):
                words[chance.randrange(len(words))] = chance.choice(WORDS)
            texts.append(" ".join(words))
            if jaccard(texts[-2], texts[-1]) >= threshold + 0.05:
                planted.add((len(texts) - 2, len(texts) - 1))
    clusters = near.cluster_near_duplicates(near.minhash(texts), threshold)
    together = {(int(first), place) for place, first in enumerate(clusters) if first != place}
    assert len(planted & together) >= 0.97 * len(planted)
    wrong = [pair for pair in together if jaccard(texts[pair[0]], texts[pair[1]]) < threshold - 0.12]
    assert not wrong
    assert len(together) < 600


def test_clusters_chain_and_are_named_by_their_first_row() -> None:
    words = sentence(random.Random(0), 30)
    chain = [" ".join([*words[:20], "filler", *words[20 + 2 * step :]]) for step in range(4)]
    texts = [" ".join(sentence(random.Random(9), 30)), *chain]
    assert near.cluster_near_duplicates(near.minhash(texts), 0.7).tolist() == [0, 1, 1, 1, 1]
    assert near.cluster_near_duplicates(near.minhash(texts[:1]), 0.7).tolist() == [0]


def test_joined_lone_rows_keep_their_number_and_large_clusters_are_not_first() -> None:
    chance = random.Random(0)
    texts = [" ".join(sentence(chance)) for _ in range(100)]
    texts += [f"{text} {word}" for text in texts[:20] for word in ("yes", "no")]
    groups = np.random.default_rng(0).integers(0, 2**63, len(texts)).astype(np.uint64)
    joined = near.join_near_duplicates(groups, near.minhash(texts), 0.8)
    assert (joined[20:100] == groups[20:100]).all()
    for place in range(20):
        assert joined[place] == joined[100 + 2 * place] == joined[101 + 2 * place]
    # Uniform: with the smallest of three numbers the mean would be a quarter.
    assert 0.3 < (joined[:20] / 2**64).mean() < 0.7


def variants(count: int) -> list[dict[str, Any]]:
    chance = random.Random(3)
    rows = []
    for number in range(count):
        text = " ".join(sentence(chance, 15))
        rows += [{"text": text + end, "label": "ab"[number % 2], "family": number} for end in ("", " now", " please")]
    return rows


def test_prepare_near_duplicates_stay_on_one_side_and_share_a_cluster(tmp_path: Path, encoder_tokenizer: Any) -> None:
    prepare(tmp_path, variants(60), encoder_tokenizer, near_duplicates=0.75)
    families = {}
    for name in ("train", "eval", "test"):
        folder = tmp_path / "data" / name
        families[name] = [row["family"] for row in read_original_rows(folder)]
        if name != "train":
            numbers = np.load(folder / CLUSTERS)
            assert len(numbers) == len(Rows(folder))
            assert len(set(zip(numbers.tolist(), families[name], strict=True))) == len(set(families[name]))
            assert len(set(numbers.tolist())) == len(set(families[name]))
    assert not set(families["train"]) & set(families["eval"])
    assert not set(families["train"]) & set(families["test"])
    assert not set(families["eval"]) & set(families["test"])


def test_prepare_near_duplicates_across_files_are_noted(tmp_path: Path, encoder_tokenizer: Any) -> None:
    rows = variants(60)
    test = tiny.write_jsonl(tmp_path / "test.jsonl", [row for row in rows if row["text"].endswith("now")][:30])
    prepare(
        tmp_path,
        [row for row in rows if not row["text"].endswith("now")],
        encoder_tokenizer,
        near_duplicates=0.75,
        test=str(test),
    )
    notes = DataSummary.load(tmp_path / "data" / "summary.json").notes
    assert any("test rows have a text that also occurs in train (equal, or nearly so)" in note for note in notes)


def test_prepare_near_duplicates_of_images_are_refused(tmp_path: Path) -> None:
    recipe = Recipe.model_validate(
        {"model": "x", "task": "image-classification", "data": {"train": str(tmp_path), "near_duplicates": 0.8}}
    )
    with pytest.raises(RecipeError, match="near duplicates are detected in texts only"):
        data.prepare(data.Stage(recipe, tmp_path / "data", None, data.Limits(None)))  # type: ignore[arg-type]  # not reached


def test_prepare_says_which_test_rows_stand_in_train(tmp_path: Path, encoder_tokenizer: Any) -> None:
    rows, other = variants(60), variants(80)[180:]
    exact, near = rows[:9], [{**row, "text": f"{row['text']} soon"} for row in rows[30:36]]
    test = [*other, *exact, *near]
    file = str(tiny.write_jsonl(tmp_path / "test.jsonl", test))
    for threshold, expected in ((1.0, 9), (0.75, 15)):
        folder = tmp_path / str(threshold)
        prepare(folder, rows, encoder_tokenizer, near_duplicates=threshold, eval_fraction=0.02, test=file)
        stands = np.load(folder / "data" / "test" / IN_TRAIN)
        words = {row["text"] for row in read_original_rows(folder / "data" / "train")}
        assert len(stands) == len(test)
        assert not stands[: len(other)].any()
        assert {row["text"] for row in exact} <= words, "or the draw of eval rows has changed: take other ones"
        assert stands[len(other) :].tolist() == [True] * expected + [False] * (15 - expected)
