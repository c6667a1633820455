"""Numbers and untrusted text in words, as tables."""

from __future__ import annotations

import pytest

from fulltune.records.scores import Calibration
from fulltune.report.format import words
from fulltune.report.run.about_scores import describe_calibration
from tests import plans


@pytest.mark.parametrize(
    ("each_pass", "passes", "machines", "said"),
    [
        (0, 4, 1, "each of 2 processes sends 1 GiB per step (fsdp2)"),
        (2**30, 3, 1, "each of 2 processes sends 4 GiB per step (fsdp2; 1 GiB of this for each of 3 micro batches)"),
        (0, 1, 2, "each of 2 processes sends 1 GiB per step; each of 2 machines sends as much to the others (fsdp2)"),
    ],
)
def test_what_processes_send_is_a_line(each_pass: int, passes: int, machines: int, said: str) -> None:
    many = {"num_processes": 2, "num_machines": machines, "gradient_accumulation_steps": passes}
    made = plans.plan(**many, placement="fsdp2", sent_bytes_per_micro_batch=each_pass, sent_bytes_per_update=2**30)
    assert words.describe_traffic(made) == said
    assert words.describe_traffic(plans.plan()) is None


def test_harmless_control_and_direction_marks_are_shown_by_code() -> None:
    assert words.sanitize("a\x1b[31m\x00\u202eb\r\nc\td é 😀👩\u200d🔬 שלום") == (
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
    assert words.strip_folders(place) == text


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
    assert said in describe_calibration(found)


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
    assert words.cut_text(text, 10) == shown
