"""What is wrong with a text by itself: empty, broken, repeated, left over from HTML, a template, a chat or a model."""

from __future__ import annotations

import html
import importlib.util
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping
from functools import cache
from html.entities import html5

from fulltune.audit.texts.flaw import PATTERNS, Flaw, compiled, listed, quoted
from fulltune.errors import SetupError
from fulltune.text import counted, format_percent

_BLANK_SIGNS = "\u115f\u1160\u2800\u3164\uffa0"
"""Fillers of Korean, and braille without a dot: letters and signs by their category, and nothing to see."""
_SEEN = re.compile(rf"[^\W_{_BLANK_SIGNS}]")
_TWO_LETTERS = re.compile(r"[^\W\d_][\W\d_]*[^\W\d_]")


def empty(text: str) -> Flaw | None:
    """Nothing that one could see."""
    if _SEEN.search(text) or any(unicodedata.category(one)[0] not in "CZ" for one in text if one not in _BLANK_SIGNS):
        return None
    return Flaw("empty", "nothing but blanks" if text else "no text")


def no_words(text: str) -> Flaw | None:
    """Fewer than two letters and no emoji; a sign of Chinese or Japanese is a word by itself. Empty ones aside."""
    if _TWO_LETTERS.search(text):
        return None
    kinds = Counter(map(unicodedata.category, text))
    if kinds["Lo"] or kinds["So"]:
        return None
    seen = text.strip()
    if not seen or all(kind[0] in "CZ" for kind in kinds):
        return None
    letters = sum(count for kind, count in kinds.items() if kind[0] == "L")
    return Flaw("no words", f"only one letter: {quoted(seen)}" if letters else f"no letter: {quoted(seen)}")


_RUN = re.compile(r"(.)\1\1\1\1\1")
"""What is asked first: five times as fast as with letters alone."""
_SAME_CHARACTER = re.compile(r"([^\W\d_])\1{5,}")
_SAME_PIECE = re.compile(r"([^\W\d_](?:[^\W\d_]|[,.!?，。！？、]){1,19}?)\1{4,}")
_WORD = re.compile(r"[^\W_]+")
STRESSED, LONGEST_STRESSED = 20, 30
"""So many letters of one kind people type to stress a word: fewer in a text of little else, and at most in any."""
LEAST_WORDS = 8
MOST_REPEATED = 0.5
"""Share of a text that may repeat itself."""
_SAME_WORDS = re.compile(r"(?<![^ ])((?:[^ ]+ ){1,40}?)\1{4,}")
_WHOLE_TWICE = re.compile(r"((?:[^ ]+ ){8,}?)\1+")


def repetition(text: str) -> Flaw | None:
    """A character, word or phrase repeated over most of the text or 100 words, or a text twice; letters alone count."""
    return _same_character(text) or _same_words(text)


def _same_character(text: str) -> Flaw | None:
    found = _SAME_CHARACTER.search(text) if _RUN.search(text) else None
    if found is None and len(text) >= 20 and " " not in text[:60]:
        # Without blanks, as in Chinese or in a broken export.
        found = _SAME_PIECE.search(text)
    if found is None:
        return None
    size, letters = len(found[0]), sum(map(str.isalpha, text))
    if size < letters and (size < STRESSED or (size < LONGEST_STRESSED and size < MOST_REPEATED * letters)):
        return None
    return Flaw("repetition", f"'{found[1]}' {size // len(found[1])} times in a row")


def _same_words(text: str) -> Flaw | None:
    rough = text.split()
    if len(rough) < LEAST_WORDS or (len(set(rough)) > len(rough) * 0.8 and len(rough) < 100):
        return None
    words = _WORD.findall(text.lower())
    line = " ".join([*words, ""])
    found = _WHOLE_TWICE.fullmatch(line) or max(_SAME_WORDS.finditer(line), key=lambda one: len(one[0]), default=None)
    size = found[0].count(" ") if found else 0
    if found is None or size < LEAST_WORDS or (size < MOST_REPEATED * len(words) and size < 100):
        return None
    phrase = found[1].strip()
    if not any(map(str.isalpha, phrase)):
        return None
    share = format_percent(size / len(words))
    return Flaw("repetition", f"{quoted(phrase)} {len(found[0]) // len(found[1])} times in a row, {share} of the words")


