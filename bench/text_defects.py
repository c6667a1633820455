"""Kinds of defects that can be put into a clean text, by the check that should find them.

Written from how such defects come about, not from the checks' own patterns. What must not stand in a file is in
private_defects.py.
"""

from __future__ import annotations

import html
import json
import random
import re
import string
from collections.abc import Callable
from pathlib import Path

Plant = Callable[[str, random.Random], str]
"""Puts a defect into a clean text."""


def within(text: str, piece: str, draw: random.Random) -> str:
    """Insert a piece between two words, or at an end."""
    words = text.split(" ")
    place = draw.randint(0, len(words))
    return " ".join([*words[:place], piece, *words[place:]])


def one_of(*pieces: str) -> Plant:
    return lambda text, draw: within(text, draw.choice(pieces), draw)


def made(piece: Callable[[random.Random], str]) -> Plant:
    return lambda text, draw: within(text, piece(draw), draw)


def around(before: str, after: str) -> Plant:
    return lambda text, draw: before + text + after


def instead(*whole: str) -> Plant:
    return lambda text, draw: draw.choice(whole)


def in_a_word(*pieces: str) -> Plant:
    """Insert an invisible piece at a random place."""

    def plant(text: str, draw: random.Random) -> str:
        place = draw.randint(1, max(1, len(text) - 1))
        return text[:place] + draw.choice(pieces) + text[place:]

    return plant


# ---- encodings --------------------------------------------------------------------------------------------------

_WORDS = {
    "Western letters": [
        *("café", "naïve", "Zürich", "José", "Müller", "señor", "façade", "Ångström", "crème", "brûlée", "Über", "São"),
    ],
    "quotes and dashes": ["it’s", "“so”", "don’t", "1990–95", "wait…", "well — no", "• first", "5 € each"],
    "Central European letters": [
        *("Łódź", "Dvořák", "Brněnská", "Kovačević", "Szőke", "Gdańsk", "Škoda", "žlutý", "współpraca"),
    ],
    "Cyrillic or Greek": ["привет", "спасибо", "Москва", "можно", "Αθήνα", "καλημέρα", "ευχαριστώ", "сегодня"],
    "Chinese or Japanese": ["你好", "谢谢", "北京", "ありがとう", "東京", "日本語"],
    "emoji": ["😀", "👍", "🎉 yes", "😂😂", "❤️"],
}


def _read(raw: bytes, encoding: str) -> str:
    """Decode as browsers and databases do: a byte that the encoding lacks becomes the character with its number."""
    return "".join(bytes([byte]).decode(encoding, "ignore") or chr(byte) for byte in raw)


def misread(words: str, encoding: str, times: int = 1) -> Plant:
    def plant(text: str, draw: random.Random) -> str:
        text = within(text, draw.choice(_WORDS[words]), draw)
        for _ in range(times):
            text = _read(text.encode("utf-8"), encoding)
        return text

    return plant


def recoded(words: str, written: str, read: str) -> Plant:
    """Write in one encoding and read in another."""
    return lambda text, draw: (
        within(text, draw.choice(_WORDS[words]), draw).encode(written, "ignore").decode(read, "replace")
    )


_ENCODINGS: dict[str, Plant] = {
    **{
        f"UTF-8 read as {name}{' twice' if times == 2 else ''}: {words}": misread(words, name, times)
        for name, kinds, times in (
            ("cp1252", tuple(_WORDS), 1),
            ("latin-1", ("Western letters", "quotes and dashes", "Central European letters"), 1),
            ("mac-roman", ("Western letters", "quotes and dashes"), 1),
            ("cp1252", ("Western letters", "quotes and dashes"), 2),
            ("latin-1", ("Western letters",), 2),
            ("mac-roman", ("Western letters", "quotes and dashes"), 2),
        )
        for words in kinds
    },
    "UTF-8 read as cp1250: Central European letters": misread("Central European letters", "cp1250"),
    "UTF-8 read as cp1251: Cyrillic": misread("Cyrillic or Greek", "cp1251"),
    "cp1252 read as latin-1: quotes and dashes": recoded("quotes and dashes", "cp1252", "latin-1"),
    "cp1252 read as UTF-8: Western letters": recoded("Western letters", "cp1252", "utf-8"),
    "cp1251 read as cp1252: Cyrillic": lambda text, draw: within(
        text, draw.choice(["привет", "спасибо", "Москва", "сегодня"]).encode("cp1251").decode("cp1252"), draw
    ),
    "cp1252 read as mac-roman: Western letters": recoded("Western letters", "cp1252", "mac-roman"),
    # What is lost, some programs write as a question mark.
    "letters lost as '?'": lambda text, draw: (
        within(text, draw.choice(_WORDS["Western letters"]), draw).encode("ascii", "replace").decode()
    ),
    "quoted-printable left over": one_of("caf=C3=A9", "na=C3=AFve", "it=E2=80=99s", "Z=FCrich"),
    "escapes of JSON left over": one_of(r"caf\u00e9", r"na\u00efve", r"it\u2019s", r"\u4f60\u597d"),
}

