"""Every format gives the same rows, with the line each came from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import feather, parquet

from fulltune.data.readers.read import hash_files, locate_data_files
from fulltune.errors import DataError
from fulltune.recipe.data import DataBlock, codec_for_encoding
from fulltune.tasks.columns import find_column
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
    assert caught.value.problems[-1] == f"{tmp_path}/a.jsonl: 4 more broken lines; repair them too"


def test_content_hash_changes_with_content_only(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv")
    before = hash_files({"train": locate_data_files([str(path)])})
    path.touch()
    assert hash_files({"train": locate_data_files([str(path)])}) == before
    path.write_text(path.read_text() + "x,a\n")
    assert hash_files({"train": locate_data_files([str(path)])}) != before


def test_content_hash_tells_which_split_a_file_belongs_to(tmp_path: Path) -> None:
    first, two, three = (write(tmp_path / name) for name in ("a.csv", "b.csv", "c.csv"))
    both = {"train": locate_data_files([str(first), str(two)]), "eval": locate_data_files([str(three)])}
    moved = {"train": locate_data_files([str(first)]), "eval": locate_data_files([str(two), str(three)])}
    assert hash_files(both) != hash_files(moved)


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


# ---- what is easily overlooked ---------------------------------------------------------------------------------


def _refusal(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(DataError) as refusal:
        list(locate_data_files([str(path)]).rows())
    return refusal.value.problems[0].removeprefix(str(path))


def _notes(path: Path) -> list[str]:
    files = locate_data_files([str(path)])
    list(files.rows())
    return list(files.notes)


@pytest.mark.parametrize("label_first", [True, False])
@pytest.mark.parametrize(("opened", "closed"), [(0, 1), (3, 9), (0, 11)])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("sign", [",", "\t", ";"])
def test_rows_between_two_stray_quotes_are_noted(
    tmp_path: Path, sign: str, end: str, opened: int, closed: int, label_first: bool
) -> None:
    def row(number: int) -> list[str]:
        text = '"' * (number == opened) + f"rain number {number}" + '"' * (number == closed)
        label = f"{number}.5" if end == "\n" else "abc"[number % 3]
        return [label, text] if label_first else [text, label]

    header = ["label", "text"] if label_first else ["text", "label"]
    path = tmp_path / ("a.tsv" if sign == "\t" else "a.csv")
    path.write_text("".join(sign.join(cells) + end for cells in [header, *map(row, range(40))]), newline="")
    assert [note.partition(" lines")[0] for note in _notes(path)] == [
        f"{path.name}:{opened + 2}: {closed - opened + 1}"
    ]


def test_texts_of_several_lines_are_no_rows(tmp_path: Path) -> None:
    texts = [f"Dear Ann, number {number}\nthanks, Bob\nand more, too" for number in range(20)]
    path = tmp_path / "a.csv"
    path.write_text("text,label\n" + "".join(f'"{text}",{"ab"[len(text) % 2]}\n' for text in texts))
    assert not _notes(path)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_header_that_stands_again_is_refused_by_its_line(tmp_path: Path, mark: bytes) -> None:
    table = b"text,label\nrain,a\nsoup,b\n"
    assert _refusal(tmp_path / "a.csv", table + mark + table).startswith(":4: repeats the header line")


def test_column_without_a_name_is_named_by_its_place(tmp_path: Path) -> None:
    """No part of the program takes a column of row numbers for one that the recipe does not name. pandas adds another
    each time that it writes a file it has read."""
    (tmp_path / "rows.csv").write_text(",Unnamed: 0,text\n0,5,one\n1,6,two\n")
    assert read([str(tmp_path / "rows.csv")]).rows == [
        {"column 1": "0", "Unnamed: 0": "5", "text": "one"},
        {"column 1": "1", "Unnamed: 0": "6", "text": "two"},
    ]
    assert "column 'column 2' appears twice" in _refusal(tmp_path / "a.csv", b"column 2,,text\n0,5,one\n")


def test_header_among_rows_whose_columns_are_named_is_refused_by_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\nrain,a\n")
    with pytest.raises(DataError, match=r"a\.csv:1: contains the names of data\.columns, expected a row"):
        list(locate_data_files([str(tmp_path / "a.csv")], columns=("text", "label")).rows())


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"SQLite format 3\0" + bytes(500), ": is an SQLite database, "),
        ("text,label\nrain,a\n".encode("utf-32"), ":1: contains NUL bytes (is it UTF-16?)"),
        (b"\n<!DOCTYPE html>\n<html><body>Log in</body></html>\n", ": is a web page (HTML)"),
        (b'<!doctype html><html><meta content="width=1, scale=1">', ": is a web page (HTML)"),
        (b"<HTML>\n<body>404, not found</body></html>\n", ": is a web page (HTML)"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 12\n",
            ": is a Git LFS pointer ('git lfs pull'",
        ),
        (b"# of monday, by me\ntext,label\nrain,a\n", ":1: starts with a comment"),
        (b"#by me\ntext,label\nrain,a\n", ":1: starts with a comment"),
    ],
)
def test_other_kinds_of_files_are_named(tmp_path: Path, content: bytes, expected: str) -> None:
    assert _refusal(tmp_path / "a.csv", content).startswith(expected)
    if "LFS" in expected:
        assert _refusal(tmp_path / "a.parquet", content).startswith(expected)


def test_a_column_may_be_called_by_a_number_sign(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("#id,text\n1,rain\n")
    assert [row for _, row in locate_data_files([str(tmp_path / "a.csv")]).rows()] == [{"#id": "1", "text": "rain"}]


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json", "txt", "conll"])
@pytest.mark.parametrize("encoding", ["cp1252", "utf-16", "utf-32", "utf-8"])
def test_text_in_another_encoding_is_read_when_it_is_named(tmp_path: Path, kind: str, encoding: str) -> None:
    content = {
        "csv": "text;label\ncafé, schön;a\n",
        "tsv": "text\tlabel\ncafé, schön\ta\n",
        "jsonl": '{"text": "café, schön", "label": "a"}\n',
        "json": '[{"text": "café, schön", "label": "a"}]',
        "txt": "café, schön\n",
        "conll": "café, schön\n",
    }[kind]
    path = tmp_path / f"rows.{kind}"
    path.write_bytes(content.encode(encoding))
    row = next(iter(replace(locate_data_files([str(path)]), encoding=codec_for_encoding(encoding)).rows()))[1]
    assert "café" in (row["text"] if "text" in row else row["tokens"][0])
    if encoding != "utf-8":
        place = {"csv": 2, "tsv": 2}.get(kind, 1) if encoding == "cp1252" else 1
        message = _refusal(path, path.read_bytes())
        assert message.startswith(f":{place}: ")
        assert "data.encoding" in message


def test_encoding_that_python_does_not_know_is_refused() -> None:
    for name in ("cp125x2", "hex", "undefined"):
        with pytest.raises(ValueError, match=f"expected a name such as utf-8, cp1252 or utf-16, found '{name}'"):
            DataBlock(train="a.csv", encoding=name)


def test_file_that_is_gone_is_named(tmp_path: Path) -> None:
    for kind in ("csv", "parquet"):
        path = write(tmp_path / f"a.{kind}")
        files = locate_data_files([str(path)])
        path.unlink()
        with pytest.raises(DataError, match=rf"a\.{kind}: cannot be read \(No such file or directory\)"):
            list(files.rows())


def test_columns_of_parquet_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet")
    assert _refusal(path, path.read_bytes().replace(b"label", b"lab\xe9l")).startswith(
        ": not a valid parquet file: 'utf-8' codec"
    )


def test_a_column_in_another_normal_form_is_found() -> None:
    assert find_column("text", "t\u00e9xt", ["te\u0301xt", "label"], "a.csv") == "te\u0301xt"
