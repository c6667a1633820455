"""Rows of a plain text file: lines, paragraphs or sections, each with the line where it begins."""

from __future__ import annotations

from pathlib import Path

import pytest

from fulltune.data.readers import text_files
from fulltune.recipe.data import TextRows

BOOK = "\n\nOne\ntwo  \n\n \nThree\n\n\n\nFour\nfive"


def rows(folder: Path, content: str, text_rows: TextRows) -> list[tuple[int, str]]:
    path = folder / "book.txt"
    path.write_text(content, encoding="utf-8")
    return [(line, row["text"]) for line, row in text_files.read_text_file(path, text_rows)]


def test_lines_are_rows_without_blank_ones(tmp_path: Path) -> None:
    assert rows(tmp_path, BOOK, "line") == [(3, "One"), (4, "two  "), (7, "Three"), (11, "Four"), (12, "five")]


def test_paragraphs_are_runs_of_lines(tmp_path: Path) -> None:
    assert rows(tmp_path, BOOK, "paragraph") == [(3, "One\ntwo  "), (7, "Three"), (11, "Four\nfive")]


def test_section_holds_several_paragraphs(tmp_path: Path) -> None:
    assert rows(tmp_path, BOOK, "section") == [(3, "One\ntwo  \n\nThree\n\nFour\nfive")]


def test_section_ends_before_it_gets_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "SECTION_CHARACTERS", 20)
    content = "a" * 12 + "\n\n" + "b" * 8 + "\n\n" + "c" * 30 + "\n\nd\n"
    assert rows(tmp_path, content, "section") == [
        (1, "a" * 12 + "\n\n" + "b" * 8),
        (5, "c" * 30),  # one long paragraph is never cut here
        (7, "d"),
    ]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        pytest.param("One\nTwo\n", [(1, "One"), (2, "Two")], id="no blank lines"),
        pytest.param("\n\nOne\nTwo\n\n\n", [(3, "One"), (4, "Two")], id="blank lines around"),
        pytest.param("One\n\nTwo\n", [(1, "One\n\nTwo")], id="blank lines between"),
    ],
)
def test_auto_takes_sections_where_blank_lines_stand_between(
    tmp_path: Path, content: str, expected: list[tuple[int, str]]
) -> None:
    assert rows(tmp_path, content, "auto") == expected


def test_byte_order_mark_and_other_line_ends_are_no_text(tmp_path: Path) -> None:
    assert rows(tmp_path, "\ufeffOne\r\nTwo\r\n", "line") == [(1, "One"), (2, "Two")]


def test_file_of_blank_lines_has_no_rows(tmp_path: Path) -> None:
    for kind in ("line", "paragraph", "section", "auto"):
        assert rows(tmp_path, "\n \n\n", kind) == []  # type: ignore[arg-type]  # of this type
