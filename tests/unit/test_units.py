"""Sizes as people write them."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from fulltune.recipe.fields import TrainBlock
from fulltune.text import in_words, parse_bytes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("6GiB", 6 * 2**30),
        (" 24 GB ", 24 * 10**9),
        ("1.5 TiB", 3 * 2**39),
        ("512MiB", 2**29),
        ("1KB", 1000),
    ],
)
def test_parse_bytes_reads_binary_and_decimal_sizes(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["6", "6G", "GiB", "-1GiB", "six GiB", "6 gib", "6GiB!", ""])
def test_parse_bytes_refuses_anything_else(text: str) -> None:
    with pytest.raises(ValueError, match="expected a size such as 6GiB, 512MiB or 24GB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("size", "expected"), [(0, "0 KiB"), (2**20, "1 MiB"), (2**29, "0.5 GiB"), (3 * 2**40, "3,072.0 GiB")]
)
def test_in_words_shows_mib_and_gib(size: int, expected: str) -> None:
    assert in_words(size) == expected


def test_memory_limit_of_nothing_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"memory_limit: 0\.0GiB: expected more than nothing, such as 6GiB"):
        TrainBlock(memory_limit=" 0.0GiB")
    assert TrainBlock(memory_limit="6 GiB").memory_limit == "6 GiB"