_C1 = re.compile("[\x80-\x9f]")
_LOST = "\ufffd"


@cache
def knows_encodings() -> bool:
    """Whether ftfy is installed."""
    return importlib.util.find_spec("ftfy") is not None


def broken_encoding(text: str) -> Flaw | None:
    """Mojibake that ftfy can undo, C1 characters (Windows-1252 read as Latin-1), and replacement characters."""
    if text.isascii():
        return None
    if not knows_encodings():
        raise SetupError("looking for broken encodings needs the package 'ftfy'; pip install 'fulltune[audit]'")
    # Line by line, as ftfy's own `fix_text`: one whole line may keep another from being repaired.
    fixed = "\n".join(map(_repaired, text.split("\n")))
    found = []
    if fixed != text:
        place = next((at for at, (old, new) in enumerate(zip(text, fixed, strict=False)) if old != new), len(fixed))
        start = max(0, place - 10)
        before, after = quoted(text[start : place + 15], 25), quoted(fixed[start : place + 12], 22)
        found.append(f"read in a wrong encoding: {before} should be {after}")
    if lost := fixed.count(_LOST):
        found.append(f"{counted(lost, 'replacement character')} (U+FFFD) where letters were lost")
    return Flaw("broken encoding", listed(found), fixed if fixed != text else None) if found else None


def _repaired(line: str) -> str:
    import ftfy

    if line.isascii():
        return line
    fixed = ftfy.fix_encoding(line)
    return ftfy.fixes.fix_c1_controls(fixed) if _C1.search(fixed) else fixed


