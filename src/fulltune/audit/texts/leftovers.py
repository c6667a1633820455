"""What was left over in a text from where it came from: HTML, templates, tokens of a chat, a model that declined."""

from __future__ import annotations

import html
import re
from collections import Counter
from html.entities import html5

from fulltune.audit.texts.flaw import Flaw, listed, quoted

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


_CANNOT = (
    r"(?:cannot|can't|can not|(?:am |'m )(?:unable to|not able to)|won't be able to|am not programmed to"
    r"|must decline to)"
)
_WILL_NOT = r"(?:will not|won't|(?:am |'m )not going to|cannot in good conscience)"
_HELP = r"(?:assist|help you|help with|fulfill?|comply|engage|support)"
_MAKE = r"(?:provide|create|generate|write|produce|answer|discuss)"
_MADE = (
    r"(?:content|material|instructions|information|stor(?:y|ies)|essay|code|malware|request|question"
    r"|directions|details|steps|guidance|advice"
    r"|th(?:at|is|ese|ose)|such|it)"
)
_NOT_ABLE = "cannot|can't|can not|unable to|not able to|won't|programmed|decline|will not|not going"
_PHRASES = {
    tuple(signs.split("|")): re.compile(pattern)
    for signs, pattern in {
        # Declines.
        _NOT_ABLE: rf"\b(?:sorry|apologi[sz]e|apologies|unfortunately|i'm afraid),? (?:but |that )?i ?{_CANNOT}"
        rf" (?:\w+ )?"
        rf"(?:{_HELP}|{_MAKE}|do that)\b"
        rf"|\A\W*i ?(?:{_CANNOT}|{_WILL_NOT}) (?:\w+ )?{_HELP}\b"
        rf"|\bi ?(?:{_CANNOT}|{_WILL_NOT}) (?:help|assist)(?: you)?"
        r"(?: (?:with|in) (?:th(?:at|is)|it|such)\b|[.,!]|\Z)"
        rf"|\A\W*i ?(?:{_CANNOT}|{_WILL_NOT}) (?:help )?(?:\w+ )?{_MAKE} (?:\w+ ){{0,3}}{_MADE}\b",
        "comfortable": r"\bi(?: don't feel|'m not| am not) comfortable "
        r"(?:with (?:this|that|your)|(?:writ|creat|generat|provid|discuss|answer|engag)\w*)",
        "decline": r"\bi (?:\w+ ){0,2}(?:must|have to|need to|will) (?:\w+ )?decline "
        r"(?:to (?:help|assist|answer|provide|write|discuss|engage)|(?:this|that|your) (?:request|task|question))",
        # Its rules.
        "guideline|polic|my programming": r"\b(?:against|violates?|violation of) (?:my|openai's|our)"
        r" (?:\w+ )?(?:guidelines|polic|programming\b)"
        r"|\bmy (?:safety |ethical |content )(?:guidelines|polic)|\bopenai's (?:content|use|usage) polic",
        "for me to": r"\b(?:un|not |in|il|irr)(?:ethical|appropriate|legal|responsible) (?:\w+ ){0,2}for me to\b",
        "i am programmed|i'm programmed": r"\bi(?:'m| am) programmed to\b",
        # What it is.
        "as a|being a": r"\b(?:as|being) an? (?:\w+ )?"
        r"(?:ai\b(?! (?:company|consult|develop(?!ed)|engineer|enthus|expert|lab\b|profess|research|scien|startup"
        r"|student))"
        r"|artificial intelligence(?=,| (?:i|language|model|assistant)\b)|(?:large )?language model"
        r"|virtual assistant)"
        r"|\bas an? (?:responsible|helpful|harmless|ethical) (?:\w+ ){0,3}assistant",
        "i'm|i am|i was": r"\bi was (?:created|trained|made|developed|built) by "
        r"(?:openai|anthropic|google|meta|mistral|alibaba|deepseek)\b"
        r"|\bi(?:'m| am) (?:just |only |merely |actually )?(?:an ai\b|an artificial intelligence"
        r"|an? (?:large )?language model|a computer program|(?:chatgpt|claude|gemini|bard|copilot|llama|qwen)\b)",
        # What it knows.
        "my knowledge|my training|as of my": r"\bmy (?:knowledge|training)(?: data)? (?:cut-?off|only goes"
        r"|goes up|ends|extends)"
        r"|\bas of my (?:last|latest|knowledge|training)",
        "not have|n't have": r"\bi (?:do not|don't) have (?:(?:direct )?access to (?:real-?time|current"
        r"|up-to-date|live|external"
        r"|the internet|your personal)|(?:personal )?(?:feelings|opinions|emotions|beliefs|experiences)\b"
        r"|the ability to (?:browse|access|feel|see))",
        "browse|access|open the|open link|view ": rf"\bi ?{_CANNOT} (?:\w+ )?(?:browse|access|open|view) (?:the"
        rf" (?:internet|web)|links|urls|external|images)",
        # In other languages.
        "als |leid": r"\bals (?:ein )?(?:ki\b|künstliche intelligenz|(?:großes )?sprachmodell)"
        r"|\btut mir leid,? (?:aber )?(?:\w+ ){0,3}kann (?:\w+ ){0,4}nicht "
        r"(?:helfen|weiterhelfen|beantworten|erfüllen)",
        "en tant|désol": r"\ben tant qu(?:e |')(?:ia\b|intelligence artificielle|modèle (?:de langage|linguistique)"
        r"|assistant virtuel)"
        r"|\bdésolée?,? (?:mais )?je ne peux pas (?:vous |t')?(?:aider|répondre|fournir|accéder|satisfaire)",
        "como |siento|desculp|sinto|lamento": r"\bcomo (?:una? |uma )?(?:ia\b|inteligencia artificial"
        r"|inteligência artificial"
        r"|modelo (?:de (?:lenguaje|linguagem)|lingüístico))"
        r"|\b(?:lo siento|desculpe|sinto muito|lamento),? (?:pero |mas )?n(?:o puedo|ão posso) (?:\w+ )?"
        r"(?:ayud|ajud|cumpl|cumpr|respond|proporc|fornec|gener|asist|atend)",
        "in quanto|come |dispiace": r"\b(?:in quanto|come) (?:un |un')?(?:ia\b|intelligenza artificiale|modello"
        r" (?:linguistico|di linguaggio))"
        r"|\bmi dispiace,? (?:ma )?non posso (?:aiut|rispond|forn|soddisf)",
        "как |не могу": r"\bкак (?:языковая модель|искусственный интеллект|ии\b)"
        r"|\bя не могу (?:вам )?(?:помочь с этим|выполнить (?:этот|ваш|данный) запрос|предоставить (?:эту|такую))",
        "作为|抱歉|对不起": r"作为(?:一个|一名|一款)?(?:(?:人工智能|ai)(?=[,，]|助手|语言|模型)"
        r"|大型语言模型|语言模型)"
        r"|(?:抱歉|对不起)[,，。 ]*我?(?:无法|不能)(?:提供|协助|帮|回答|满足|完成)",
        "として|申し訳": r"(?:ai|人工知能|言語モデル)として"
        r"|申し訳(?:ありません|ございません)が、[^。]{0,30}(?:できません|できかねます)",
        "죄송|로서": r"죄송하지만,? ?[^.]{0,30}수 없습니다|(?:ai|인공지능|언어 모델)로서",
    }.items()
}
"""Signs, of which one stands in each phrase, and the phrases: looking for signs first takes a tenth of the time."""


def refusal(text: str) -> Flaw | None:
    """An answer in which an assistant declines or speaks of itself, in English and a few phrases of other languages."""
    lowered = text.lower().replace("’", "'")
    for signs, pattern in _PHRASES.items():
        if any(map(lowered.__contains__, signs)) and (found := pattern.search(lowered)):
            return Flaw("refusal", f"an assistant's own words: {quoted(lowered[found.start() :], 60)}")
    return None
