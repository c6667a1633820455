"""Sizes, times, counts and names in words and back."""

from __future__ import annotations

import math

import pytest
from pydantic import ValidationError

from fulltune import text
from fulltune.recipe.training import TrainBlock


@pytest.mark.parametrize(
    ("written", "expected"),
    [("6GiB", 6 * 2**30), (" 24 GB ", 24 * 10**9), ("1.5 TiB", 3 * 2**39), ("512MiB", 2**29), ("1KB", 1000)],
)
def test_parse_bytes_reads_binary_and_decimal_sizes(written: str, expected: int) -> None:
    assert text.parse_bytes(written) == expected


@pytest.mark.parametrize("written", ["6", "6G", "GiB", "-1TB", "1kB", "six GiB", "6 gib", "6GiB!", ""])
def test_parse_bytes_refuses_anything_else(written: str) -> None:
    with pytest.raises(ValueError, match="expected a size above 0, such as 6GiB, 512MB or 600TB"):
        text.parse_bytes(written)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (0, "0 bytes"),
        (1, "1 byte"),
        (1023, "1,023 bytes"),
        (1024, "1 KiB"),
        (2**20, "1 MiB"),
        (91_300_000, "87.1 MiB"),
        (2**29, "512 MiB"),
        (2**30 - 1, "1 GiB"),
        (3 * 2**29, "1.5 GiB"),
        (3 * 2**40, "3,072 GiB"),
    ],
)
def test_bytes_have_three_digits_and_a_binary_unit(size: int, expected: str) -> None:
    assert text.format_bytes(size) == expected


def test_memory_limit_of_nothing_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"expected a size above 0, such as .*, found ' 0\.0GiB'"):
        TrainBlock(memory_limit=" 0.0GiB")
    assert TrainBlock(memory_limit="6 GiB").memory_limit == "6 GiB"


@pytest.mark.parametrize(
    ("seconds", "read", "typed"),
    [
        (0.0, "0 s", "0s"),
        (0.4217, "0.422 s", "0s"),
        (12.3, "12 s", "12s"),
        (59.7, "1 min", "1m"),
        (83, "1 min 23 s", "1m23s"),
        (3599.8, "1 h", "1h"),
        (5400, "1 h 30 min", "1h30m"),
        (86340, "23 h 59 min", "23h59m"),
        (273_600, "3 d 4 h", "3d4h"),
    ],
)
def test_times_in_words_and_as_one_types_them_are_read_back(seconds: float, read: str, typed: str) -> None:
    assert (text.format_seconds(seconds), text.typed_seconds(seconds)) == (read, typed)
    if seconds > 10:
        assert text.parse_seconds(read) == text.parse_seconds(typed) == pytest.approx(seconds, abs=0.6)


def test_time_that_is_not_finite_is_said_to_be() -> None:
    assert text.format_seconds(math.nan) == "not finite"


@pytest.mark.parametrize("written", ["", "30", "m", "1h x", "-5m", "2 hours"])
def test_parse_seconds_refuses_anything_else(written: str) -> None:
    with pytest.raises(ValueError, match="expected a time such as 30m, 2h or 90s"):
        text.parse_seconds(written)
    with pytest.raises(ValueError, match="expected more than 0, such as 30m, found '0m'"):
        text.parse_seconds("0m")


def test_counts_agree_with_their_noun() -> None:
    assert [text.counted(count, "row") for count in (0, 1, 1200)] == ["0 rows", "1 row", "1,200 rows"]
    assert text.counted(2, "batch", "batches") == "2 batches"


def test_shares_metrics_and_numbers() -> None:
    assert [text.format_share(value) for value in (0, 1e-5, 0.5, 0.9999, 1)] == [
        *("0.0%", "<0.1%", "50.0%", ">99.9%", "100.0%")
    ]
    assert text.format_percent(math.nan) == text.format_number(math.inf) == "not finite"
    assert text.format_metric("f1_macro", 0.9214) == "92.1%"
    assert text.format_metric("loss", 1.23456) == "1.23"
    assert [text.format_number(value) for value in (0.01234, 1234.5, 2e-05)] == ["0.0123", "1,234", "2e-05"]


def test_lists_in_a_sentence() -> None:
    assert [text.listed("abc"[:count]) for count in range(4)] == ["", "a", "a and b", "a, b and c"]
    assert text.listed(["a", "b"], "or") == "a or b"
    assert (text.first_few("abc"), text.first_few("abcd")) == ("a, b, c", "a, b, c and 1 more")


def test_near_names() -> None:
    assert text.did_you_mean("modle", ["model", "task"]) == "did you mean 'model'?"
    assert text.did_you_mean("x", ["model", "task"]) == ""
    assert text.near_names("lora", ["full", "loras", "loha", "lora-r8"], most=2) == ["loras", "loha"]
