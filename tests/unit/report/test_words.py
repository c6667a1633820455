"""Numbers and foreign text in words, as tables."""

from __future__ import annotations

import math

import pytest

from fulltune.records.scores import Calibration
from fulltune.report.format import words
from fulltune.report.run.about_scores import calibration_in_words


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 s"), (0.4217, "0.422 s"), (12.3, "12 s"), (59.7, "1 min 0 s"), (83, "1 min 23 s"),
        (3599.8, "1 h 0 min"), (7500, "2 h 5 min"), (86399, "1 d 0 h"), (273_600, "3 d 4 h"), (math.nan, "not finite"),
    ],
)  # fmt: skip
def test_duration_any_length_uses_two_units(seconds: float, text: str) -> None:
    assert words.duration(seconds) == text


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 bytes"), (1, "1 byte"), (2048, "2 KiB"), (90_852_864, "86.6 MiB"), (80 * 2**30, "80 GiB")],
)
def test_size_any_number_of_bytes_uses_binary_units(num_bytes: int, text: str) -> None:
    assert words.size(num_bytes) == text


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("accuracy", 0.92149, "92.1%"), ("f1_macro", 1.0, "100.0%"), ("exact_match", 0, "0.0%"),
        ("loss", 1.23456, "1.23"),
        ("perplexity", 12345.6, "12,346"), ("mse", 0.000012345, "1.23e-05"), ("loss", math.inf, "not finite"),
        ("accuracy", math.nan, "not finite"),
    ],
)  # fmt: skip
def test_metric_by_name_is_percent_or_three_digits(name: str, value: float, text: str) -> None:
    assert words.metric(name, value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0.0%"), (1e-6, "<0.1%"), (0.5, "50.0%"), (0.99999, ">99.9%"), (1, "100.0%")]
)
def test_share_almost_all_or_nothing_is_not_rounded_away(value: float, text: str) -> None:
    assert words.share(value) == text


def test_harmless_control_and_direction_marks_are_shown_by_code() -> None:
    assert words.harmless("a\x1b[31m\x00\u202eb\r\nc\td é 😀👩\u200d🔬 שלום") == (
        "a⟨U+001B⟩[31m⟨U+0000⟩⟨U+202E⟩b\nc\td é 😀👩\u200d🔬 שלום"
    )


@pytest.mark.parametrize(
    ("place", "text"),
    [
        ("org/model", "org/model"), ("/srv/models/m", "m"), ("~/m", "m"), ("C:\\data\\my files\\a.csv", "a.csv"),
        ("data/a.csv", "a.csv"), ("package:name/model", "package:name/model"),
    ],
)  # fmt: skip
def test_file_name_local_places_lose_their_folders(place: str, text: str) -> None:
    assert words.file_name(place) == text


@pytest.mark.parametrize(
    ("temperature", "said"),
    [
        (1.5, "is overconfident: it is right less often than its probabilities say"),
        (0.5, "is underconfident: it is right more often than its probabilities say"),
        (1.0, "is right about as often as its probabilities say"),
    ],
)
def test_calibration_is_said_in_the_field_s_words(temperature: float, said: str) -> None:
    found = Calibration(temperature=temperature, expected_calibration_error=0.2, expected_calibration_error_scaled=0.1)
    assert said in calibration_in_words(found)


@pytest.mark.parametrize(
    ("number", "text"), [(1, "1st"), (2, "2nd"), (3, "3rd"), (4, "4th"), (11, "11th"), (22, "22nd")]
)
def test_ordinal_has_its_ending(number: int, text: str) -> None:
    assert words.ordinal(number) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("one two three", "one two … (6 more characters)"),
        ("one two", "one two"),
        ("one twothr four", "one twothr … (5 more characters)"),
        ("一二三四五六七八九十百千", "一二三四五六七八九十 … (2 more characters)"),
        ("a twothreefour", "a twothree … (4 more characters)"),
    ],
)
def test_long_texts_are_cut_at_the_end_of_a_word(text: str, shown: str) -> None:
    assert words.clipped(text, 10) == shown
