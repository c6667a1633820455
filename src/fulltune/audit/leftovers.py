"""What was left over in a text from where it came from: HTML, templates that nobody filled in, tokens of a chat."""

from __future__ import annotations

import html
import re
from collections import Counter
from html.entities import html5

from fulltune.audit.flaw import Flaw, listed, quoted

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


# ---- HTML -------------------------------------------------------------------------------------------------------

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


# ---- placeholders -----------------------------------------------------------------------------------------------

_USUAL = (
    "name|date|company|product|email|address|city|country|customer|user|username|title|topic|subject|amount|price|phone"
    "|number|location|organization|url|link|text|input|question|answer|context|response|prompt|output|first|last"
)
_SOME_NAME = (
    "(?:(?i:name)|DATE|COMPANY|ADDRESS|CITY|PRODUCT|EMAIL|PHONE NUMBER|CUSTOMER"
    "|Date|Company|Address|City|Product|Email)"
)
_PLACEHOLDER = re.compile(
    r"(?<![\w^_}\\{])\{{2,3}\s*[A-Za-z][\w .-]{2,40}(?:\|[^{}=\n]{1,60})?\s*\}{2,3}"
    r"|\{\{[#/>^] ?[a-z][\w. ]{1,40}\}\}"
    r"|\{%-? ?(?:if|else|elif|endif|for|endfor|include|block|set|endblock)\b[^{}\n]{0,80}%\}"
    r"|<%[=-]? ?[@\w.]+(?: [^<>\n]{1,60})? ?%>|<\?(?:php|=)\s[^<>\n]{1,80}\?>"
    r"|\{!\w+\.\w+\}|\*\|[A-Z][A-Z0-9_:]{2,40}\|\*|«(?:[A-Z][a-z]+){2,3}»"
    r"|@@[A-Z_]{3,30}@@|%%[A-Za-z_]{3,30}%%|(?<![\w%])%\{[a-z_]{3,30}\}"
    rf"|(?<![\w\\^_${{}}/\"'])\{{(?:[A-Za-z]+(?:_[A-Za-z]+)+|[A-Z]{{3,}}|{_USUAL})\}}(?![\"'}}])"
    r"|\$\{[A-Za-z_][\w.]{2,}\}"
    r"|(?:(?<=\s)(?<!\d\s)|\A)(?:(?P<quote>[\"'])?%(?:\d\$)?(?:[sd]|\(\w+\)[sd])(?(quote)(?P=quote))|\(%s\))"
    r"(?=[\s.,!?]|\Z)(?! ?%[A-Za-z][: /%-])"
    r"|\[(?i:insert|your|enter)\s[^\]\[\n]{2,40}\](?!\()"
    r"|<(?i:insert|your|enter)[ _][^<>\n]{2,40}>"
    r"|<(?i:first|last|full|customer|company|user) (?i:name)>"
    rf"|\[(?:[A-Z][\w']* ){{0,2}}{_SOME_NAME}\](?!\()"
    r"|\b(?i:lorem ipsum|sed ut perspiciatis|ut enim ad minim|duis aute irure|excepteur sint occaecat)\b"
)


_SIGNS = ("{", "[", "%", "<", "«", "@@", "*|", "psum", "PSUM", "perspic", "ad minim", "aute irure", "occaecat")


def placeholder(text: str) -> Flaw | None:
    """A template that nobody filled in; braces of JSON, code and LaTeX are none."""
    if not any(map(text.__contains__, _SIGNS)):
        return None
    bare = _without_code(text)
    found = list(dict.fromkeys(match[0] for match in _PLACEHOLDER.finditer(bare)))
    if not found or _is_code(bare):
        return None
    return Flaw("placeholder", f"not filled in: {listed([quoted(one) for one in found])}")


# ---- tokens of a chat template ----------------------------------------------------------------------------------

_TOKEN = re.compile(
    r"<\|[A-Za-z][A-Za-z_0-9]*\|>|\[\|[a-z]{3,20}\|\]|<｜[^<>｜]{2,30}｜>|\[/?INST\]|<</?SYS>>|</?(?:start|end)_of_turn>"
    r"|\[/?(?:SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS)\]|\[(?:CLS|SEP|PAD|gMASK|UNUSED_TOKEN_\d+)\]"
    r"|<(?:bos|eos|pad|unk|BOS_TOKEN|EOS_TOKEN|sop|eoh|eoa|extra_id_\d+|reserved_\d+|fim_(?:prefix|middle|suffix))>"
    r"|^### (?:Instruction|Response|Input|Human|Assistant|User|System)s?:",
    re.MULTILINE,
)
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