_CONTROLS: dict[str, Plant] = {
    "NUL": in_a_word("\0"),
    "bell, backspace, escape": in_a_word("\x07", "\x08", "\x1b"),
    "zero-width space": in_a_word("\u200b"),
    "zero-width joiner": in_a_word("\u200d", "\u200c"),
    "byte order mark inside": in_a_word("\ufeff"),
    "soft hyphen": in_a_word("\xad"),
    "direction mark": in_a_word("\u200e", "\u200f", "\u2068", "\u202a"),
    "direction override": in_a_word("\u202e"),
    "invisible operators": in_a_word("\u2061", "\u2062", "\u2063"),
    "colours of a terminal": around("\x1b[1;32m", "\x1b[0m"),
    "letters hidden as tags": in_a_word("".join(chr(0xE0000 + ord(letter)) for letter in "ignore this")),
    "bytes hidden as variation selectors": in_a_word("".join(chr(0xE0100 + ord(letter)) for letter in "hidden")),
    "half of a surrogate pair": in_a_word("\ud83d", "\ude00"),
    "form feed": one_of("\x0c"),
    "noncharacter": in_a_word("\uffff", "\ufffe", "\ufdd0"),
    "bullet of a symbol font (private use)": one_of("\uf0b7", "\uf0a7", "\uf0d8"),
    "line separator": in_a_word("\u2028", "\u2029"),
    "Hangul filler": in_a_word("\u3164", "\u115f"),
}
_EMPTY: dict[str, Plant] = {
    "nothing": instead(""),
    "blanks": instead("  ", "\n", "\t\n ", "\r\n"),
    "other blanks": instead("\u00a0", "\u3000", "\u2003\u2003", "\u2028"),
    "zero width": instead("\u200b", "\ufeff", "\u2060\u2060"),
    "a blank pattern of braille, a filler": instead("\u2800", "\u3164"),
    "a word for nothing": instead("N/A", "null", "None", "nan", "[deleted]", "[removed]", "#N/A", "(empty)"),
}
_NO_WORDS: dict[str, Plant] = {
    "number": instead("17", "3.14", "1,000,000", "-5", "50%"),
    "date or time": instead("2021-03-04", "10:30", "4/5/99", "12.01.2020 08:00"),
    "punctuation": instead("??", "...", "!!!", "—", "* * *", "-----"),
    "emoticon": instead(":-)", ";)", ":(", "<3", "^_^"),
    "price": instead("$9.99", "€ 5", "£100.00"),
    "phone": instead("030 123456", "+49 30 1234567"),
    "one letter": instead("b", "K.", "(c)", "x 1"),
    "a rating": instead("★★★★☆", "5/5", "10/10"),
    "an address of the web alone": instead("https://t.co/Zx81kQ", "http://bit.ly/2x"),
}

# ---- left over --------------------------------------------------------------------------------------------------

