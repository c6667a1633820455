"""What is wrong with a text by itself: empty, broken, repeated, left over from HTML, a template, a chat or a model."""

from __future__ import annotations

import html
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping
from html.entities import html5

from fulltune.audit.texts.flaw import PATTERNS, RE, Flaw, compiled, quoted
from fulltune.text import counted, first_few, format_percent


def empty(text: str) -> Flaw | None:
    """Nothing that one could see."""
    blanks = PATTERNS["blank_signs"]
    if any(unicodedata.category(one)[0] not in "CZ" for one in text if one not in blanks):
        return None
    return Flaw("empty", "nothing but blanks" if text else "no text")


def no_words(text: str) -> Flaw | None:
    """Fewer than two letters and no emoji; a sign of Chinese or Japanese is a word by itself. Empty ones aside."""
    if RE["two_letters"].search(text):
        return None
    kinds = Counter(map(unicodedata.category, text))
    if kinds["Lo"] or kinds["So"]:
        return None
    seen = text.strip()
    if not seen or all(kind[0] in "CZ" for kind in kinds):
        return None
    letters = sum(count for kind, count in kinds.items() if kind[0] == "L")
    return Flaw("no words", f"only one letter: {quoted(seen)}" if letters else f"no letter: {quoted(seen)}")


STRESSED, MAX_STRESSED = 20, 30
"""So many letters of one kind people type to stress a word: fewer in a text of little else, and at most in any."""
MIN_WORDS = 8
MAX_REPEATED = 0.5
"""Share of a text that may repeat itself."""


def repetition(text: str) -> Flaw | None:
    """A character, word or phrase repeated over most of the text or 100 words, or a text twice; letters alone count."""
    return _same_character(text) or _same_words(text)


def _same_character(text: str) -> Flaw | None:
    found = RE["same_character"].search(text) if RE["run"].search(text) else None
    if found is None and len(text) >= 20 and " " not in text[:60]:
        # Without blanks, as in Chinese or in a broken export.
        found = RE["same_piece"].search(text)
    if found is None:
        return None
    size, letters = len(found[0]), sum(map(str.isalpha, text))
    if size < letters and (size < STRESSED or (size < MAX_STRESSED and size < MAX_REPEATED * letters)):
        return None
    return Flaw("repetition", f"'{found[1]}' {size // len(found[1])} times in a row")


def _same_words(text: str) -> Flaw | None:
    rough = text.split()
    if len(rough) < MIN_WORDS or (len(set(rough)) > len(rough) * 0.8 and len(rough) < 100):
        return None
    words = RE["word"].findall(text.lower())
    line = " ".join([*words, ""])
    found = RE["whole_twice"].fullmatch(line) or max(
        RE["same_words"].finditer(line), key=lambda one: len(one[0]), default=None
    )
    size = found[0].count(" ") if found else 0
    if found is None or size < MIN_WORDS or (size < MAX_REPEATED * len(words) and size < 100):
        return None
    phrase = found[1].strip()
    if not any(map(str.isalpha, phrase)):
        return None
    share = format_percent(size / len(words))
    return Flaw("repetition", f"{quoted(phrase)} {len(found[0]) // len(found[1])} times in a row, {share} of the words")


_OTHER_REPAIRS = (
    *("unescape_html", "remove_terminal_escapes", "fix_latin_ligatures", "fix_character_width", "uncurl_quotes"),
    *("fix_line_breaks", "fix_surrogates", "remove_control_chars", "normalization", "explain"),
)
"""What else ftfy does, unless it is told not to."""
_LOST = "\ufffd"


def broken_encoding(text: str) -> Flaw | None:
    """Mojibake that ftfy can undo, C1 characters (Windows-1252 read as Latin-1), and replacement characters."""
    if text.isascii():
        return None
    from ftfy import fix_text

    fixed = fix_text(text, None, **dict.fromkeys(_OTHER_REPAIRS))
    found = []
    if fixed != text:
        place = next((at for at, (old, new) in enumerate(zip(text, fixed, strict=False)) if old != new), len(fixed))
        start = max(0, place - 10)
        before, after = quoted(text[start : place + 15], 25), quoted(fixed[start : place + 12], 22)
        found.append(f"read in a wrong encoding: {before} should be {after}")
    if lost := fixed.count(_LOST):
        found.append(f"{counted(lost, 'replacement character')} (U+FFFD) where letters were lost")
    return Flaw("broken encoding", first_few(found), fixed if fixed != text else None) if found else None


def control_characters(text: str) -> Flaw | None:
    """Characters that nobody sees and a tokenizer does; what a script or an emoji is spelt with is left alone."""
    if not RE["ascii_control" if text.isascii() else "suspect"].search(text):
        return None
    whole, num_pairs = RE["surrogates"].subn(
        lambda pair: pair[0].encode("utf-16", "surrogatepass").decode("utf-16"), text
    )
    places = _wrong_places(whole)
    counts = Counter(_name(whole[place]) for place in places)
    if num_pairs:
        counts["character in two halves (surrogates)"] = num_pairs
    if not counts:
        return None
    reason = first_few([f"{count:,} × {name}" for name, count in counts.items()])
    return Flaw("control characters", reason, _without(whole, set(places)))


def _wrong_places(text: str) -> list[int]:
    spelling = ["flag", "chinese_variant", "joined_emoji"]
    spelling += ["direction"] if RE["right_to_left"].search(text) else []
    spelling += ["joiner"] if RE["joined_script"].search(text) else []
    spelt = {place for kind in spelling for found in RE[kind].finditer(text) for place in range(*found.span())}
    return [found.start() for found in RE["suspect"].finditer(text) if found.start() not in spelt]


