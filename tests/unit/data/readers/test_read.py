"""Every format gives the same rows, with the line each came from."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import feather, parquet

from fulltune.data.readers.read import content_hash, locate
from fulltune.errors import DataError
from tests.unit.data.readers.table import read

ROWS = [{"text": "one, two", "label": "a"}, {"text": "é 😀", "label": "b"}]


def write(path: Path) -> Path:
    table = pa.Table.from_pylist(ROWS)
    match path.suffix:
        case ".csv":
            path.write_text('text,label\n"one, two",a\né 😀,b\n', encoding="utf-8")
        case ".tsv":
            path.write_text("text\tlabel\none, two\ta\né 😀\tb\n", encoding="utf-8")
        case ".jsonl" | ".ndjson":
            path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        case ".json":
            path.write_text(json.dumps({"version": 1, "data": ROWS}))
        case ".parquet":
            parquet.write_table(table, path)
        case ".feather":
            feather.write_feather(table, path)
        case _:
            with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
                writer.write_table(table)
    return path


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "ndjson", "json", "parquet", "feather", "arrow"])
def test_read_each_format_gives_the_same_rows(tmp_path: Path, kind: str) -> None:
    table = read([str(write(tmp_path / f"rows.{kind}"))])
    assert table.rows == ROWS
    assert table.columns == ("text", "label")
    first = 2 if kind in ("csv", "tsv") else 1
    assert table.places == [f"rows.{kind}:{first}", f"rows.{kind}:{first + 1}"]


def test_read_csv_with_line_ends_in_cells_counts_lines_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text,label\n"two\nlines",a\n\nthree,b\n')
    assert read([str(tmp_path / "a.csv")]).places == ["a.csv:2", "a.csv:5"]


def test_read_folder_joins_its_files_in_order(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl")
    write(tmp_path / "a.csv")
    (tmp_path / "readme.md").write_text("not data")
    table = read([str(tmp_path)])
    assert [place.split(":")[0] for place in table.places] == ["a.csv", "a.csv", "b.jsonl", "b.jsonl"]
    assert table.where == "a.csv and 1 more"


def test_read_json_lines_many_broken_names_five(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{\n" * 9)
    with pytest.raises(DataError) as caught:
        read([str(tmp_path / "a.jsonl")])
    assert len(caught.value.problems) == 6
    assert caught.value.problems[-1] == f"{tmp_path}/a.jsonl: 4 more broken lines; repair them, too"


def test_content_hash_changes_with_content_only(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv")
    before = content_hash({"train": locate([str(path)])})
    path.touch()
    assert content_hash({"train": locate([str(path)])}) == before
    path.write_text(path.read_text() + "x,a\n")
    assert content_hash({"train": locate([str(path)])}) != before


def test_content_hash_tells_which_split_a_file_belongs_to(tmp_path: Path) -> None:
    one, two, three = (write(tmp_path / name) for name in ("a.csv", "b.csv", "c.csv"))
    both = {"train": locate([str(one), str(two)]), "eval": locate([str(three)])}
    moved = {"train": locate([str(one)]), "eval": locate([str(two), str(three)])}
    assert content_hash(both) != content_hash(moved)


def test_places_of_files_with_the_same_name_differ(tmp_path: Path) -> None:
    files = [write(tmp_path / folder / "rows.csv") for folder in ("a", "b") if not (tmp_path / folder).mkdir()]
    places = read([str(file) for file in files]).places
    assert len(set(places)) == len(places) == 4


def test_csv_with_semicolons_as_spreadsheets_write_it_is_read(tmp_path: Path) -> None:
    file = tmp_path / "export.csv"
    file.write_text('\ufefftext;label\r\n"gut, aber teuer";no\r\n0,5 Sterne;no\r\n', encoding="utf-8")
    assert read([str(file)]).rows == [
        {"text": "gut, aber teuer", "label": "no"},
        {"text": "0,5 Sterne", "label": "no"},
    ]
    file.write_text('"a;b",c\n1;2,3\n', encoding="utf-8")
    assert read([str(file)]).rows == [{"a;b": "1;2", "c": "3"}]
