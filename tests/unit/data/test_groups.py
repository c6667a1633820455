"""Rows of one customer on one side of a split: whose a row is, when it came, components, what is refused or noted."""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fulltune.data.groups import (
    RowCounts,
    format_time,
    hash_to_number,
    join_by_value,
    parse_group,
    parse_groups_and_times,
    parse_time,
)
from fulltune.data.split import rarest_class_in_group
from fulltune.errors import DataError
from fulltune.inference.store import CLUSTERS, read_original_rows
from fulltune.tasks.columns import BadCell
from tests.unit.data.stage import of_splits, prepare


def drawn(names: list[str], seed: int = 0) -> np.ndarray:
    return np.array([hash_to_number(seed, name) for name in names], np.uint64)


def components(texts: str, values: str) -> list[int]:
    """Numbered in their order, from 0."""
    groups = join_by_value(drawn(list(texts)), drawn(list(values), 1)).tolist()
    return [list(dict.fromkeys(groups)).index(number) for number in groups]


@pytest.mark.parametrize(
    ("texts", "values", "expected"),
    [
        ("abcd", "1111", [0, 0, 0, 0]),
        ("abcd", "1234", [0, 1, 2, 3]),
        ("aacd", "1234", [0, 0, 1, 2]),
        ("abbc", "1122", [0, 0, 0, 0]),
        ("abcdc", "12232", [0, 1, 1, 2, 1]),
        ("abbccd", "112233", [0, 0, 0, 0, 0, 0]),
        ("", "", []),
    ],
    ids=["one value", "all alone", "one text", "a chain", "two of three", "a long chain", "none"],
)
def test_components_over_texts_and_values(texts: str, values: str, expected: list[int]) -> None:
    assert components(texts, values) == expected


def test_component_is_a_function_of_the_rows_and_new_rows_of_a_value_move_nothing() -> None:
    chance = random.Random(1)
    rows = [(f"text {chance.randrange(150)}", f"user {chance.randrange(80)}") for _ in range(200)]
    sides = dict(zip(rows, joined(rows), strict=True))
    chance.shuffle(rows)
    assert dict(zip(rows, joined(rows), strict=True)) == sides
    more = [*rows, *((f"new {number}", user) for number, (_, user) in enumerate(rows[:50]))]
    assert dict(zip(more, joined(more), strict=True)).items() >= sides.items()


def joined(rows: list[tuple[str, str]]) -> list[int]:
    return join_by_value(drawn([text for text, _ in rows]), drawn([user for _, user in rows], 1)).tolist()  # type: ignore[no-any-return]  # numpy


def test_side_counts_for_its_rarest_class_whatever_the_order_of_its_rows() -> None:
    strata = np.array(["xyz".index(label) for label in "xxxxyyyzzx"])
    sides = drawn(list("aabbbccadd"))
    for order in (slice(None), slice(None, None, -1)):
        by_side = dict(
            zip(sides[order].tolist(), rarest_class_in_group(strata[order], sides[order]).tolist(), strict=True)
        )
        assert [by_side[hash_to_number(0, side)] for side in "abcd"] == ["xyz".index(label) for label in "zyyz"]
    assert rarest_class_in_group(np.full(3, -1), drawn(list("aab"))).tolist() == [-1, -1, -1]


# ---- whose a row is and when it came -----------------------------------------------------------------------------

NOON = datetime(2026, 11, 28, 12, tzinfo=UTC).timestamp()
DAY = datetime(2026, 11, 28, tzinfo=UTC).timestamp()


