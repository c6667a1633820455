"""CoNLL files: sentences, their lines, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fulltune.data.readers.read import locate_data_files
from fulltune.errors import DataError


def read(tmp_path: Path, text: str) -> list[tuple[int, dict[str, Any]]]:
    path = tmp_path / "a.conll"
    path.write_text(text, encoding="utf-8")
    return rows(path)


def rows(path: Path) -> list[tuple[int, dict[str, Any]]]:
    return [(int(place.split(":")[1]), row) for place, row in locate_data_files([str(path)]).rows()]


def sentence(tokens: str, tags: str) -> dict[str, list[str]]:
    return {"tokens": tokens.split(), "tags": tags.split()}


@pytest.mark.parametrize("separator", ["\t", " ", "   "], ids=["tab", "space", "spaces"])
def test_sentences_are_read_with_the_number_of_their_first_line(tmp_path: Path, separator: str) -> None:
    lines = [("Ada", "B-PER"), ("sings", "O"), (), (), ("Hi", "O")]
    text = "".join(separator.join(line) + "\n" for line in lines)
    assert read(tmp_path, text) == [(1, sentence("Ada sings", "B-PER O")), (5, sentence("Hi", "O"))]


def test_first_column_is_the_word_and_last_the_tag(tmp_path: Path) -> None:
    text = "-DOCSTART- -X- -X- O\n\nEU NNP B-NP B-ORG\nrejects VBZ B-VP O\n-DOCSTART- -X- -X- O\nHi UH O O\n"
    assert read(tmp_path, text) == [(3, sentence("EU rejects", "B-ORG O")), (6, sentence("Hi", "O"))]


def test_line_with_only_a_tab_and_windows_line_ends_separate_sentences(tmp_path: Path) -> None:
    path = tmp_path / "a.annotated"
    path.write_bytes("\ufeffAda\tB-PER\r\n\t\r\nHi\tO\r\n".encode())
    assert rows(path) == [(1, sentence("Ada", "B-PER")), (3, sentence("Hi", "O"))]


def test_word_may_be_a_space_that_is_no_separator(tmp_path: Path) -> None:
    assert read(tmp_path, "\u00a0\tO\nNew York\tB-LOC\n") == [
        (1, {"tokens": ["\u00a0", "New York"], "tags": ["O", "B-LOC"]})
    ]


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ("a\tO\nb\tX\tO\n", 2, "3 columns, expected 2 as in the first line; write a word and its tag on each line"),
        ("a O\nb\n", 2, "1 column, expected 2 as in the first line"),
        ("a\tO\nb O\n", 2, "1 column, expected 2 as in the first line"),
        ("a\tX\tO\n\n# text = b\n", 3, "1 column, expected 3 as in the first line; write a word"),
        ("a\nb\n", 1, "1 column, expected a word and its tag"),
        ("a\tO\nb\t\n", 2, "the word 'b' has no tag; write O for words outside entities"),
    ],
)
def test_broken_line_is_refused_by_its_number(tmp_path: Path, text: str, line: int, problem: str) -> None:
    with pytest.raises(DataError) as caught:
        read(tmp_path, text)
    assert caught.value.problems[0].startswith(f"{tmp_path}/a.conll:{line}: {problem}")
