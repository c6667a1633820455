"""Languages of the texts of each column, by py3langid 0.4, and rows in one that hardly any other row is in."""

from __future__ import annotations

import importlib.util
import re
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

from fulltune.audit.texts.flaw import listed
from fulltune.data.running_text import columns_with_text, whole_texts
from fulltune.errors import SetupError
from fulltune.records.audit import Languages
from fulltune.records.data import SplitName
from fulltune.tasks import Row

SURE = 0.95
"""Probability from which a text is said to be in another language."""
LEAST_BYTES = 20
"""Bytes of letters in UTF-8 that tell a language: 20 Latin letters, 10 Cyrillic ones, 7 Chinese signs."""
_FIRST_LOOK, _SECOND_LOOK = 200, 1000
"""Characters that are looked at, half of them at the text's beginning and half at its end."""

_SAME = {
    **{"pcm": "en", "yue": "zh", "wuu": "zh", "ary": "ar", "arz": "ar", "nn": "no", "hbo": "he", "grc": "el"},
    **{"ltg": "lv", "an": "es", "ext": "es"},
}
"""Varieties that are not told apart from the language in short texts: `How do I get a pin` is no Pidgin."""
_FAMILIES = (
    *("es pt gl ca oc", "no da sv", "ru uk be bg mk sr hr bs sl", "cs sk", "id ms jv", "hi mr ne gom sa", "nl af fy"),
    *("de lb", "it vec lij", "bn as", "tr az crh", "kk ky tt ba", "is fo", "fa uzs ps"),
)
"""Languages among which a short text's probability is spread: that it is one of them may be sure, which one is not."""
_CLOSE = {code: frozenset(family.split()) for family in _FAMILIES for code in family.split()}

_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]+`", re.DOTALL)
_ASIDE = re.compile(
    r"\w+://\S+|www\.\S+|\S+@\S*|[@#]\w+|&\w+;|<[^<>]{1,200}>|[!-~]*[\d_/\\{}()\[\]=<>|~^][!-~]*|[a-z]+[A-Z]\w*"
    r"|(?a:\w+\.\w[\w.]*)"
)
"""Addresses, names of users, tags, numbers, formulas, and names in programs: of no language."""
_LETTERS = re.compile(r"[^\W\d_]+")


@dataclass(frozen=True)
class Spoken:
    """The likeliest language of a text."""

    language: str
    """ISO 639 code."""
    confidence: float
    """Probability that it is this one or one close to it."""


@cache
def knows_languages() -> bool:
    """Whether py3langid is installed."""
    return importlib.util.find_spec("py3langid") is not None


@cache
def _identifier() -> Any:
    """Loaded once a process, when the first text is looked at."""
    if not knows_languages():
        raise SetupError("telling languages needs the package 'py3langid'; pip install 'fulltune[languages]'")
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def spoken(text: str) -> Spoken | None:
    """The likeliest language of a text, by its beginning and its end; None: it has too few words that are of any."""
    words = _words(text, _FIRST_LOOK)
    return _likeliest(words, ()) if _num_bytes(words) >= LEAST_BYTES else None


def elsewhere(text: str, main: Collection[str]) -> Spoken | None:
    """The language of a text if both halves and its uncapitalised words are likelier in it than in its column's."""
    words = _words(text, _SECOND_LOOK).split()
    found = _likeliest(" ".join(words), main) if words else None
    if found is None or found.language in main or found.confidence < SURE:
        return None
    if " ".join(words).isupper():
        words = " ".join(words).lower().split()
    half, plain = len(words) // 2, [word for word in words if word == word.lower()]
    if 2 * _num_bytes(" ".join(plain)) < LEAST_BYTES:
        return None
    parts = [plain, words[:half], words[half:]] if half else [plain]
    others = [_likeliest(" ".join(part), main) for part in parts]
    return found if all(other is not None and other.language not in main for other in others) else None


def _words(text: str, most_characters: int) -> str:
    """What of a text is of a language, on one line."""
    if "`" in text:
        text = _CODE.sub(" ", text)
    if len(text) > 2 * most_characters:
        # What is put aside is seldom more than half of a text.
        text = f"{text[:most_characters]} {text[-most_characters:]}"
    words = " ".join(_ASIDE.sub(" ", text).split())
    if len(words) > most_characters:
        half = most_characters // 2
        words = f"{words[:half].rpartition(' ')[0] or words[:half]} {words[-half:].partition(' ')[2] or words[-half:]}"
    return words


