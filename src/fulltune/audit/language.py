"""In which language a text is, and whether that is another one than those that its column is in.

By py3langid 0.4 (extra `languages`; naive Bayes over byte sequences, 139 languages, a 4.6 MB wheel that needs numpy
alone). Compared with lingua 2.1 on 2,000 translated messages of programs from 51 catalogues, cut to their first
words, on one slow core:

| | 5 words right | 10 words | 20 words | of those with 0.9 and more, 10 words | a text of 10 words | to load |
|---|---|---|---|---|---|---|
| py3langid | 93 % | 98 % | 99 % | 77 % of all, 99.9 % right | 0.2 ms | 1 s, 0.2 GB |
| lingua (96 MB wheel) | 92 % | 98 % | 99 % | 69 % of all, 99.8 % right | 5.4 ms | 29 s, 1.3 GB |
| lingua, low accuracy | 83 % | 95 % | 98 % | 89 % of all, 98.0 % right | 1.6 ms | 2 s, 0.2 GB |

So the large one is no better at what is asked here, and 27 times as slow. What must not happen is a false alarm: names,
terms, menus and quotations look like another language to either. Hence the two looks, `spoken` and `elsewhere`; of the
rows of five English data sets (58,000: questions, sums, tweets, sentences, verse) they list 77, and 75 of these are in
another language. Of messages of 5, 10 and 20 words among English ones 79, 98 and 99 % are listed, of 3 words 41 %. A
sentence takes 0.1 ms: less than in the table, where all languages were sorted.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from typing import Any

from fulltune.errors import SetupError

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
    """Loaded once a process, when the first text is looked at.

    Raises:
        SetupError: When py3langid is not installed.
    """
    if not knows_languages():
        raise SetupError("telling languages needs the package 'py3langid'; pip install 'fulltune[languages]'")
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def spoken(text: str) -> Spoken | None:
    """The likeliest language of a text; None: it has too few words that are of any.

    Args:
        text: Of a long one the beginning and the end are looked at.

    Raises:
        SetupError: When py3langid is not installed.
    """
    words = _words(text, _FIRST_LOOK)
    return _likeliest(words, ()) if _num_bytes(words) >= LEAST_BYTES else None


def elsewhere(text: str, main: Collection[str]) -> Spoken | None:
    """The language of a text if it is surely none of its column's.

    More of the text is looked at than by `spoken`. Each of its halves is likelier in another language (else it may be a
    quotation), and so are its words without a capital letter (else it may be names).

    Args:
        text: Whose likeliest language is none of these.
        main: Codes of the column's languages.

    Raises:
        SetupError: When py3langid is not installed.
    """
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
    languages, places, further = _languages()
    # Not `rank`, which takes as long again to sort all languages.
    shares: list[float] = _identifier()._decide(words).tolist()
    for place, first in further:
        shares[first] += shares[place]
        shares[place] = 0.0
    best = languages[shares.index(max(shares))]
    # What is no language has a class of its own.
    if best == "zxx":
        return None
    close = _CLOSE.get(best, frozenset()) - set(main) | {best}
    return Spoken(best, sum(shares[places[code]] for code in close if code in places))


@cache
def _languages() -> tuple[list[str], dict[str, int], list[tuple[int, int]]]:
    """The language of each class of the identifier; of each language its first class; its further ones with that."""
    languages = [_SAME.get(code, code) for code in _identifier().nb_classes]
    places: dict[str, int] = {}
    for place, code in enumerate(languages):
        places.setdefault(code, place)
    further = [(place, places[code]) for place, code in enumerate(languages) if places[code] != place]
    return languages, places, further


def name_of(code: str) -> str:
    """`German` for `de`; a code without a name here stands for itself."""
    return _NAMES.get(code, code)


_NAMES = {
    **{"ace": "Acehnese", "af": "Afrikaans", "am": "Amharic", "ar": "Arabic", "as": "Assamese", "az": "Azerbaijani"},
    **{"ba": "Bashkir", "bcl": "Central Bikol", "be": "Belarusian", "bg": "Bulgarian", "bn": "Bengali", "br": "Breton"},
    **{"bs": "Bosnian", "ca": "Catalan", "crh": "Crimean Tatar", "cs": "Czech", "cy": "Welsh", "da": "Danish"},
    **{"de": "German", "dz": "Dzongkha", "el": "Greek", "en": "English", "eo": "Esperanto", "es": "Spanish"},
    **{"et": "Estonian", "eu": "Basque", "fa": "Persian", "fi": "Finnish", "fo": "Faroese", "fr": "French"},
    **{"fuv": "Fulfulde", "fy": "Frisian", "ga": "Irish", "gd": "Scottish Gaelic", "gl": "Galician", "gn": "Guarani"},
    **{"gom": "Konkani", "gu": "Gujarati", "gug": "Guarani", "ha": "Hausa", "he": "Hebrew", "hi": "Hindi"},
    **{"hr": "Croatian", "ht": "Haitian Creole", "hu": "Hungarian", "hy": "Armenian", "id": "Indonesian", "ig": "Igbo"},
    **{"is": "Icelandic", "it": "Italian", "ja": "Japanese", "jv": "Javanese", "ka": "Georgian", "kab": "Kabyle"},
    **{"kik": "Kikuyu", "kk": "Kazakh", "km": "Khmer", "kn": "Kannada", "ko": "Korean", "ku": "Kurdish"},
    **{"ky": "Kyrgyz", "la": "Latin", "lb": "Luxembourgish", "lg": "Ganda", "lij": "Ligurian", "ln": "Lingala"},
    **{"lo": "Lao", "lt": "Lithuanian", "lv": "Latvian", "mg": "Malagasy", "mk": "Macedonian", "ml": "Malayalam"},
    **{"mn": "Mongolian", "mr": "Marathi", "ms": "Malay", "mt": "Maltese", "my": "Burmese", "ne": "Nepali"},
    **{"nl": "Dutch", "no": "Norwegian", "nso": "Northern Sotho", "oc": "Occitan", "om": "Oromo", "or": "Odia"},
    **{"pa": "Punjabi", "pl": "Polish", "ps": "Pashto", "pt": "Portuguese", "qu": "Quechua", "ro": "Romanian"},
    **{"ru": "Russian", "rw": "Kinyarwanda", "sa": "Sanskrit", "sdh": "Southern Kurdish", "se": "Northern Sami"},
    **{"si": "Sinhala", "sk": "Slovak", "sl": "Slovenian", "sn": "Shona", "so": "Somali", "sq": "Albanian"},
    **{"sr": "Serbian", "st": "Sotho", "sv": "Swedish", "sw": "Swahili", "ta": "Tamil", "te": "Telugu", "tg": "Tajik"},
    **{"th": "Thai", "tk": "Turkmen", "tl": "Tagalog", "tr": "Turkish", "tt": "Tatar", "ug": "Uyghur"},
    **{"uk": "Ukrainian", "ur": "Urdu", "uz": "Uzbek", "uzs": "Southern Uzbek", "vec": "Venetian", "vi": "Vietnamese"},
    **{"vo": "Volapük", "wa": "Walloon", "xh": "Xhosa", "yo": "Yoruba", "zh": "Chinese", "zu": "Zulu"},
}