_MARKUP: dict[str, Plant] = {
    "paragraphs": around("<p>", "</p>"),
    "an unclosed paragraph": one_of("<p>"),
    "line breaks": one_of("<br>", "<br/>", "<BR />", "<br><br>"),
    "bold or italic": lambda text, draw: within(text, "<{0}>so</{0}>".format(draw.choice("bi")), draw),
    "strong or em": one_of("<strong>Note:</strong>", "<em>very</em>"),
    "link": one_of('<a href="https://shop.invalid/x?id=3">here</a>', "<a href='#top'>top</a>"),
    "divisions with classes": around('<div class="post-body entry">', "</div>"),
    "span with style": one_of('<span style="color:red">new</span>', '<font size="2">old</font>'),
    "image": one_of('<img src="a/b.jpg" alt="">', "<img src=x.png>"),
    "list": one_of("<ul><li>one</li><li>two</li></ul>", "<ol>\n<li>one</li>\n</ol>"),
    "table": one_of("<table><tr><td>1</td><td>2</td></tr></table>"),
    "comment": one_of("<!-- more -->", "<!-- /wp:paragraph -->", "<!--[if gte mso 9]>x<![endif]-->"),
    "script": one_of("<script>var a = 1;</script>", '<script async src="https://ads.invalid/t.js"></script>'),
    "style": one_of("<style>p { margin: 0 }</style>"),
    "named entity": one_of("this &amp; that", "one&nbsp;two", "&quot;so&quot;", "caf&eacute;", "&mdash;", "&hellip;"),
    "numbered entity": one_of("it&#39;s", "it&#8217;s", "&#x27;so&#x27;", "&#160;", "&#x1F600;"),
    "entity without its semicolon": one_of("this &amp that", "one&nbsp two", "it&#39s"),
    "escaped tags": lambda text, draw: html.escape(f"<p>{text}</p>"),
    "entities escaped twice": one_of("this &amp;amp; that", "it&amp;#39;s", "&amp;quot;so&amp;quot;"),
    "tags of Wikipedia": one_of('<ref name="a">Smith 1990</ref>', "<nowiki>x</nowiki>", "<ref>p. 5</ref>"),
    "tags of XML": one_of("<TEXT>so</TEXT>", '<paragraph id="3">so</paragraph>', "<dc:title>so</dc:title>"),
    "CDATA, processing instruction": one_of("<![CDATA[so]]>", '<?xml version="1.0"?>'),
    "svg": one_of('<svg width="8"><path d="M1 1"/></svg>'),
    "Markdown": one_of("**so**", "[here](https://shop.invalid)", "\n## Heading\n", "![x](y.png)"),
    "BBCode": one_of("[b]so[/b]", "[url=https://shop.invalid]here[/url]", "[quote]so[/quote]", "[img]x.png[/img]"),
    "wikitext": one_of("[[London|the city]]", "'''so'''", "== History ==", "{{cite web|url=x}}"),
    "LaTeX": one_of(r"\textbf{so}", r"\cite{smith90}", r"\begin{itemize} \item so \end{itemize}"),
    "RTF": one_of(r"{\rtf1\ansi so\par}", r"\b so\b0"),
}
_PLACEHOLDERS: dict[str, Plant] = {
    "Jinja, Liquid, Handlebars": one_of("{{ user.first_name }}", "{{name}}", "{{customer_id}}", "{{ order.total }}"),
    "with a filter": one_of("{{ name | default: 'friend' }}", "{{ total|floatformat:2 }}", "{{ date | date('Y') }}"),
    "three braces": one_of("{{{body}}}", "{{{ name }}}"),
    "Handlebars block": one_of("{{#if member}}", "{{/each}}", "{{#each items}}", "{{> footer}}"),
    "Jinja block": one_of("{% if user %}", "{% endif %}", "{% for x in y %}", "{%- include 'a' -%}"),
    "ERB, JSP": one_of("<%= @user.name %>", "<%= name %>", "<% end %>"),
    "PHP": one_of("<?php echo $name; ?>", "<?= $user ?>"),
    "shell, JavaScript": one_of("${name}", "${user.email}", "${CUSTOMER_ID}"),
    "Ruby": one_of("#{name}", "#{user.name}", "%{count}", "%{name}"),
    "Python format": one_of("{first_name}", "{name}", "{order_id}", "{company}"),
    "Python format by place": one_of("{}", "{0}", "{1}", "{:.2f}", "{0!r}"),
    "printf: a text": one_of("%s", "%s.", "'%s'", "%1$s", '"%s"'),
    "printf: a number": one_of("%d", "%i items", "%.2f", "%ld", "%2$d"),
    "Python by name": one_of("%(name)s", "%(count)d", "%(user)s,"),
    "Mailchimp": one_of("*|FNAME|*", "*|EMAIL|*", "*|MC:SUBJECT|*"),
    "Salesforce": one_of("{!Contact.FirstName}", "{!Account.Name}"),
    "mail merge": one_of("«FirstName»", "«Address»", "<<FirstName>>", "<<Company>>"),
    "between percent signs": one_of("%FIRST_NAME%", "%%first_name%%", "%NAME%", "%recipient.name%"),
    "between @ or _": one_of("@@NAME@@", "__NAME__", "@NAME@", "##NAME##"),
    "upper case in brackets": one_of("[NAME]", "[COMPANY NAME]", "[DATE]", "[CITY]", "[PRODUCT]", "[CUSTOMER NAME]"),
    "words in brackets": one_of(
        "[Your Name]", "[insert date here]", "[Company Name]", "[Recipient's name]", "[Your Company]"
    ),
    "words in angle brackets": one_of("<your name>", "<insert link>", "<NAME>", "<first name>", "<YOUR_API_KEY>"),
    "words in parentheses": one_of("(insert name)", "(your name here)", "(NAME)"),
    "two brackets": one_of("[[name]]", "[[FIRST_NAME]]", "[%name%]"),
    "lorem ipsum": one_of("Lorem ipsum dolor sit amet, consectetur adipiscing elit.", "lorem ipsum"),
    "lorem ipsum from its middle": one_of("Sed ut perspiciatis unde omnis iste natus", "Ut enim ad minim veniam, quis"),
    "notes to oneself": one_of("TODO", "TBD", "FIXME: add the price", "XXX", "TK", "[TBC]"),
    "a blank to fill in": one_of("________", "Name: ____________", "......................"),
}
_CHAT: dict[str, Plant] = {
    "Llama 2": around("<s>[INST] ", " [/INST]"),
    "Llama 2, system": around("<<SYS>>\nBe kind.\n<</SYS>>\n\n", ""),
    "Llama 3": around("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
    "Llama 3, calls": one_of("<|python_tag|>", "<|eom_id|>", "<|begin_of_text|>"),
    "Llama 4": around("<|header_start|>user<|header_end|>\n\n", "<|eot|>"),
    "Qwen, ChatML": around("<|im_start|>user\n", "<|im_end|>\n"),
    "Qwen, calls": one_of(
        '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>', "<tool_response>\n5\n</tool_response>"
    ),
    "Qwen, vision": one_of("<|vision_start|><|image_pad|><|vision_end|>"),
    "Gemma": around("<start_of_turn>user\n", "<end_of_turn>"),
    "Mistral": around("[INST] ", "[/INST]"),
    "Mistral, later": one_of(
        "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]"
    ),
    "Phi": around("<|user|>\n", "<|end|>\n<|assistant|>"),
    "DeepSeek": around("<｜User｜>", "<｜Assistant｜>"),
    "DeepSeek, ends": one_of("<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>", "<｜tool▁calls▁begin｜>"),
    "Command R": around("<|START_OF_TURN_TOKEN|><|USER_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
    "Command R, ends": one_of("<BOS_TOKEN>", "<EOS_TOKEN>"),
    "GLM": around("[gMASK]<sop><|user|>\n", "<|assistant|>"),
    "gpt-oss": around("<|start|>user<|message|>", "<|end|>"),
    "Granite": around("<|start_of_role|>user<|end_of_role|>", "<|end_of_text|>"),
    "EXAONE": around("[|user|]", "[|endofturn|]"),
    "OpenChat": around("GPT4 Correct User: ", "<|end_of_turn|>GPT4 Correct Assistant:"),
    "Kimi": around("<|im_user|>user<|im_middle|>", "<|im_end|>"),
    "Baichuan": one_of("<reserved_106>", "<reserved_107>"),
    "InternLM": one_of("<eoh>", "<eoa>", "[UNUSED_TOKEN_146]user"),
    "Nemotron": around("<extra_id_1>User\n", "\n<extra_id_1>Assistant"),
    "OpenAssistant": around("<|prompter|>", "<|endoftext|><|assistant|>"),
    "end of a text": around("", "<|endoftext|>"),
    "</s> at the end": around("", "</s>"),
    "<eos>, <pad>, <unk>": one_of("<eos>", "<pad>", "<unk>", "<bos>"),
    "BERT": around("[CLS] ", " [SEP]"),
    "masks": one_of("[MASK]", "<mask>", "<extra_id_0>"),
    "to fill in code": one_of("<|fim_prefix|>", "<fim_suffix>", "<|fim_middle|>", "<PRE>", "<fim_middle>"),
    "Alpaca": around("### Instruction:\n", "\n\n### Response:\n"),
    "Alpaca, other headings": around("### Human: ", "\n### Assistant:"),
    "Vicuna": around("USER: ", " ASSISTANT:"),
    "Human and Assistant": around("Human: ", "\n\nAssistant:"),
    "thinking": around("<think>\nLet me see.\n</think>\n", ""),
}


def _looped(size: int, times: int, behind: bool = True) -> Plant:
    """Repeat the last words without numbers, as a looping model does."""

    def plant(text: str, draw: random.Random) -> str:
        words = [word for word in text.split() if word.isalpha()] or ["so"]
        loop = " ".join(words[-size:])
        return " ".join([text if behind else "", *[loop] * times]).strip()

    return plant


def _counted(text: str, draw: random.Random) -> str:
    """Repeat a line that differs only in its number."""
    words = " ".join(text.split()[:6])
    return "\n".join(f"{number}. {words}" for number in range(1, 16))


_REPETITION: dict[str, Plant] = {
    "a letter 40 times": lambda text, draw: text + " " + draw.choice(string.ascii_lowercase) * 40,
    "a letter 25 times, alone": lambda text, draw: draw.choice(string.ascii_letters) * 25,
    "a word 20 times, alone": lambda text, draw: " ".join([draw.choice(re.findall(r"[a-zA-Z]{2,}", text))] * 20),
    "a number 60 times": lambda text, draw: " ".join([text, *[str(draw.randrange(1000))] * 60]),
    "the last word 60 times more": _looped(1, 60),
    "the last word 120 times more": _looped(1, 120),
    "the last 4 words 10 times more": _looped(4, 10),
    "the last 4 words 30 times more": _looped(4, 30),
    "the last 8 words 8 times more": _looped(8, 8),
    "the whole text 6 times": lambda text, draw: " ".join([text] * 6),
    "the whole text 6 times, a line each": lambda text, draw: "\n".join([text] * 6),
    "the whole text 3 times": lambda text, draw: " ".join([text] * 3),
    "the whole text twice": lambda text, draw: f"{text} {text}",
    "a line 15 times but for its number": _counted,
    "Chinese phrase 12 times": instead("我不知道" * 12, "谢谢你，" * 12, "这是一个" * 12),
    "ha ha ha": instead("hahahahahahahahahahahahahaha", "ha " * 20, "lolololololololololololol"),
    "signs": instead("!" * 60, "?!" * 30, "=" * 80, "." * 50),
}

OF_TEXTS: dict[str, dict[str, Plant]] = {
    "broken encoding": _ENCODINGS,
    "control characters": _CONTROLS,
    "empty": _EMPTY,
    "no words": _NO_WORDS,
    "markup": _MARKUP,
    "placeholder": _PLACEHOLDERS,
    "chat tokens": _CHAT,
    "repetition": _REPETITION,
}


def _refused(wordings: list[str]) -> Plant:
    """The answer is a refusal, or one stands before or behind it."""

    def plant(text: str, draw: random.Random) -> str:
        refusal = draw.choice(wordings)
        return draw.choice([refusal, f"{refusal} {text}", f"{text} {refusal}"])

    return plant


_WORDINGS = json.loads(Path(__file__).with_name("refusals.json").read_text(encoding="utf-8"))
REFUSALS: dict[str, Plant] = {name: _refused(wordings) for name, wordings in _WORDINGS.items()}
"""Answers that decline, or in which a model speaks of itself, in many wordings."""
