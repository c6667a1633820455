"""Texts in another language are found, names, terms and code are spared; which rows stand out follows from all rows."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from fulltune.audit import languages
from fulltune.audit.languages import MIN_PROBABILITY, OTHER_LANGUAGE, ColumnLanguages
from fulltune.report.run.data_page import _describe_languages
from tests.unit.audit.test_stage import CLEAN, audited, prepared
from tests.unit.audit.test_texts import TEXTS

needs_extra = pytest.mark.skipif(
    importlib.util.find_spec("py3langid") is None, reason="the extra languages is not installed"
)

FOUND: dict[str, str] = TEXTS["languages"]
SPARED: list[str] = TEXTS["no_other_language"]["texts"]


def stands_out(text: str, *main: str) -> str | None:
    """The language of a text that is listed in a column of these."""
    first = languages.detect_language(text)
    if first is None or first[0] in main or first[1] < MIN_PROBABILITY:
        return None
    language = languages.detect_foreign_language(text, main)
    return language[0] if language else None


@needs_extra
@pytest.mark.parametrize("code", FOUND)
def test_text_in_another_language_is_found_and_named(code: str) -> None:
    assert stands_out(FOUND[code], "en") == code
    assert stands_out(FOUND[code], code) is None


@needs_extra
@pytest.mark.parametrize("main", FOUND)
def test_english_text_is_found_among_others(main: str) -> None:
    assert stands_out("I cannot log in to my account since I have a new phone.", main) == "en"


@needs_extra
@pytest.mark.parametrize("text", SPARED)
def test_text_that_only_looks_foreign_is_spared(text: str) -> None:
    assert stands_out(text, "en") is None


@needs_extra
def test_of_long_texts_more_than_the_beginning_counts() -> None:
    quoted = f"{FOUND['de']} {FOUND['de']} {FOUND['de']} " + "This is how the customer put it, and we could help. " * 8
    assert stands_out(quoted, "en") is None
    assert stands_out(" ".join([FOUND["de"]] * 100), "en") == "de"


class Ranks:
    """An identifier that gives any text the same probabilities."""

    def __init__(self, **shares: float) -> None:
        self.shares = shares

    def rank(self, text: str) -> list[tuple[str, float]]:
        return list(self.shares.items())


@pytest.mark.parametrize(
    ("shares", "main", "expected"),
    [
        # Spread among close languages: it is one of them.
        ({"es": 0.5, "gl": 0.3, "pt": 0.17, "en": 0.03}, {"en"}, ("es", 0.97)),
        # What is the column's own language does not speak against it.
        ({"gl": 0.5, "es": 0.3, "pt": 0.17, "en": 0.03}, {"es"}, None),
        ({"gl": 0.8, "pt": 0.17, "es": 0.03}, {"es"}, ("gl", 0.97)),
        # Varieties are the language itself.
        ({"pcm": 0.98, "de": 0.02}, {"en"}, None),
        ({"zh": 0.4, "wuu": 0.3, "yue": 0.27, "en": 0.03}, {"en"}, ("zh", 0.97)),
        ({"de": 0.9, "en": 0.1}, {"en"}, None),
        ({"zxx": 1.0}, {"en"}, None),
    ],
)
def test_probability_is_that_of_close_languages_but_for_the_column_s_own(
    monkeypatch: pytest.MonkeyPatch, shares: dict[str, float], main: set[str], expected: tuple[str, float] | None
) -> None:
    monkeypatch.setattr(languages, "_load_identifier", lambda: Ranks(**shares))
    language = languages.detect_foreign_language("some words that are long enough to tell", main)
    assert (language and (language[0], round(language[1], 2))) == expected


@needs_extra
def test_close_language_is_found_in_a_longer_text() -> None:
    assert stands_out(FOUND["pt"], "es") == "pt"


# ---- columns ------------------------------------------------------------------------------------------------------


@pytest.fixture
def by_first_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text `de …` is German, `de? …` may be, and `- …` is in no language."""

    def first_look(text: str) -> tuple[str, float] | None:
        code, confidence = text.split()[0].rstrip("?"), 0.6 if "?" in text else 0.99
        return None if code == "-" else (code, confidence)

    monkeypatch.setattr(languages, "detect_language", first_look)
    monkeypatch.setattr(languages, "is_installed", lambda package: True)


@pytest.mark.usefixtures("by_first_word")
@pytest.mark.parametrize(
    ("texts", "suspects", "why"),
    [
        (["en a"] * 99 + ["de b"], {99}, None),
        (["en a"] * 99 + ["de? b"], set(), None),
        # Mixed data: 5 % are a language of the column's own.
        (["en a"] * 95 + ["de b"] * 5, set(), None),
        (["en a"] * 96 + ["de b"] * 4, {96, 97, 98, 99}, None),
        (["en a"] * 60 + ["de b"] * 39 + ["fr c"], {99}, None),
        # Rows without a language count for nothing.
        (["en a"] * 19 + ["- 1"] * 80 + ["de b"], set(), None),
        (["en a"] * 18 + ["- 1"] * 80 + ["de b"], set(), "fewer than 20 texts"),
        # Data in very many languages: nothing stands out.
        (["en a"] * 60 + [f"l{n} b" for n in range(40)], set(), "its texts are in 41 languages"),
    ],
)
def test_rows_in_a_language_that_hardly_any_other_is_in_stand_out(
    texts: list[str], suspects: set[int], why: str | None
) -> None:
    heard: dict[str, ColumnLanguages] = {}
    for text in texts:
        languages.add_languages(heard, {"text": text}, {"text": "text"})
    assert heard["text"].suspects() == suspects
    obstacle = languages.why_languages_unchecked(heard)
    assert (obstacle is None) == (why is None)
    assert why is None or f"column 'text': {why}" in (obstacle or "")


def test_shares_of_languages_are_said_with_what_is_in_none() -> None:
    sentence = _describe_languages(
        "text", {"en": 60, "de": 20, "fr": 10, "es": 2, "it": 2, "pt": 1, "nl": 1, "sv": 1}, 100
    )
    assert "en 60.0%, de 20.0%, fr 10.0%" in sentence
    assert "2 others 2.0%; undetermined 3.0%" in sentence


def test_without_the_extra_nothing_is_looked_at_and_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(languages, "is_installed", lambda package: False)
    result, _ = audited(tmp_path, prepared(tmp_path, CLEAN))
    assert result.not_run[OTHER_LANGUAGE] == "needs the extra 'languages'"
    assert OTHER_LANGUAGE not in result.clean
    assert result.languages == {}


def test_row_in_another_language_is_listed_by_the_audit(tmp_path: Path) -> None:
    pytest.importorskip("py3langid", reason="the extra languages is not installed")
    german = {"text": "Ich habe meine Karte verloren und weiß nicht weiter.", "label": CLEAN[0]["label"]}
    rows = [{**row, "text": f"Could you please tell me more about {row['text']}?"} for row in CLEAN] + [german]
    result, issues = audited(tmp_path, prepared(tmp_path, rows))
    [one] = issues[OTHER_LANGUAGE]
    assert one.place.endswith(f":{len(rows)}")
    assert one.reason == "column 'text': de, but nearly all rows are en"
    assert one.remedy.action == "drop"
    assert one.score > 0.95
    assert next(iter(result.languages["text"])) == "en"
    assert result.languages["text"]["de"] == 1