def _num_bytes(words: str) -> int:
    return sum(len(letters.encode("utf-8", "replace")) for letters in _LETTERS.findall(words))


def _likeliest(words: str, main: Collection[str]) -> Spoken | None:
    """The likeliest language, with the probability of it and those close to it but for the main ones."""
    shares: dict[str, float] = {}
    for code, share in _identifier().rank(words):
        shares[_SAME.get(code, code)] = shares.get(_SAME.get(code, code), 0.0) + share
    best = max(shares, key=lambda code: shares[code])
    # What is no language has a class of its own.
    if best == "zxx":
        return None
    close = _CLOSE.get(best, frozenset()) - set(main) | {best}
    return Spoken(best, sum(shares.get(code, 0.0) for code in close))


def name_of(code: str) -> str:
    """`German` for `de`; a code without a name here stands for itself."""
    return _NAMES.get(code, code)


_NAMES = dict(
    re.findall(
        r"(\w+) ([^|]+)",
        "ace Acehnese|af Afrikaans|am Amharic|ar Arabic|as Assamese|az Azerbaijani|ba Bashkir|bcl Central Bikol|"
        "be Belarusian|bg Bulgarian|bn Bengali|br Breton|bs Bosnian|ca Catalan|crh Crimean Tatar|cs Czech|cy Welsh|"
        "da Danish|de German|dz Dzongkha|el Greek|en English|eo Esperanto|es Spanish|et Estonian|eu Basque|"
        "fa Persian|fi Finnish|fo Faroese|fr French|fuv Fulfulde|fy Frisian|ga Irish|gd Scottish Gaelic|gl Galician|"
        "gn Guarani|gom Konkani|gu Gujarati|gug Guarani|ha Hausa|he Hebrew|hi Hindi|hr Croatian|ht Haitian Creole|"
        "hu Hungarian|hy Armenian|id Indonesian|ig Igbo|is Icelandic|it Italian|ja Japanese|jv Javanese|ka Georgian|"
        "kab Kabyle|kik Kikuyu|kk Kazakh|km Khmer|kn Kannada|ko Korean|ku Kurdish|ky Kyrgyz|la Latin|"
        "lb Luxembourgish|lg Ganda|lij Ligurian|ln Lingala|lo Lao|lt Lithuanian|lv Latvian|mg Malagasy|mk Macedonian|"
        "ml Malayalam|mn Mongolian|mr Marathi|ms Malay|mt Maltese|my Burmese|ne Nepali|nl Dutch|no Norwegian|"
        "nso Northern Sotho|oc Occitan|om Oromo|or Odia|pa Punjabi|pl Polish|ps Pashto|pt Portuguese|qu Quechua|"
        "ro Romanian|ru Russian|rw Kinyarwanda|sa Sanskrit|sdh Southern Kurdish|se Northern Sami|si Sinhala|"
        "sk Slovak|sl Slovenian|sn Shona|so Somali|sq Albanian|sr Serbian|st Sotho|sv Swedish|sw Swahili|ta Tamil|"
        "te Telugu|tg Tajik|th Thai|tk Turkmen|tl Tagalog|tr Turkish|tt Tatar|ug Uyghur|uk Ukrainian|ur Urdu|"
        "uz Uzbek|uzs Southern Uzbek|vec Venetian|vi Vietnamese|vo Volapük|wa Walloon|xh Xhosa|yo Yoruba|zh Chinese|"
        "zu Zulu",
    )
)

OTHER_LANGUAGE = "other language"
_KNOWN = 0.5
"""Probability from which a text counts as one in a language."""
MAIN = 0.05
"""Share of a column's texts from which a language is one of its own: mixed data is no fault."""
NEARLY_ALL = 0.9
"""Share of a column's texts that is in its own languages, for the rest to stand out."""
LEAST_ROWS = 20


@dataclass(frozen=True)
class Stranger:
    """A row that is in another language than nearly all others of a column."""

    split: SplitName
    row: Row
    column: str
    reason: str
    confidence: float


