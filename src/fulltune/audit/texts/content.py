from __future__ import annotations

import html
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping
from html.entities import html5

from fulltune.audit.texts.flaw import PATTERNS, RE, Flaw, quote_start, to_regex
from fulltune.text import counted, first_few, format_percent


def check_empty(text: str) -> Flaw | None:
    blanks = PATTERNS["blank_signs"]
    if any(unicodedata.category(sign)[0] not in "CZ" for sign in text if sign not in blanks):
        return None
    return Flaw("empty", "only whitespace" if text else "no text")


def check_no_words(text: str) -> Flaw | None:
    """Detect a text with fewer than two letters and no emoji; one Chinese or Japanese character is enough."""
    if RE["two_letters"].search(text):
        return None
    kinds = Counter(map(unicodedata.category, text))
    if kinds["Lo"] or kinds["So"]:
        return None
    stripped = text.strip()
    if not stripped or all(kind[0] in "CZ" for kind in kinds):
        return None
    letters = sum(count for kind, count in kinds.items() if kind[0] == "L")
    return Flaw("no words", f"{'only one letter' if letters else 'no letter'}: {quote_start(stripped)}")


STRESSED, MAX_STRESSED = 20, 30
"""A letter repeated less often is emphasis; the second limit is for texts of mostly other letters."""
MIN_WORDS = 8
MAX_REPEATED = 0.5


def check_repetition(text: str) -> Flaw | None:
    """Detect a text that is mostly repetition, repeats a phrase over 100 words, or consists of two copies."""
    return _check_repeated_character(text) or _check_repeated_words(text)


def _check_repeated_character(text: str) -> Flaw | None:
    """Detect a character or short piece repeated through much of a text."""
    match = RE["same_character"].search(text) if RE["run"].search(text) else None
    if match is None and len(text) >= 20 and " " not in text[:60]:
        # A text without blanks is in a script such as Chinese, or a broken export.
        match = RE["same_piece"].search(text)
    if match is None:
        return None
    size, letters = len(match[0]), sum(map(str.isalpha, text))
    if size < letters and (size < STRESSED or (size < MAX_STRESSED and size < MAX_REPEATED * letters)):
        return None
    return Flaw("repetition", f"'{match[1]}' {size // len(match[1])} times in a row")


def _check_repeated_words(text: str) -> Flaw | None:
    """Detect a phrase repeated through much of a text."""
    rough = text.split()
    if len(rough) < MIN_WORDS or (len(set(rough)) > len(rough) * 0.8 and len(rough) < 100):
        return None
    words = RE["word"].findall(text.lower())
    line = " ".join([*words, ""])
    match = RE["whole_twice"].fullmatch(line) or max(
        RE["same_words"].finditer(line), key=lambda match: len(match[0]), default=None
    )
    size = match[0].count(" ") if match else 0
    if match is None or size < MIN_WORDS or (size < MAX_REPEATED * len(words) and size < 100):
        return None
    phrase = match[1].strip()
    if not any(map(str.isalpha, phrase)):
        return None
    share = format_percent(size / len(words))
    times = len(match[0]) // len(match[1])
    return Flaw("repetition", f"{quote_start(phrase)} {times} times in a row, {share} of the words")


_OTHER_REPAIRS = (
    *("unescape_html", "remove_terminal_escapes", "fix_latin_ligatures", "fix_character_width", "uncurl_quotes"),
    *("fix_line_breaks", "fix_surrogates", "remove_control_chars", "normalization", "explain"),
)
_REPLACEMENT_CHARACTER = "\ufffd"


def check_encoding(text: str) -> Flaw | None:
    """Detect mojibake that ftfy can repair, and C1 or replacement characters."""
    if text.isascii():
        return None
    from ftfy import fix_text

    fixed = fix_text(text, None, **dict.fromkeys(_OTHER_REPAIRS))
    reasons = []
    if fixed != text:
        place = next((at for at, (old, new) in enumerate(zip(text, fixed, strict=False)) if old != new), len(fixed))
        start = max(0, place - 10)
        before, after = quote_start(text[start : place + 15], 25), quote_start(fixed[start : place + 12], 22)
        reasons.append(f"decoded wrongly: {before} should be {after}")
    if lost := fixed.count(_REPLACEMENT_CHARACTER):
        reasons.append(f"{counted(lost, 'replacement character')} (U+FFFD) for lost letters")
    return Flaw("broken encoding", first_few(reasons), fixed if fixed != text else None) if reasons else None