def _without(text: str, places: set[int]) -> str:
    """Without what is wrong, a character or a terminal's colour; breaks of pages and lines become line breaks."""
    text = "".join(one for place, one in enumerate(text) if place not in places or one in "\x0b\x0c\x1b\u2028\u2029")
    return re.sub("[\x0b\x0c\u2028\u2029]", "\n", RE["escape"].sub("", text)).replace("\x1b", "")


def _name(character: str) -> str:
    if "\ud800" <= character <= "\udfff":
        return "half of a character (lone surrogate)"
    return f"{unicodedata.name(character, 'control character').lower()} (U+{ord(character):04X})"


# ---- left over from where a text came from ---------------------------------------------------------------------------


def _without_code(text: str) -> str:
    """Code in backticks is meant as it stands: blanks of the same length."""
    return RE["fenced"].sub(lambda found: " " * len(found[0]), text) if "`" in text else text


def _is_code(text: str) -> bool:
    """Two signs of a programming language: the text is written in one, and no place of it is left over."""
    return sum(1 for _, _ in zip(RE["code_sign"].finditer(text), range(2), strict=False)) == 2


_HIDDEN = [(end, compiled(pattern)) for end, pattern in PATTERNS["hidden"]]


def markup(text: str) -> Flaw | None:
    """HTML tags and entities outside code, or a text of which nothing is left without them."""
    if "<" not in text and "&" not in text:
        return None
    bare = _without_code(text)
    tags = [] if "<" not in bare else _tags(bare)
    if "<!--" in bare and "-->" in bare:
        tags.append("!-- --")
    entities = [found for found in RE["entity"].findall(bare) if found[1] == "#" or found[1:] in html5]
    if not (tags or entities) or _is_code(RE["any_mark"].sub(" ", bare)):
        return None
    if not re.search(r"[^\W_]", RE["any_mark"].sub(" ", _shown(text))):
        return Flaw("markup", f"markup only: {quoted(text)}")
    counts = Counter([*(f"<{name}>" for name in tags), *entities])
    found = [f"{name} × {count:,}" if count > 1 else name for name, count in counts.most_common()]
    return Flaw("markup", f"HTML left over: {first_few(found)}", _plain(text))


def _tags(text: str) -> list[str]:
    """Names of tags; `<b>` or `<title>` alone may be a letter in maths or a word to fill in, so they need a partner."""
    found = [(slash, name.lower(), attributes) for slash, name, attributes in RE["tag"].findall(text)]
    closed = {name for slash, name, _ in found if slash}
    opened = {name for slash, name, _ in found if not slash}
    sure = {name for _, name, attributes in found if "=" in attributes or RE["plainly_html"].fullmatch(name)}
    sure |= closed & opened
    return [name for slash, name, _ in found if name in sure and not slash]


def _plain(text: str) -> str:
    """Without tags and with characters for entities; code in backticks stays."""
    pieces, place = list[str](), 0
    for found in RE["fenced"].finditer(text):
        pieces += [_stripped(text[place : found.start()]), found[0]]
        place = found.end()
    return "".join([*pieces, _stripped(text[place:])])


def _stripped(text: str) -> str:
    bare = RE["tag"].sub(_in_its_stead, _shown(text))
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
    return "\n" if RE["block"].fullmatch(tag[2]) else ""


_PLACEHOLDER, _TOKEN = (re.compile("|".join(PATTERNS[name]), re.MULTILINE) for name in ("placeholder", "chat_tokens"))


def placeholder(text: str) -> Flaw | None:
    """A template that nobody filled in; braces of JSON, code and LaTeX are none."""
    if not any(map(text.__contains__, PATTERNS["placeholder_signs"])):
        return None
    bare = _without_code(text)
    found = list(dict.fromkeys(match[0] for match in _PLACEHOLDER.finditer(bare)))
    if not found or _is_code(bare):
        return None
    return Flaw("placeholder", f"not filled in: {first_few([quoted(one) for one in found])}")


def chat_tokens(text: str) -> Flaw | None:
    """Tokens that a chat template or a tokenizer adds itself: they would stand there twice, also those in code."""
    is_talk = "ssistant:" in text or "SSISTANT:" in text
    if not ("<" in text or "[" in text or "###" in text or is_talk):
        return None
    found = list(dict.fromkeys(_TOKEN.findall(text)))
    speakers = list(dict.fromkeys(RE["speaker"].findall(text))) if is_talk else []
    if {one.lower() == "assistant:" for one in speakers} == {True, False}:
        found += speakers
    # Between the two, <s> strikes words out.
    starts, ends = RE["sentence_start"].match(text), RE["sentence_end"].search(text)
    if (starts and "</s>" not in text[: -len("</s>")].rstrip()) or (ends and "<s>" not in text[1:]):
        found += ["<s>"] if starts else ["</s>"]
    return (
        Flaw("chat tokens", f"{first_few([quoted(one) for one in found])}: a template adds its own") if found else None
    )


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

_LOOK_ALIKE = str.maketrans(*PATTERNS["look_alike"])
_TO_JOIN = (
    "to join them: 'fulltune data RECIPE --accept \"class names\"', and in the recipe data.patch: RECIPE.patch.jsonl"
)


def alike(counts: Mapping[str, int]) -> list[list[str]]:
    """Groups of names that are perhaps meant to be one, in each the most frequent name first."""
    groups = defaultdict[str, list[str]](list)
    for name in sorted(counts, key=lambda name: (-counts[name], name)):
        plain = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
        groups[RE["no_letter"].sub("", plain).translate(_LOOK_ALIKE)].append(name)
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
