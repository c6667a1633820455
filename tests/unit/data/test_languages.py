"""Which rows stand out by their language follows from all rows of their column."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from fulltune.audit.language import Spoken
from fulltune.data import languages
from fulltune.data.languages import OTHER_LANGUAGE, Heard, listen, not_told, strangers
from fulltune.records.data import SplitName
from fulltune.report.run.data_page import _languages
from fulltune.tasks import Row
from tests.unit.data.test_audit import CLEAN, audited, prepared

Texts = dict[SplitName, list[str]]


@pytest.fixture
def by_first_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text `de …` is German, `de? …` may be, `fr"…` only at the first look, and `- …` is in no language."""

    def first_look(text: str) -> Spoken | None:
        code, confidence = text.split()[0].rstrip('?"'), 0.6 if "?" in text else 0.99
        return None if code == "-" else Spoken(code, confidence)

    def second_look(text: str, main: Sequence[str]) -> Spoken | None:
        found = first_look(text)
        return None if '"' in text or found is None or found.language in main else found

    monkeypatch.setattr(languages, "spoken", first_look)
    monkeypatch.setattr(languages, "elsewhere", second_look)
    monkeypatch.setattr(languages, "knows_languages", lambda: True)


def heard_of(texts: Texts) -> tuple[dict[str, Heard], Callable[[SplitName], Iterator[Row]]]:
    heard: dict[str, Heard] = {}

    def rows(split: SplitName) -> Iterator[Row]:
        yield from ({"text": text} for text in texts[split])

    for split in texts:
        for row in rows(split):
            listen(heard, row, {"text": "text"}, split)
    return heard, rows


@pytest.mark.usefixtures("by_first_word")
@pytest.mark.parametrize(
    ("texts", "found", "why"),
    [
        ({"train": ["en a"] * 99 + ["de b"]}, ["de b"], None),
        ({"train": ["en a"] * 99, "test": ["de b"]}, ["de b"], None),
        # The first look may be unsure, or the second say otherwise.
        ({"train": ["en a"] * 99 + ["de? b"]}, [], None),
        ({"train": ["en a"] * 99 + ['de" b']}, [], None),
        # Mixed data: 5 % are a language of the column's own, whether they are spread or a split of their own.
        ({"train": ["en a"] * 95 + ["de b"] * 5}, [], None),
        ({"train": ["en a"] * 95, "test": ["de b"] * 5}, [], None),
        ({"train": ["en a"] * 96 + ["de b"] * 4}, ["de b"] * 4, None),
        ({"train": ["en a"] * 60 + ["de b"] * 39 + ["fr c"]}, ["fr c"], None),
        # Rows without a language count for nothing.
        ({"train": ["en a"] * 19 + ["- 1"] * 80 + ["de b"]}, [], None),
        ({"train": ["en a"] * 18 + ["- 1"] * 80 + ["de b"]}, [], "fewer than 20 texts"),
        # Data in very many languages: nothing stands out.
        (
            {"train": ["en a"] * 60 + [f"l{n} b" for n in range(40)]},
            [],
            "its texts are in 41 languages",
        ),
        ({"train": ["- 1"] * 30}, [], "fewer than 20 texts"),
    ],
)
def test_rows_in_a_language_that_hardly_any_other_is_in_stand_out(
    texts: Texts, found: list[str], why: str | None
) -> None:
    heard, rows = heard_of(texts)
    assert [one.row["text"] for one in strangers(heard, {"text": "text"}, rows)] == found
    said = not_told(heard)
    assert (said is None) == (why is None)
    assert why is None or f"column 'text': {why}" in (said or "")


@pytest.mark.usefixtures("by_first_word")
def test_shares_are_told_by_split_with_what_is_in_no_language() -> None:
    heard, _ = heard_of({"train": ["en a"] * 6 + ["de b"] * 2 + ["- 1"] * 2, "eval": [], "test": ["fr c"] * 3})
    about = heard["text"].about("text")
    assert about.main == ("English", "French", "German")
    assert about.rows == {"train": 10, "test": 3}
    assert about.counts == {"train": {"English": 6, "German": 2}, "test": {"French": 3}}
    table = _languages(about)
    assert table.header == ("language", "train", "test")
    assert {str(line[0]): [str(cell) for cell in line[1:]] for line in table.rows} == {
        "English": ["60.0%", "0.0%"],
        "French": ["0.0%", "100.0%"],
        "German": ["20.0%", "0.0%"],
        "too short to tell, or none": ["20.0%", "0.0%"],
    }


@pytest.mark.usefixtures("by_first_word")
def test_each_column_has_languages_of_its_own() -> None:
    heard: dict[str, Heard] = {}
    pairs: list[Row] = [{"a": "en x", "b": "de y"}] * 98 + [{"a": "de x", "b": "de y"}, {"a": "en x", "b": "en y"}]
    columns = {"source": "a", "target": "b"}
    for row in pairs:
        listen(heard, row, columns, "train")
    found = [(one.row, one.column, one.reason) for one in strangers(heard, columns, lambda split: iter(pairs))]
    assert found == [
        (pairs[98], "a", "German, where nearly all rows are English"),
        (pairs[99], "b", "English, where nearly all rows are German"),
    ]


def test_without_the_extra_nothing_is_looked_at_and_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(languages, "knows_languages", lambda: False)
    found, _ = audited(tmp_path, prepared(tmp_path, CLEAN))
    assert found.not_run[OTHER_LANGUAGE] == "needs the extra 'languages'"
    assert OTHER_LANGUAGE not in found.clean
    assert found.languages == ()


def test_row_in_another_language_is_listed_by_the_audit(tmp_path: Path) -> None:
    pytest.importorskip("py3langid", reason="the extra languages is not installed")
    german = {"text": "Ich habe meine Karte verloren und weiß nicht weiter.", "label": CLEAN[0]["label"]}
    rows = [{**row, "text": f"Could you please tell me more about {row['text']}?"} for row in CLEAN] + [german]
    found, issues = audited(tmp_path, prepared(tmp_path, rows))
    [one] = issues[OTHER_LANGUAGE]
    assert one.place.endswith(f":{len(rows)}")
    assert one.reason == "column 'text': German, where nearly all rows are English"
    assert one.remedy.action == "drop"
    assert one.score > 0.95
    [about] = found.languages
    assert about.main == ("English",)
    assert sum(counts.get("German", 0) for counts in about.counts.values()) == 1
