"""Which rows and columns are read, in every format and with row groups left out."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import feather, parquet

from fulltune.data.readers.read import DataFiles, hash_files, locate_data_files
from fulltune.errors import DataError
from fulltune.recipe.selection import Selection, parse_condition, slice_of_files

ROWS: list[dict[str, Any]] = [
    {"text": f"row {number}", "lang": "de" if number % 3 else "en", "year": 2000 + number, "my score": number / 2}
    for number in range(40)
]
KINDS = ("csv", "jsonl", "json", "parquet", "arrow")


def write(path: Path, rows: list[dict[str, Any]] = ROWS, **settings: Any) -> Path:
    table = pa.Table.from_pylist(rows)
    match path.suffix:
        case ".csv":
            lines = [",".join(map(str, row.values())) for row in rows]
            path.write_text("\n".join([",".join(rows[0]), *lines]) + "\n")
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        case ".json":
            path.write_text(json.dumps(rows))
        case ".parquet":
            parquet.write_table(table, path, **settings)
        case _:
            feather.write_feather(table, path)
    return path


def selected(path: Path, where: str | None = None, **settings: Any) -> DataFiles:
    selection = Selection(**settings)
    return replace(locate_data_files([str(path)]), selections={path: selection.narrowed(where) if where else selection})


def numbers(rows: Iterable[tuple[str, dict[str, Any]]]) -> list[int]:
    return [int(row["text"].removeprefix("row ")) for _, row in rows]


CONDITIONS = {
    "lang == 'de' and year >= 2035": [35, 37, 38],
    "year >= 2010 and year < 2012 or `my score` == 19.5": [10, 11, 39],
    "not (lang in ('de', 'fr') or year > 2003)": [0, 3],
    "lang not in ['de'] and text != 'row 0' and year < 2007": [3, 6],
    "year == '2004'": [4],
}


@pytest.mark.parametrize("kind", KINDS)
def test_condition_selects_the_same_rows_in_every_format(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / f"a.{kind}")
    for where, expected in CONDITIONS.items():
        files = selected(path, where)
        assert numbers(files.rows()) == expected, where
        assert list(files.notes) == [f"where: {len(expected)} of 40 rows of a.{kind} match"]
    first = 2 if kind == "csv" else 1
    assert [place for place, _ in selected(path, "year == 2004").rows()] == [f"a.{kind}:{4 + first}"]


@pytest.mark.parametrize("kind", KINDS)
def test_columns_and_slice_are_read_before_the_condition(tmp_path: Path, kind: str) -> None:
    files = selected(write(tmp_path / f"a.{kind}"), "year > 2021", columns=("text", "lang"), rows=range(20, 24))
    assert [row for _, row in files.rows()] == [{"text": "row 22", "lang": "de"}, {"text": "row 23", "lang": "de"}]
    assert list(files.notes) == [f"where: 2 of 4 rows of a.{kind} match"]


def test_two_conditions_must_both_hold(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv")
    both = Selection().narrowed("year < 2003 or year > 2038 # outer").narrowed("lang == 'de'")
    assert numbers(replace(locate_data_files([str(path)]), selections={path: both}).rows()) == [1, 2]


def test_row_groups_that_cannot_match_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.parquet", row_group_size=7)
    other = write(tmp_path / "b.parquet", row_group_size=7, write_statistics=False)
    groups, read = list[int](), parquet.ParquetFile.iter_batches

    def counted(self: Any, size: int, row_groups: list[int], columns: list[str] | None) -> Any:
        groups.extend(row_groups)
        return read(self, size, row_groups, columns)

    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", counted)
    for where, expected in {
        "year > 2036": [5],
        "year == 2001 or text == 'row 9'": [0, 1],
        "not year > 2036": [0, 1, 2, 3, 4, 5],
        "lang == 'fr' or year <= 2006": [0],
        "lang == 'x' or year >= 2014": [2, 3, 4, 5],
        "year == '2003'": [0, 1, 2, 3, 4, 5],
    }.items():
        groups.clear()
        rows = list(selected(path, where).rows())
        assert groups == expected, where
        assert [(place[1:], row) for place, row in rows] == [(p[1:], row) for p, row in selected(other, where).rows()]
        assert rows
    groups.clear()
    with pytest.raises(DataError, match=r"a.parquet: none of its rows match where: year < 1999; change the condition"):
        list(selected(path, "year < 1999").rows())
    assert groups == []


def test_class_names_are_compared_by_name_though_the_file_has_numbers(tmp_path: Path) -> None:
    names = {"info": {"features": {"label": {"_type": "ClassLabel", "names": ["7", "8"]}}}}
    table = pa.table({"text": ["row 0", "row 1"], "label": [0, 1]})
    parquet.write_table(table.replace_schema_metadata({"huggingface": json.dumps(names)}), tmp_path / "a.parquet")
    assert numbers(selected(tmp_path / "a.parquet", "label == '7' or label == 7").rows()) == [0]


def test_missing_values_and_unlike_cells_fulfil_no_comparison() -> None:
    rows = [{"x": 3}, {"x": None}, {}, {"x": "n/a"}, {"x": "3"}, {"x": [3]}, {"x": float("nan")}, {"x": True}]

    def holding(where: str) -> list[int]:
        condition = parse_condition(where)
        return [place for place, row in enumerate(rows) if condition.holds(row)]

    assert holding("x == 3") == [0, 4]
    assert holding("x != 3") == holding("not x == 3") == [7]
    assert holding("x is None") == [1, 2]
    assert holding("x is not None and (x > 2 or x is None)") == [0, 4]
    day = {"day": datetime.datetime(2024, 5, 1, 12), "flag": "true"}
    assert parse_condition("day > '2024-05-01T11:00' and day < '2024-05-02' and flag == True").holds(day)


NOON = datetime.datetime(2020, 1, 1, 12)


@pytest.mark.parametrize(
    ("where", "cells"),
    [
        ("x == '2020-01-01'", [datetime.datetime(2020, 1, 1), datetime.date(2020, 1, 1)]),
        ("x != '2020-01-01T12:00:00'", [datetime.date(2020, 1, 1), NOON.replace(tzinfo=datetime.UTC, hour=11)]),
        ("x == '2020-01-01T13:00:00+01:00'", [NOON.replace(tzinfo=datetime.UTC)]),
        ("x == 0.1", [Decimal("0.1"), "0.10", 0.1]),
        ("x == '0.1'", [Decimal("0.10"), 0.1]),
        ("x > 9007199254740992", ["9007199254740993", Decimal("9007199254740993")]),
        ("x < -9007199254740992", ["-9007199254740993", "-inf"]),
        ("x is None or x == ''", [None, ""]),
        ("not (x is None or x < 1)", ["1", True, "true"]),
        ("x != '' and x != 'a' and x > 'a'", ["b", "nan"]),
        ("x is None and not x < 3", []),
    ],
)
def test_cells_of_every_type_are_compared_exactly(where: str, cells: list[Any]) -> None:
    assert all(parse_condition(where).holds({"x": cell}) for cell in cells)
    others = [Decimal("sNaN"), Decimal("nan"), [1], "" if "" not in cells else "no"]
    assert not any(parse_condition(where).holds({"x": cell}) for cell in others)


def test_texts_that_are_no_dates_are_not_compared_with_dates(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", [{"text": "row 0", "day": NOON}])
    for text in ("2020-1-2", "2020-01-01T12:00Z"):
        with pytest.raises(DataError, match=f"where: '{text}' cannot be compared with 2020-01-01 12:00:00; write it"):
            list(selected(path, f"day < '{text}'").rows())


@pytest.mark.parametrize(
    ("where", "found", "place"),
    [
        ("lang = 'de'", "= 'de'", 6),
        ("é == 'ü' and len(text) > 3", "len(text) > 3", 14),
        ("lang == 'de' and", "", 17),
        ("year > other", "other", 8),
        ("x == 1 or 2010 <= year < 2012", "2010 <= year < 2012", 11),
        ("year in 5", "5", 9),
        ("`a b` == None", "None", 10),
        ("year", "year", 1),
        ("a.b == 3", "a.b == 3", 1),
        ("text == f'{x}'", "f'{x}'", 9),
        ("`ä ö` == 3 and x == b'3'", "b'3'", 21),
        ("1 == 1", "1 == 1", 1),
    ],
)
def test_other_syntax_is_refused_with_its_place(where: str, found: str, place: int) -> None:
    with pytest.raises(ValueError, match="compare columns with texts or numbers") as raised:
        parse_condition(where)
    assert f"found {found!r} at character {place}" in str(raised.value)


@pytest.mark.parametrize("kind", KINDS)
def test_unknown_columns_are_named_with_near_ones(tmp_path: Path, kind: str) -> None:
    files = selected(write(tmp_path / f"a.{kind}"), "yaer > 3", columns=("text", "qqq"))
    with pytest.raises(DataError) as raised:
        list(files.rows())
    second, first = raised.value.problems
    assert first == f"{tmp_path}/a.{kind}: no column 'yaer' (where); did you mean 'year'?"
    assert second == f"{tmp_path}/a.{kind}: no column 'qqq' (columns); columns in the file: text, lang, year, my score"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[:5%]", {"a.csv": range(2), "b.parquet": range(0)}),
        ("[30:45]", {"a.csv": range(30, 40), "b.parquet": range(5)}),
        ("[-3:]", {"a.csv": range(0), "b.parquet": range(7, 10)}),
        ("[50%:90%]", {"a.csv": range(25, 40), "b.parquet": range(5)}),
    ],
)
def test_slice_counts_the_rows_of_all_files(tmp_path: Path, text: str, expected: dict[str, range]) -> None:
    paths = [write(tmp_path / "a.csv"), write(tmp_path / "b.parquet", ROWS[:10])]
    files = locate_data_files([*map(str, paths)])
    slices = slice_of_files(files.files, text, files.num_rows)
    assert {path.name: rows for path, rows in slices.items()} == expected
    read = replace(files, selections={path: Selection(rows=rows) for path, rows in slices.items()})
    assert numbers(read.rows()) == [number for name in expected for number in expected[name]]


def test_slice_of_another_form_or_without_rows_is_refused(tmp_path: Path) -> None:
    for text, message in {"[5]": "expected a slice such as", "[50:60]": r"\[50:60\] has none of the 40 rows"}.items():
        with pytest.raises(ValueError, match=message):
            slice_of_files([tmp_path / "a.csv"], text, lambda file: 40)


def test_selection_changes_the_hash_of_the_files(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv")
    hashes = {hash_files({"train": selected(path, where)}) for where in ("year > 2001", "year > 2002", None)}
    assert len(hashes | {hash_files({"train": locate_data_files([str(path)])})}) == 4