def check_control_characters(text: str) -> Flaw | None:
    """Detect invisible characters that no script or emoji requires."""
    if not RE["ascii_control" if text.isascii() else "suspect"].search(text):
        return None
    whole, num_pairs = RE["surrogates"].subn(
        lambda pair: pair[0].encode("utf-16", "surrogatepass").decode("utf-16"), text
    )
    places = _invisible_positions(whole)
    counts = Counter(_character_name(whole[place]) for place in places)
    if num_pairs:
        counts["character split into two surrogates"] = num_pairs
    if not counts:
        return None
    reason = first_few([f"{count:,} × {name}" for name, count in counts.items()])
    return Flaw("control characters", reason, _remove_characters(whole, set(places)))


def _invisible_positions(text: str) -> list[int]:
    spelling = ["flag", "chinese_variant", "joined_emoji"]
    spelling += ["direction"] if RE["right_to_left"].search(text) else []
    spelling += ["joiner"] if RE["joined_script"].search(text) else []
    spelt = {place for kind in spelling for match in RE[kind].finditer(text) for place in range(*match.span())}
    return [match.start() for match in RE["suspect"].finditer(text) if match.start() not in spelt]


def _remove_characters(text: str, positions: set[int]) -> str:
    text = "".join(sign for at, sign in enumerate(text) if at not in positions or sign in "\x0b\x0c\x1b\u2028\u2029")
    return re.sub("[\x0b\x0c\u2028\u2029]", "\n", RE["escape"].sub("", text)).replace("\x1b", "")


def _character_name(character: str) -> str:
    """Return a name for messages, such as "zero width space (U+200B)"."""
    if "\ud800" <= character <= "\udfff":
        return "lone surrogate"
    return f"{unicodedata.name(character, 'control character').lower()} (U+{ord(character):04X})"


# ---- leftovers of a text's source ------------------------------------------------------------------------------------


def _without_code(text: str) -> str:
    return RE["fenced"].sub(lambda match: " " * len(match[0]), text) if "`" in text else text


def _is_code(text: str) -> bool:
    return sum(1 for _, _ in zip(RE["code_sign"].finditer(text), range(2), strict=False)) == 2


_HIDDEN = [(end, to_regex(pattern)) for end, pattern in PATTERNS["hidden"]]


def check_markup(text: str) -> Flaw | None:
    """Detect HTML tags or entities outside code, and texts that are only markup."""
    if "<" not in text and "&" not in text:
        return None
    bare = _without_code(text)
    tags = [] if "<" not in bare else _html_tag_names(bare)
    if "<!--" in bare and "-->" in bare:
        tags.append("!-- --")
    entities = [entity for entity in RE["entity"].findall(bare) if entity[1] == "#" or entity[1:] in html5]
    if not (tags or entities) or _is_code(RE["any_mark"].sub(" ", bare)):
        return None
    if not re.search(r"[^\W_]", RE["any_mark"].sub(" ", _remove_hidden_elements(text))):
        return Flaw("markup", f"only markup: {quote_start(text)}")
    counts = Counter([*(f"<{name}>" for name in tags), *entities])
    shown = [f"{name} × {count:,}" if count > 1 else name for name, count in counts.most_common()]
    pieces, place = list[str](), 0
    for code in RE["fenced"].finditer(text):
        pieces += [_remove_tags(text[place : code.start()]), code[0]]
        place = code.end()
    return Flaw("markup", f"leftover HTML: {first_few(shown)}", "".join([*pieces, _remove_tags(text[place:])]))


def _html_tag_names(text: str) -> list[str]:
    """`<b>` alone may be maths, so it counts only with `</b>`."""
    tags = [(slash, name.lower(), attributes) for slash, name, attributes in RE["tag"].findall(text)]
    closed = {name for slash, name, _ in tags if slash}
    opened = {name for slash, name, _ in tags if not slash}
    sure = {name for _, name, attributes in tags if "=" in attributes or RE["plainly_html"].fullmatch(name)}
    sure |= closed & opened
    return [name for slash, name, _ in tags if name in sure and not slash]


def _remove_tags(text: str) -> str:
    """Return HTML with tags replaced by white space, and entities decoded."""
    bare = RE["tag"].sub(_whitespace_for_tag, _remove_hidden_elements(text))
    if bare != text:
        bare = re.sub(r" ?\n[ \n]*\n ?", "\n\n", re.sub(r"[ \t]{2,}", " ", bare))
    return html.unescape(bare).replace("\u00a0", " ")