@pytest.mark.parametrize(
    ("cell", "kind", "time"),
    [
        ("2026-11-28", "date", DAY),
        (date(2026, 11, 28), "date", DAY),
        ("2026-11-28 12:00", "date-time", NOON),
        (" 2026-11-28T12:00:00.000 ", "date-time", NOON),
        (datetime(2026, 11, 28, 12), "date-time", NOON),  # what a column without a zone holds
        ("2026-11-28T12:00:00Z", "date-time with a zone", NOON),
        ("2026-11-28 14:00:00+02:00", "date-time with a zone", NOON),
        (datetime(2026, 11, 28, 14, tzinfo=timezone(timedelta(hours=2))), "date-time with a zone", NOON),
        (1_795_000_000, "number", 1_795_000_000.0),
        (1.5, "number", 1.5),
        (Decimal("2.5"), "number", 2.5),
        ("1795000000", "number", 1_795_000_000.0),
        ("-1.5e3", "number", -1500.0),
        ("2026", "number", 2026.0),
        ("20261128", "number", 20_261_128.0),
    ],
)
def test_time_of_what_is_a_time(cell: object, kind: str, time: float) -> None:
    assert parse_time(cell) == (kind, time)


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        (None, "is empty"),
        ("  ", "is empty"),
        (math.nan, "is empty"),
        ("yesterday", "contains no time"),
        ("28.11.2026", "contains no time"),
        ("2026-13-01", "contains no time"),
        ("nan", "contains no time"),
        ("1_000", "contains no time"),
        (math.inf, "contains no time"),
        (10**400, "contains no time"),
        (True, "contains no time"),
        (["2026-11-28"], "contains no time"),
        (datetime(1, 1, 1, tzinfo=timezone(timedelta(hours=2))), "contains no time"),
        (BadCell("a text that is not UTF-8"), "contains a text that is not UTF-8"),
    ],
)
def test_time_of_what_is_none(cell: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_time(cell)


def test_times_in_words_are_those_of_the_file() -> None:
    assert format_time("date", DAY) == "2026-11-28"
    assert format_time("date-time", NOON) == "2026-11-28 12:00:00"
    assert format_time("date-time with a zone", NOON) == "2026-11-28 12:00:00 UTC"
    assert [format_time("number", number) for number in (2026.0, 1.5)] == ["2026", "1.5"]


@pytest.mark.parametrize(
    ("cell", "value"), [("anna ", "anna"), ("Anna", "Anna"), (7, "7"), (7.0, "7"), ("7", "7"), (0, "0"), (True, "True")]
)
def test_value_of_what_is_somebody(cell: object, value: str) -> None:
    assert parse_group(cell) == value


@pytest.mark.parametrize("cell", [None, "", " \t", "\u200b", math.nan, [], ["a"], {"a": 1}, b"\xff", BadCell("damage")])
def test_value_of_what_is_nobody(cell: object) -> None:
    with pytest.raises(ValueError, match=r"^(is empty|contains )"):
        parse_group(cell)


def placed(cells: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    return [(f"a.csv:{number}", row) for number, row in enumerate(cells, start=2)]


def test_marks_are_equal_for_equal_values_and_other_for_other_seeds() -> None:
    rows = placed([{"user": user, "at": at} for user, at in (("a", 3), ("b", 1), ("a ", 2))])
    (one, times), (other, _) = (parse_groups_and_times(rows, "user", "at", seed, RowCounts()) for seed in (1, 2))
    assert one[0] == one[2] != one[1]
    assert not set(one.tolist()) & set(other.tolist())
    assert times.tolist() == [3, 1, 2]
    assert list(map(len, parse_groups_and_times(rows, None, None, 1, nothing := RowCounts()))) == [0, 0]
    assert nothing == RowCounts()


# ---- the data stage --------------------------------------------------------------------------------------------


def user_rows(users: int = 60, each: int = 5, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of users, in any order; a tenth of the texts is said by two of them."""
    chance = random.Random(seed)
    rows = []
    for user in range(users):
        for number in range(each):
            text = (
                f"shared {chance.randrange(users // 10)}" if number == 0 and user % 5 == 0 else f"{user} said {number}"
            )
            rows.append({"text": text, "label": chance.choice("aab"), "user": f"u{user}"})
    chance.shuffle(rows)
    return rows


@pytest.mark.parametrize("seed", range(3))
def test_no_user_and_no_text_is_on_two_sides(tmp_path: Path, encoder_tokenizer: Any, seed: int) -> None:
    rows = user_rows(seed=seed)
    summary = prepare(tmp_path, rows, encoder_tokenizer, group="user", split_seed=seed)
    splits = of_splits(tmp_path)
    for column in ("user", "text"):
        sides = Counter(value for rows in splits.values() for value in {row[column] for row in rows})
        assert set(sides.values()) == {1}
    assert sum(map(len, splits.values())) == len(rows)
    assert all(20 <= len(splits[name]) <= 40 for name in ("eval", "test"))
    assert any("'user' stay in one split: 60 values in " in note for note in summary.notes)
    assert "by 'user' (seed" in summary.sources["test"]
    users = [row["user"] for row in splits["test"]]
    clusters = np.load(tmp_path / "data" / "test" / CLUSTERS).tolist()
    assert len(set(clusters)) <= len(set(users)) < len(users)


def test_near_texts_of_two_users_join_them(tmp_path: Path, encoder_tokenizer: Any) -> None:
    chance, rows = random.Random(0), []
    for pair in range(40):
        for end in ("", " now"):
            drafts = ["".join(chance.choices("abcdefghij", k=60)) for _ in range(2)]
            drafts[0] = "".join(random.Random(pair).choices("abcdefghij", k=60)) + end
            rows += [{"text": text, "label": "ab"[pair % 2], "user": f"{pair}{end}", "pair": pair} for text in drafts]
    prepare(tmp_path, rows, encoder_tokenizer, group="user", near_duplicates=0.7)
    sides = Counter(pair for rows in of_splits(tmp_path).values() for pair in {row["pair"] for row in rows})
    assert set(sides.values()) == {1}


def test_gaps_of_all_files_are_refused_with_places(tmp_path: Path, encoder_tokenizer: Any) -> None:
    rows, test = user_rows(), rows_of(2)
    for number in (3, 7, 8, 20):
        rows[number]["user"] = None
    del test[1]["user"]
    with pytest.raises(DataError) as caught:
        prepare(tmp_path, rows, encoder_tokenizer, group="user", test=test)
    train, other = caught.value.problems
    assert "train.jsonl: column 'user' (data.group) is empty in 4 of 300 rows" in train
    assert "(train.jsonl:4, train.jsonl:8, train.jsonl:9 and 1 more)" in train
    assert "1 of 100 rows (test-file.jsonl:2)" in other


def test_missing_columns_are_refused_by_name(tmp_path: Path, encoder_tokenizer: Any) -> None:
    test = [{"text": f"text {number}", "label": "a"} for number in range(9)]
    with pytest.raises(DataError) as caught:
        prepare(tmp_path, user_rows(), encoder_tokenizer, group="usr", time="day", test=test)
    assert list(caught.value.problems) == [
        "train.jsonl: no column 'usr' (data.group); did you mean 'user'?",
        "train.jsonl: no column 'day' (data.time); columns in the file: text, label, user",
        "test-file.jsonl: no column 'usr' (data.group); columns in the file: text, label",
    ]


def test_rows_of_own_files_that_share_a_user_with_train_are_noted(tmp_path: Path, encoder_tokenizer: Any) -> None:
    rows = user_rows(60)
    known = [row for row in rows if row["user"] in ("u3", "u4")]
    test = [{"text": f"other {number}", "label": "a", "user": row["user"]} for number, row in enumerate(known)]
    test += [{"text": f"new {number}", "label": "b", "user": "new"} for number in range(7)]
    dev = [{"text": f"dev {number}", "label": "b", "user": "new"} for number in range(7)]
    notes = prepare(tmp_path, rows, encoder_tokenizer, group="user", test=test, eval=dev).notes
    assert "10 of 17 test rows have a 'user' that also occurs in train, so scores on them are optimistic" in notes
    assert "7 of 17 test rows have a 'user' that also occurs in eval, which is used to choose the checkpoint" in notes
    assert not any("eval rows have a 'user'" in note or "test rows have a text" in note for note in notes)


@pytest.mark.parametrize(("way", "largest"), [("value", 293), ("text", 354)])
def test_rows_that_nearly_all_hang_together_are_refused_with_numbers(
    tmp_path: Path, encoder_tokenizer: Any, way: str, largest: int
) -> None:
    rows = user_rows(60)
    for row in rows[:-8]:
        row["user"] = "everybody" if way == "value" else row["user"]
    if way == "text":
        rows += [{"text": "thank you", "label": "a", "user": f"u{user}"} for user in range(59)]
    with pytest.raises(DataError) as caught:
        prepare(tmp_path, rows, encoder_tokenizer, group="user")
    [problem] = caught.value.problems
    assert "by 'user' (data.group) and their texts stay together (" in problem
    assert f"the largest has {largest} rows" in problem
    assert "data.eval and data.test" in problem


def test_few_users_are_refused_or_noted(tmp_path: Path, encoder_tokenizer: Any) -> None:
    with pytest.raises(DataError, match="100 rows of 2 labels cannot be split into train, eval and test"):
        prepare(tmp_path / "2", rows_of(2), encoder_tokenizer, group="user")
    notes = prepare(tmp_path / "3", rows_of(3), encoder_tokenizer, group="user").notes
    assert any(
        "50 test rows instead of the 15 that data.test_fraction requests, because groups are never" in note
        for note in notes
    )


def rows_of(users: int) -> list[dict[str, Any]]:
    return [
        {"text": f"{user} says {number}", "label": "ab"[number % 2], "user": user}
        for user in range(users)
        for number in range(50)
    ]


def test_class_of_one_held_out_user_is_refused_in_words_of_groups(tmp_path: Path, encoder_tokenizer: Any) -> None:
    rows = user_rows(30)
    for user, label in (("one", "x"), ("two", "a")):
        rows += [{"text": f"{label} {number}", "label": label, "user": user} for number in range(3)]
    rows += [{"text": f"z {user}", "label": "z", "user": user} for user in ("one", "two")]
    messages = []
    for seed in range(6):
        try:
            prepare(tmp_path / str(seed), rows, encoder_tokenizer, group="user", split_seed=seed)
        except DataError as error:
            messages += error.problems
    assert 0 < len(messages) < 6
    for problem in messages:
        assert "train.jsonl: label 'x' (3 rows of " in problem
        assert "held out by 'user' (data.group)" in problem
        assert "data.split_seed" in problem


def test_mixed_rows_of_a_scored_user_are_left_out_and_others_need_none(tmp_path: Path, encoder_tokenizer: Any) -> None:
    rows = user_rows(60)
    mixed: list[dict[str, Any]] = [{"text": f"mixed {user}", "label": "a", "user": f"u{user}"} for user in range(60)]
    mixed += [{"text": f"nobody {number}", "label": "a", "user": None} for number in range(5)]
    summary = prepare(tmp_path, rows, encoder_tokenizer, group="user", mixed=mixed)
    scored = {row["user"] for name in ("eval", "test") for row in of_splits(tmp_path)[name]}
    users = [row["user"] for row in read_original_rows(tmp_path / "data" / "mixed")]
    assert users.count(None) == 5
    assert set(users) == {None, *(f"u{user}" for user in range(60))} - scored
    assert summary.dropped["also in test"] + summary.dropped["also in eval"] == len(scored)


def test_column_that_says_whose_rows_are_plays_no_other_role(tmp_path: Path, decoder_tokenizer: Any) -> None:
    rows = [{"prompt": f"ask {number}", "completion": f"say {number}", "chat": number // 4} for number in range(80)]
    prepare(tmp_path, rows, decoder_tokenizer, group="chat", task="causal-lm")
    sides = Counter(chat for rows in of_splits(tmp_path).values() for chat in {row["chat"] for row in rows})
    assert set(sides.values()) == {1}


@pytest.mark.parametrize("task", ["embedding", "reranking"])
def test_pairs_and_their_mirror_images_stay_in_one_split(task: str, tmp_path: Path, encoder_tokenizer: Any) -> None:
    """So do all rows of one query; rows of different queries that share a positive may be apart."""
    pairs = [(f"query {number}", f"text {number}") for number in range(40)]
    shared = [(f"query {number}", f"other text {number % 3}") for number in range(20, 60)]
    rows = [{"query": one, "positive": other} for one, other in (*pairs, *(pair[::-1] for pair in pairs[:20]), *shared)]
    settings: dict[str, Any] = {"candidates": 4} if task == "reranking" else {}
    prepare(tmp_path, rows, encoder_tokenizer, task, eval_fraction=0.2, test_fraction=0.2, **settings)
    names_of = defaultdict[str, set[str]](set)
    for name, of_split in of_splits(tmp_path).items():
        for row in of_split:
            names_of[row["query"]].add(name)
            names_of[row["positive"]].add(name)
    assert all(len(names_of.pop(f"other text {number}")) > 1 for number in range(3))
    assert all(len(names) == 1 for names in names_of.values())
    assert set.union(*names_of.values()) == {"train", "eval", "test"}

    test = [{"query": row["positive"], "positive": row["query"]} for row in rows[:7]]
    summary = prepare(tmp_path / "own", rows[20:], encoder_tokenizer, task, eval=rows[:20], test=test, **settings)
    assert any("7 of 7 test rows have a query that also occurs in eval" in note for note in summary.notes)
