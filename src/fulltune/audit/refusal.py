"""Answers that a model declined to give, or in which it speaks of itself."""

from __future__ import annotations

import re

from fulltune.audit.flaw import Flaw, quoted

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
_NOT_ABLE = (
    "cannot",
    "can't",
    "can not",
    "unable to",
    "not able to",
    "won't",
    "programmed",
    "decline",
    "will not",
    "not going",
)
_PHRASES: tuple[tuple[tuple[str, ...], re.Pattern[str]], ...] = tuple(
    (signs, re.compile(pattern))
    for signs, pattern in (
        # Declines.
        (
            _NOT_ABLE,
            rf"\b(?:sorry|apologi[sz]e|apologies|unfortunately|i'm afraid),? (?:but |that )?i ?{_CANNOT} (?:\w+ )?"
            rf"(?:{_HELP}|{_MAKE}|do that)\b"
            rf"|\A\W*i ?(?:{_CANNOT}|{_WILL_NOT}) (?:\w+ )?{_HELP}\b"
            rf"|\bi ?(?:{_CANNOT}|{_WILL_NOT}) (?:help|assist)(?: you)?"
            r"(?: (?:with|in) (?:th(?:at|is)|it|such)\b|[.,!]|\Z)"
            rf"|\A\W*i ?(?:{_CANNOT}|{_WILL_NOT}) (?:help )?(?:\w+ )?{_MAKE} (?:\w+ ){{0,3}}{_MADE}\b",
        ),
        (
            ("comfortable",),
            r"\bi(?: don't feel|'m not| am not) comfortable "
            r"(?:with (?:this|that|your)|(?:writ|creat|generat|provid|discuss|answer|engag)\w*)",
        ),
        (
            ("decline",),
            r"\bi (?:\w+ ){0,2}(?:must|have to|need to|will) (?:\w+ )?decline "
            r"(?:to (?:help|assist|answer|provide|write|discuss|engage)|(?:this|that|your) (?:request|task|question))",
        ),
        # Its rules.
        (
            ("guideline", "polic", "my programming"),
            r"\b(?:against|violates?|violation of) (?:my|openai's|our) (?:\w+ )?(?:guidelines|polic|programming\b)"
            r"|\bmy (?:safety |ethical |content )(?:guidelines|polic)|\bopenai's (?:content|use|usage) polic",
        ),
        (("for me to",), r"\b(?:un|not |in|il|irr)(?:ethical|appropriate|legal|responsible) (?:\w+ ){0,2}for me to\b"),
        (("i am programmed", "i'm programmed"), r"\bi(?:'m| am) programmed to\b"),
        # What it is.
        (
            ("as a", "being a"),
            r"\b(?:as|being) an? (?:\w+ )?"
            r"(?:ai\b(?! (?:company|consult|develop(?!ed)|engineer|enthus|expert|lab\b|profess|research|scien|startup"
            r"|student))"
            r"|artificial intelligence(?=,| (?:i|language|model|assistant)\b)|(?:large )?language model"
            r"|virtual assistant)"
            r"|\bas an? (?:responsible|helpful|harmless|ethical) (?:\w+ ){0,3}assistant",
        ),
        (
            ("i'm", "i am", "i was"),
            r"\bi was (?:created|trained|made|developed|built) by "
            r"(?:openai|anthropic|google|meta|mistral|alibaba|deepseek)\b"
            r"|\bi(?:'m| am) (?:just |only |merely |actually )?(?:an ai\b|an artificial intelligence"
            r"|an? (?:large )?language model|a computer program|(?:chatgpt|claude|gemini|bard|copilot|llama|qwen)\b)",
        ),
        # What it knows.
        (
            ("my knowledge", "my training", "as of my"),
            r"\bmy (?:knowledge|training)(?: data)? (?:cut-?off|only goes|goes up|ends|extends)"
            r"|\bas of my (?:last|latest|knowledge|training)",
        ),
        (
            ("not have", "n't have"),
            r"\bi (?:do not|don't) have (?:(?:direct )?access to (?:real-?time|current|up-to-date|live|external"
            r"|the internet|your personal)|(?:personal )?(?:feelings|opinions|emotions|beliefs|experiences)\b"
            r"|the ability to (?:browse|access|feel|see))",
        ),
        (
            ("browse", "access", "open the", "open link", "view "),
            rf"\bi ?{_CANNOT} (?:\w+ )?(?:browse|access|open|view) (?:the (?:internet|web)|links|urls|external|images)",
        ),
        # In other languages.
        (
            ("als ", "leid"),
            r"\bals (?:ein )?(?:ki\b|künstliche intelligenz|(?:großes )?sprachmodell)"
            r"|\btut mir leid,? (?:aber )?(?:\w+ ){0,3}kann (?:\w+ ){0,4}nicht "
            r"(?:helfen|weiterhelfen|beantworten|erfüllen)",
        ),
        (
            ("en tant", "désol"),
            r"\ben tant qu(?:e |')(?:ia\b|intelligence artificielle|modèle (?:de langage|linguistique)"
            r"|assistant virtuel)"
            r"|\bdésolée?,? (?:mais )?je ne peux pas (?:vous |t')?(?:aider|répondre|fournir|accéder|satisfaire)",
        ),
        (
            ("como ", "siento", "desculp", "sinto", "lamento"),
            r"\bcomo (?:una? |uma )?(?:ia\b|inteligencia artificial|inteligência artificial"
            r"|modelo (?:de (?:lenguaje|linguagem)|lingüístico))"
            r"|\b(?:lo siento|desculpe|sinto muito|lamento),? (?:pero |mas )?n(?:o puedo|ão posso) (?:\w+ )?"
            r"(?:ayud|ajud|cumpl|cumpr|respond|proporc|fornec|gener|asist|atend)",
        ),
        (
            ("in quanto", "come ", "dispiace"),
            r"\b(?:in quanto|come) (?:un |un')?(?:ia\b|intelligenza artificiale|modello (?:linguistico|di linguaggio))"
            r"|\bmi dispiace,? (?:ma )?non posso (?:aiut|rispond|forn|soddisf)",
        ),
        (
            ("как ", "не могу"),
            r"\bкак (?:языковая модель|искусственный интеллект|ии\b)"
            r"|\bя не могу (?:вам )?(?:помочь с этим|выполнить (?:этот|ваш|данный) запрос|предоставить (?:эту|такую))",
        ),
        (
            ("作为", "抱歉", "对不起"),
            r"作为(?:一个|一名|一款)?(?:(?:人工智能|ai)(?=[,，]|助手|语言|模型)|大型语言模型|语言模型)"
            r"|(?:抱歉|对不起)[,，。 ]*我?(?:无法|不能)(?:提供|协助|帮|回答|满足|完成)",
        ),
        (
            ("として", "申し訳"),
            r"(?:ai|人工知能|言語モデル)として|申し訳(?:ありません|ございません)が、[^。]{0,30}(?:できません|できかねます)",
        ),
        (("죄송", "로서"), r"죄송하지만,? ?[^.]{0,30}수 없습니다|(?:ai|인공지능|언어 모델)로서"),
    )
)
"""Signs, of which one stands in each phrase, and the phrases: looking for signs first takes a tenth of the time."""


def refusal(text: str) -> Flaw | None:
    """An answer in which an assistant declines or speaks of itself, in English and a few phrases of other languages."""
    lowered = text.lower().replace("’", "'")
    for signs, pattern in _PHRASES:
        if any(map(lowered.__contains__, signs)) and (found := pattern.search(lowered)):
            return Flaw("refusal", f"an assistant's own words: {quoted(lowered[found.start() :], 60)}")
    return None