@dataclass
class Heard:
    """The languages of a column's texts, row by row."""

    numbers: array[int] = field(default_factory=lambda: array("h"))
    """Of each row's language in `codes`; -1: not known. All splits, one after the other."""
    confidences: array[float] = field(default_factory=lambda: array("f"))
    codes: dict[str, int] = field(default_factory=dict)
    ends: dict[SplitName, int] = field(default_factory=dict)
    """Split to the number of rows up to its last one."""

    def add(self, text: str, split: SplitName) -> None:
        """The next row's text."""
        found = spoken(text)
        is_known = found is not None and found.confidence >= _KNOWN
        self.numbers.append(self.codes.setdefault(found.language, len(self.codes)) if found and is_known else -1)
        self.confidences.append(found.confidence if found else 0.0)
        self.ends[split] = len(self.numbers)

    def counts(self) -> Counter[str]:
        """Languages of the rows in which one is known, the most frequent first."""
        return self._of(np.frombuffer(self.numbers, np.int16))

    def own(self) -> set[str]:
        """Languages of enough rows to be the column's own."""
        counts = self.counts()
        return {code for code, count in counts.items() if count >= MAIN * counts.total()}

    def why_not(self) -> str | None:
        """Why no row can stand out; None: rows can."""
        counts = self.counts()
        if counts.total() < LEAST_ROWS:
            return f"fewer than {LEAST_ROWS} texts are long enough to tell their language"
        if sum(counts[code] for code in self.own()) < NEARLY_ALL * counts.total():
            return f"its texts are in {len(counts)} languages, and no few of them are those of nearly all"
        return None

    def suspects(self) -> np.ndarray:
        """Positions of rows that seem to be in none of the column's own languages."""
        numbers, own = np.frombuffer(self.numbers, np.int16), self.own()
        others = np.isin(numbers, [number for code, number in self.codes.items() if code not in own])
        return np.flatnonzero(others & (np.frombuffer(self.confidences, np.float32) >= SURE))

    def about(self, column: str) -> Languages:
        """What is told of the column, split by split."""
        numbers, begin, own = np.frombuffer(self.numbers, np.int16), 0, self.own()
        rows: dict[SplitName, int] = {}
        counts: dict[SplitName, dict[str, int]] = {}
        for split, end in self.ends.items():
            rows[split] = end - begin
            counts[split] = {name_of(code): count for code, count in self._of(numbers[begin:end]).most_common()}
            begin = end
        main = tuple(name_of(code) for code, _ in self.counts().most_common() if code in own)
        return Languages(column=column, main=main, rows=rows, counts=counts)

    def _of(self, numbers: np.ndarray) -> Counter[str]:
        counts = np.bincount(numbers[numbers >= 0], minlength=len(self.codes))
        return Counter({code: int(counts[number]) for code, number in self.codes.items() if counts[number]})


def listen(heard: dict[str, Heard], row: Row, columns: Mapping[str, str], split: SplitName) -> None:
    """Take in the languages of a row's texts, by column; without the extra there is nothing to take in."""
    if not knows_languages():
        return
    texts = whole_texts(row, columns)
    for column in columns_with_text(columns):
        heard.setdefault(column, Heard()).add(texts.get(column, ""), split)


def not_told(heard: Mapping[str, Heard]) -> str | None:
    """Why rows of some columns cannot stand out, by column; None: those of all can."""
    if not knows_languages():
        return "needs the extra 'languages'"
    why = {column: one.why_not() for column, one in heard.items()}
    return "; ".join(f"column '{column}': {said}" for column, said in why.items() if said) or None


def strangers(
    heard: Mapping[str, Heard], columns: Mapping[str, str], rows: Callable[[SplitName], Iterator[Row]]
) -> Iterator[Stranger]:
    """Rows that are surely in another language than nearly all others of their column; `rows` gives them once more."""
    judged = {column: one for column, one in heard.items() if one.why_not() is None}
    suspects = {column: set(one.suspects().tolist()) for column, one in judged.items()}
    if not any(suspects.values()):
        return
    own = {column: judged[column].own() for column in suspects}
    shares = {column: judged[column].about(column) for column in suspects}
    position = 0
    for split in next(iter(heard.values())).ends:
        for row in rows(split):
            for column, text in whole_texts(row, columns).items():
                if position in suspects.get(column, ()) and (found := elsewhere(text, own[column])) is not None:
                    main = listed(list(shares[column].main))
                    reason = f"{name_of(found.language)}, where nearly all rows are {main}"
                    yield Stranger(split, row, column, reason, found.confidence)
            position += 1