_ASCII_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_SUSPECT = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u00ad\u061c\u115f\u1160\u180e\u200b-\u200f\u2028-\u202e\u2060-\u2064\u2066-\u206f"
    "\u3164\uf020-\uf0ff\ufdd0-\ufdef\ufeff\uffa0\ufff9-\ufffb\ufffe\uffff\ud800-\udfff\U000e0000-\U000e007f"
    "\U000e0100-\U000e01ef]"
)
_PAIR = re.compile("([\ud800-\udbff])([\udc00-\udfff])")
_RIGHT_TO_LEFT = re.compile("[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefe]")
_JOINED_SCRIPT = re.compile("[\u0600-\u109f\u1780-\u18af\ufb50-\ufdff\ufe70-\ufefe]")
"""Arabic, Syriac, Indic scripts, Thai, Lao, Tibetan, Burmese, Khmer, Mongolian: joiners and breaks are spelling."""
_EMOJI = re.compile("[\u00a9\u00ae\u2030-\u3299\ufe0f\U0001f000-\U0001faff]")
_FLAG = re.compile("\U0001f3f4[\U000e0020-\U000e007e]+\U000e007f")
"""Flags of regions are spelt with tags, which are invisible."""
_CHINESE = re.compile("[\u2e80-\u2fff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_VARIANTS = re.compile("[\U000e0100-\U000e01ef]")
"""A sign of Chinese may have one behind it, for its form in a name; others hide bytes."""
_DIRECTIONS = "\u061c\u200e\u200f\u202a\u202b\u202c\u2066\u2067\u2068\u2069"
_JOINERS = "\u180e\u200b\u200c\u200d"


def control_characters(text: str) -> Flaw | None:
    """Characters that nobody sees and a tokenizer does; what a script or an emoji is spelt with is left alone."""
    if not (_ASCII_CONTROL if text.isascii() else _SUSPECT).search(text):
        return None
    whole, num_pairs = _PAIR.subn(lambda pair: pair[0].encode("utf-16", "surrogatepass").decode("utf-16"), text)
    places = _wrong_places(whole)
    counts = Counter(_name(whole[place]) for place in places)
    if num_pairs:
        counts["character in two halves (surrogates)"] = num_pairs
    if not counts:
        return None
    reason = listed([f"{count:,} × {name}" for name, count in counts.items()])
    return Flaw("control characters", reason, _without(whole, set(places)))


def _wrong_places(text: str) -> list[int]:
    spelt = {place for flag in _FLAG.finditer(text) for place in range(*flag.span())}
    if _RIGHT_TO_LEFT.search(text):
        spelt |= {place for place, one in enumerate(text) if one in _DIRECTIONS}
    if _JOINED_SCRIPT.search(text):
        spelt |= {place for place, one in enumerate(text) if one in _JOINERS}
    spelt |= {found.start() for found in _VARIANTS.finditer(text) if _CHINESE.match(text, found.start() - 1)}
    suspect = (found.start() for found in _SUSPECT.finditer(text))
    return [place for place in suspect if place not in spelt and not _joins_emoji(text, place)]


def _joins_emoji(text: str, place: int) -> bool:
    before, after = text[place - 1 : place], text[place + 1 : place + 2]
    return text[place] == "\u200d" and bool(_EMOJI.match(before) and _EMOJI.match(after))


def _without(text: str, places: set[int]) -> str:
    """Without what is wrong, a character or a terminal's colour; breaks of pages and lines become line breaks."""
    text = "".join(one for place, one in enumerate(text) if place not in places or one in "\x0b\x0c\x1b\u2028\u2029")
    return re.sub("[\x0b\x0c\u2028\u2029]", "\n", _ESCAPE.sub("", text)).replace("\x1b", "")


def _name(character: str) -> str:
    if "\ud800" <= character <= "\udfff":
        return "half of a character (lone surrogate)"
    return f"{unicodedata.name(character, 'control character').lower()} (U+{ord(character):04X})"


# ---- left over from where a text came from ---------------------------------------------------------------------------

_FENCED = re.compile(r"```.*?(?:```|\Z)|``.+?``|`[^`\n]+`", re.DOTALL)
_CODE_SIGN = re.compile(
    r"^\s*(?:>>> |\$ |export |def |class |import |from \w+ import|#include|function\b|const |let |var |public |private "
    r"|return\b|SELECT |\w+ = )"
    r"|[;{]\s*$|=>|==|!=|\w\(\)|::|->|\$\(|=\"?\$\{|</?[A-Z]\w*>|\bprintf\b|\bf\"|\.format\(|%\s*\(",
    re.MULTILINE,
)


def _without_code(text: str) -> str:
    """Code in backticks is meant as it stands: blanks of the same length."""
    return _FENCED.sub(lambda found: " " * len(found[0]), text) if "`" in text else text


def _is_code(text: str) -> bool:
    """Two signs of a programming language: the text is written in one, and no place of it is left over."""
    return sum(1 for _, _ in zip(_CODE_SIGN.finditer(text), range(2), strict=False)) == 2


_BLOCKS = (
    "address|article|aside|blockquote|body|br|dd|div|dl|dt|fieldset|figcaption|figure|footer|form|h[1-6]|head|header|hr"
    "|html|iframe|li|main|nav|ol|p|pre|script|section|style|table|tbody|td|tfoot|th|thead|tr|ul|!doctype|noscript"
)
_INLINE = "a|abbr|b|button|center|code|del|em|font|i|img|input|ins|label|meta|q|s|small|span|strong|sub|sup|tt|u|video"
_ATTRIBUTE = r"\s+[\w:@-]+(?:\s*=\s*(?:\"[^\"<]*\"|'[^'<]*'|[^\s\"'<>]+))?"
_TAG = re.compile(rf"<(/?)({_BLOCKS}|{_INLINE})((?:{_ATTRIBUTE})*)\s*/?>", re.IGNORECASE)
_HIDDEN = tuple(
    (end, re.compile(f"{start}.*?{end}", re.IGNORECASE | re.DOTALL))
    for start, end in (("<!--", "-->"), (r"<script\b", "</script>"), (r"<style\b", "</style>"))
)
_BLOCK_NAME = re.compile(_BLOCKS, re.IGNORECASE)
_PLAINLY_HTML = re.compile(
    r"br|p|div|span|td|tr|th|li|ul|ol|h[1-6]|iframe|tbody|thead|img|!doctype|blockquote", re.IGNORECASE
)
"""Names that are no words, variables or types of their own: one tag is enough."""
_ENTITY = re.compile(r"&(?:#\d{2,6}|#[xX][0-9a-fA-F]{2,5}|[A-Za-z]{2,8}\d{0,2});")
_ANY_MARK = re.compile(r"<[^<>]{1,400}>|&#?\w{1,8};")


def markup(text: str) -> Flaw | None:
    """HTML tags and entities outside code, or a text of which nothing is left without them."""
    if "<" not in text and "&" not in text:
        return None
    bare = _without_code(text)
    tags = [] if "<" not in bare else _tags(bare)
    if "<!--" in bare and "-->" in bare:
        tags.append("!-- --")
    entities = [found for found in _ENTITY.findall(bare) if found[1] == "#" or found[1:] in html5]
    if not (tags or entities) or _is_code(_ANY_MARK.sub(" ", bare)):
        return None
    if not re.search(r"[^\W_]", _ANY_MARK.sub(" ", _shown(text))):
        return Flaw("markup", f"markup only: {quoted(text)}")
    counts = Counter([*(f"<{name}>" for name in tags), *entities])
    found = [f"{name} × {count:,}" if count > 1 else name for name, count in counts.most_common()]
    return Flaw("markup", f"HTML left over: {listed(found)}", _plain(text))


def _tags(text: str) -> list[str]:
    """Names of tags; `<b>` or `<title>` alone may be a letter in maths or a word to fill in, so they need a partner."""
    found = [(slash, name.lower(), attributes) for slash, name, attributes in _TAG.findall(text)]
    closed = {name for slash, name, _ in found if slash}
    opened = {name for slash, name, _ in found if not slash}
    sure = {name for _, name, attributes in found if "=" in attributes or _PLAINLY_HTML.fullmatch(name)}
    sure |= closed & opened
    return [name for slash, name, _ in found if name in sure and not slash]


def _plain(text: str) -> str:
    """Without tags and with characters for entities; code in backticks stays."""
    pieces, place = list[str](), 0
    for found in _FENCED.finditer(text):
        pieces += [_stripped(text[place : found.start()]), found[0]]
        place = found.end()
    return "".join([*pieces, _stripped(text[place:])])


def _stripped(text: str) -> str:
    bare = _TAG.sub(_in_its_stead, _shown(text))
    if bare != text:
        bare = re.sub(r" ?\n[ \n]*\n ?", "\n\n", re.sub(r"[ \t]{2,}", " ", bare))
    return html.unescape(bare).replace("\u00a0", " ")


def _shown(text: str) -> str:
    """Without comments, scripts and styles."""
    for end, pattern in _HIDDEN:
        # Up to the last end alone: each start would search the rest of the text for one in vain.
        if (last := text.lower().rfind(end)) >= 0:
            text = pattern.sub(" ", text[: last + len(end)]) + text[last + len(end) :]
    return text


def _in_its_stead(tag: re.Match[str]) -> str:
    if tag[2].lower() in ("td", "th"):
        return " "
    return "\n" if _BLOCK_NAME.fullmatch(tag[2]) else ""


_PLACEHOLDER, _TOKEN = (re.compile("|".join(PATTERNS[name]), re.MULTILINE) for name in ("placeholder", "chat_tokens"))


def placeholder(text: str) -> Flaw | None:
    """A template that nobody filled in; braces of JSON, code and LaTeX are none."""
    if not any(map(text.__contains__, PATTERNS["placeholder_signs"])):
        return None
    bare = _without_code(text)
    found = list(dict.fromkeys(match[0] for match in _PLACEHOLDER.finditer(bare)))
    if not found or _is_code(bare):
        return None
    return Flaw("placeholder", f"not filled in: {listed([quoted(one) for one in found])}")


_SPEAKERS = re.compile(r"(?:^|(?<=\s))(Human:|USER:|Assistant:|ASSISTANT:)", re.MULTILINE)
"""Of templates without tokens: both speakers, since one may be any word before a colon."""
_SENTENCE_START, _SENTENCE_END = re.compile(r"\s*<s>"), re.compile(r"</s>\s*\Z")


def chat_tokens(text: str) -> Flaw | None:
    """Tokens that a chat template or a tokenizer adds itself: they would stand there twice, also those in code."""
    is_talk = "ssistant:" in text or "SSISTANT:" in text
    if not ("<" in text or "[" in text or "###" in text or is_talk):
        return None
    found = list(dict.fromkeys(_TOKEN.findall(text)))
    speakers = list(dict.fromkeys(_SPEAKERS.findall(text))) if is_talk else []
    if {one.lower() == "assistant:" for one in speakers} == {True, False}:
        found += speakers
    # Between the two, <s> strikes words out.
    starts, ends = _SENTENCE_START.match(text), _SENTENCE_END.search(text)
    if (starts and "</s>" not in text[: -len("</s>")].rstrip()) or (ends and "<s>" not in text[1:]):
        found += ["<s>"] if starts else ["</s>"]
    return Flaw("chat tokens", f"{listed([quoted(one) for one in found])}: a template adds its own") if found else None


_PHRASES = [(signs.split("|"), compiled(pattern)) for signs, pattern in PATTERNS["refusal"]]
"""Looking for signs first takes a tenth of the time."""


def refusal(text: str) -> Flaw | None:
    """An answer in which an assistant declines or speaks of itself, in English and a few phrases of other languages."""
    lowered = text.lower().replace("’", "'")
    for signs, pattern in _PHRASES:
        if any(map(lowered.__contains__, signs)) and (found := pattern.search(lowered)):
            return Flaw("refusal", f"an assistant's own words: {quoted(lowered[found.start() :], 60)}")
    return None


# ---- names of classes that are perhaps meant to be one: they differ in capitals, blanks, form or look ----------------

_ALIKE = str.maketrans("авекмнорстухіјѕԁԛԝһαβεζηικμνορτυχ", "abekmhopctyxijsdqwhabezhikmnoptyx")
"""Small Cyrillic and Greek letters that look like Latin ones, they or their capitals; after Unicode's confusables."""
_NO_LETTER = re.compile("[\\s_\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufe00-\ufe0f\ufeff\U000e0100-\U000e01ef]")
_TO_JOIN = (
    "to join them: 'fulltune data RECIPE --accept \"class names\"', and in the recipe data.patch: RECIPE.patch.jsonl"
)


def alike(counts: Mapping[str, int]) -> list[list[str]]:
    """Groups of names that are perhaps meant to be one, in each the most frequent name first."""
    groups = defaultdict[str, list[str]](list)
    for name in sorted(counts, key=lambda name: (-counts[name], name)):
        plain = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
        groups[_NO_LETTER.sub("", plain).translate(_ALIKE)].append(name)
    return [names for names in groups.values() if len(names) > 1]


def alike_in_words(counts: Mapping[str, int]) -> str | None:
    """Such classes with their rows, by their code where they cannot be told apart; None: there are none."""
    groups = []
    for names in alike(counts):
        shown = repr if len({name.casefold() for name in names}) == 1 else ascii
        groups.append(", ".join(f"{shown(name)} ({counted(counts[name], 'row')})" for name in names))
    told = f"classes that are perhaps meant to be one: {'; '.join(groups[:3])}"
    more = f" and {counted(len(groups) - 3, 'more group')}" if len(groups) > 3 else ""
    return f"{told}{more}; {_TO_JOIN}" if groups else None
