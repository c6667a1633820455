"""Texts in another language are found, names, terms and code are spared; which rows stand out follows from all rows."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from fulltune.audit import languages
from fulltune.audit.languages import OTHER_LANGUAGE, SURE, Heard, Spoken, elsewhere, listen, not_told, spoken, strangers
from fulltune.errors import SetupError
from fulltune.records.data import SplitName
from fulltune.report.run.data_page import _languages
from fulltune.tasks import Row
from tests.unit.audit.test_stage import CLEAN, audited, prepared

needs_extra = pytest.mark.skipif(
    importlib.util.find_spec("py3langid") is None, reason="the extra languages is not installed"
)

FOUND = {
    "de": "Ich habe meine Karte verloren und weiß nicht, was ich jetzt tun soll.",
    "fr": "Pouvez-vous me dire pourquoi ma carte n'est pas encore arrivée ?",
    "es": "No puedo entrar en mi cuenta desde que cambié de teléfono.",
    "pt": "Não consigo entrar na minha conta desde que troquei de telemóvel.",
    "it": "Non riesco più a entrare nel mio conto da quando ho cambiato telefono.",
    "nl": "Ik kan niet meer inloggen sinds ik een nieuwe telefoon heb.",
    "pl": "Nie mogę zalogować się na swoje konto od wczoraj wieczorem.",
    "sv": "Jag kan inte logga in sedan jag bytte telefon i går.",
    "fi": "En pääse kirjautumaan tililleni uudella puhelimella.",
    "tr": "Yeni telefonumla hesabıma giriş yapamıyorum, lütfen yardım edin.",
    "ru": "Я не могу войти в свой аккаунт с нового телефона.",
    "uk": "Я не можу увійти до свого облікового запису з нового телефону.",
    "el": "Δεν μπορώ να συνδεθώ στον λογαριασμό μου από χθες.",
    "ar": "لا أستطيع الدخول إلى حسابي منذ يوم أمس",
    "he": "אני לא מצליח להיכנס לחשבון שלי מאז אתמול",
    "hi": "मैं कल से अपने खाते में प्रवेश नहीं कर पा रहा हूँ",
    "zh": "我换了手机以后就无法登录我的账户",
    "ja": "昨日から自分のアカウントにログインできません",
    "ko": "어제부터 제 계정에 로그인할 수 없습니다",
    "th": "ฉันไม่สามารถเข้าสู่ระบบบัญชีของฉันได้ตั้งแต่เมื่อวาน",
    "vi": "Tôi không thể đăng nhập vào tài khoản của mình từ hôm qua.",
}

SPARED = [
    # Too short to tell.
    "",
    "ich",
    "merci beaucoup",
    "Привет",
    "42",
    # Names.
    "Jean-Pierre Dubois, François Lefèvre, Marie-Claire Durand and Benoît Martin",
    "Hans-Jürgen Müller, Friedrich Schmidt, Jürgen Klopp, Thomas Müller",
    "Deutsche Bank AG, Frankfurt am Main, Große Gallusstraße",
    "Champs-Élysées, Arc de Triomphe, Musée d'Orsay, Notre-Dame",
    "London Paris Berlin Madrid Rome Vienna Amsterdam Brussels",
    # Terms.
    "staphylococcus aureus, escherichia coli, pseudomonas aeruginosa, klebsiella pneumoniae",
    "mens rea actus reus habeas corpus pro bono",
    "pizza margherita extra mozzarella large",
    "The trees are quercus robur and betula pendula, as far as I can see.",
    # Quotations, and texts about a languages.
    'He said "c\'est la vie" and left the room without another word',
    'The German translation of this sentence is "Der Hund ist sehr schnell gelaufen"',
    "The word Schadenfreude comes from German and means pleasure at harm",
    # Code, addresses, tags.
    "for (int i = 0; i < n; i++) { sum += values[i]; } return sum;",
    "SELECT name, count(*) FROM customers WHERE country = 'DE' GROUP BY name",
    "sudo apt-get update && sudo apt-get install build-essential",
    "`ich_habe_meine_karte = verloren` and ```print(das, ist, kein, text, in, einer, sprache)```",
    "https://www.lemonde.fr/politique/article/2024/05/01/le-president-de-la-republique",
    "@jean_dupont @marie_durand merci #paris #amour",
    "TypeError: unsupported operand type(s) for +: 'int' and 'str'",
    '{"name": "foo", "version": "1.0.0", "private": true}',
    "\\frac{\\partial u}{\\partial t} = \\alpha \\nabla^2 u",
    # How people write.
    "lol omg haha yesss brb ttyl xoxo",
    "hahahahahahahaha hahahaha hahaha",
    "i dnt knw wat 2 do n y u r lik dis",
    "we dey go market how you dey my broda",
    "how do i get a pin for my card",
    "WHY IS MY CARD NOT WORKING SINCE YESTERDAY",
    "thou art more lovely and more temperate",
    # No languages.
    "ATGCGTACGTTAGCATCGATCGATCGGATCGATCG",
    "qwertyuiop asdfghjkl zxcvbnm qwerty",
    "REF NO AB-CD-EF-GH TOTAL EUR SEPA TRANSFER",
]


def stands_out(text: str, *main: str) -> str | None:
    """The language of a text that is listed in a column of these."""
    first = spoken(text)
    if first is None or first.language in main or first.confidence < SURE:
        return None
    found = elsewhere(text, main)
    return found.language if found else None


@needs_extra
@pytest.mark.parametrize("code", FOUND)
def test_text_in_another_language_is_found_and_named(code: str) -> None:
    assert stands_out(FOUND[code], "en") == code
    assert stands_out(FOUND[code], code) is None
    assert languages.name_of(code) != code


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
    ("shares", "main", "found"),
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
    monkeypatch: pytest.MonkeyPatch, shares: dict[str, float], main: set[str], found: tuple[str, float] | None
) -> None:
    monkeypatch.setattr(languages, "_identifier", lambda: Ranks(**shares))
    said = elsewhere("some words that are long enough to tell", main)
    assert (said and (said.language, round(said.confidence, 2))) == found


@needs_extra
def test_close_language_is_found_in_a_longer_text() -> None:
    assert stands_out(FOUND["pt"], "es") == "pt"


def test_no_language_has_two_families_and_each_member_has_a_name() -> None:
    assert len(languages._CLOSE) == sum(len(family.split()) for family in languages._FAMILIES)
    assert {*languages._CLOSE, *languages._SAME.values()} <= set(languages._NAMES)
    assert not set(languages._SAME) & set(languages._CLOSE)


@needs_extra
def test_every_language_of_the_library_that_can_be_named_has_a_name() -> None:
    unnamed = set(languages._identifier().labels) - set(languages._NAMES) - set(languages._SAME) - {"zxx", "srl"}
    assert unnamed <= {"gcf", "gcr", "guw"}


def test_missing_package_is_told_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(languages, "knows_languages", lambda: False)
    languages._identifier.cache_clear()
    with pytest.raises(SetupError, match=r"pip install 'fulltune\[languages\]'"):
        spoken("A text that is long enough to be looked at.")


# ---- columns ------------------------------------------------------------------------------------------------------

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