def _remove_hidden_elements(text: str) -> str:
    """Return HTML without comments, scripts and styles."""
    for end, pattern in _HIDDEN:
        # Without an end tag behind it, each start tag would be searched in vain.
        if (last := text.lower().rfind(end)) >= 0:
            text = pattern.sub(" ", text[: last + len(end)]) + text[last + len(end) :]
    return text


def _whitespace_for_tag(tag: re.Match[str]) -> str:
    if tag[2].lower() in ("td", "th"):
        return " "
    return "\n" if RE["block"].fullmatch(tag[2]) else ""


_PLACEHOLDER, _TOKEN = (re.compile("|".join(PATTERNS[name]), re.MULTILINE) for name in ("placeholder", "chat_tokens"))


def check_placeholders(text: str) -> Flaw | None:
    """Detect an unfilled template, ignoring braces of JSON, code and LaTeX."""
    if not any(map(text.__contains__, PATTERNS["placeholder_signs"])):
        return None
    bare = _without_code(text)
    names = list(dict.fromkeys(match[0] for match in _PLACEHOLDER.finditer(bare)))
    if not names or _is_code(bare):
        return None
    return Flaw("placeholder", f"not filled in: {first_few(list(map(quote_start, names)))}")


def check_chat_tokens(text: str) -> Flaw | None:
    """Detect tokens that a chat template or tokenizer adds itself."""
    is_talk = "ssistant:" in text or "SSISTANT:" in text
    if not ("<" in text or "[" in text or "###" in text or is_talk):
        return None
    tokens = list(dict.fromkeys(_TOKEN.findall(text)))
    speakers = list(dict.fromkeys(RE["speaker"].findall(text))) if is_talk else []
    if {speaker.lower() == "assistant:" for speaker in speakers} == {True, False}:
        tokens += speakers
    # In the middle of a text, <s> is HTML for strikethrough.
    starts, ends = RE["sentence_start"].match(text), RE["sentence_end"].search(text)
    if (starts and "</s>" not in text[: -len("</s>")].rstrip()) or (ends and "<s>" not in text[1:]):
        tokens += ["<s>"] if starts else ["</s>"]
    shown = first_few(list(map(quote_start, tokens)))
    return Flaw("chat tokens", f"{shown}: the chat template adds its own") if tokens else None


_PHRASES = [(signs.split("|"), to_regex(pattern)) for signs, pattern in PATTERNS["refusal"]]
"""Each pattern is tried only if one of its strings occurs, which saves 90 % of the time."""


def check_refusal(text: str) -> Flaw | None:
    """Detect an answer that refuses a request, or in which an assistant mentions itself."""
    lowered = text.lower().replace("’", "'")
    for signs, pattern in _PHRASES:
        if any(map(lowered.__contains__, signs)) and (match := pattern.search(lowered)):
            return Flaw("refusal", f"typical phrase of an assistant: {quote_start(lowered[match.start() :], 60)}")
    return None


# ---- similar names of classes ----------------------------------------------------------------------------------------

_LOOK_ALIKE = str.maketrans(*PATTERNS["look_alike"])
_TO_JOIN = "to merge them, run 'fulltune data RECIPE --accept \"class names\"' and set data.patch: RECIPE.patch.jsonl"


def group_similar_names(counts: Mapping[str, int]) -> list[list[str]]:
    """Return groups of names that may mean the same class, the most frequent first."""
    groups = defaultdict[str, list[str]](list)
    for name in sorted(counts, key=lambda name: (-counts[name], name)):
        plain = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
        groups[RE["no_letter"].sub("", plain).translate(_LOOK_ALIKE)].append(name)
    return [names for names in groups.values() if len(names) > 1]


def note_similar_names(counts: Mapping[str, int]) -> str | None:
    """Describe classes whose names may mean the same, or return None."""
    groups = []
    for names in group_similar_names(counts):
        shown = repr if len({name.casefold() for name in names}) == 1 else ascii
        groups.append(", ".join(f"{shown(name)} ({counted(counts[name], 'row')})" for name in names))
    note = f"classes that may be the same: {'; '.join(groups[:3])}"
    more = f" and {counted(len(groups) - 3, 'more group')}" if len(groups) > 3 else ""
    return f"{note}{more}; {_TO_JOIN}" if groups else None
