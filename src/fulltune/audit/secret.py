"""Passwords, keys and tokens of services in a text, by a short table of formats that their issuers published.

Kept by hand: on 500 customers' questions detect-secrets 1.5 (`scan_line`) takes 0.9 to 1.2 ms each, this 5 µs; it
reports all 500, because on a single line its entropy detectors take any word for a secret; and it changes settings of
its process. Its detectors called one by one take 0.16 ms, do not know the present tokens of OpenAI, Hugging Face,
Google and GitHub (`github_pat_`), and give values without their places, which a redaction needs. Nothing is asked over
the network.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator

from fulltune.audit.flaw import Flaw, Hit, redacted

_SERVICES = {
    "ya29.": r"[\w-]{60,}",
    "dop_v1_": "[a-f0-9]{64}",
    "shp": "(?:at|ca|pa|ss)_[a-f0-9]{32}",
    "sq0": r"[a-z]{3}-[\w-]{22,43}",
    "dapi": "[a-f0-9]{32}",
    "ntn_": "[A-Za-z0-9]{46}",
    "lin_api_": "[A-Za-z0-9]{40}",
    "figd_": r"[\w-]{40,}",
    "dckr_pat_": r"[\w-]{27,}",
    "glsa_": "[A-Za-z0-9]{32}_[a-f0-9]{8}",
    "hvs.": r"[\w-]{24,}",
    "sbp_": "[a-f0-9]{40}",
    "PMAK-": "[a-f0-9]{24}-[a-f0-9]{34}",
    "NRAK-": "[A-Z0-9]{27}",
    "gsk_": "[A-Za-z0-9]{52}",
    "xai-": "[A-Za-z0-9]{80}",
    "r8_": "[A-Za-z0-9]{37}",
    "pplx-": "[A-Za-z0-9]{48}",
    "tvly-": "[A-Za-z0-9-]{32,}",
    "sntry": r"[su]_[\w+/=-]{60,}",
    "lsv2_": "(?:pt|sk)_[a-f0-9]{32}_[a-f0-9]{10}",
    "ATATT3": r"[\w=-]{60,}",
    "AGE-SECRET-KEY-1": "[A-Z0-9]{58}",
    "EAA": "[A-Za-z0-9]{100,}",
    "sk-": "(?:or-v1-|lf-)?[a-f0-9-]{32,64}",
    "key-": "[a-f0-9]{32}",
    "SK": "[a-f0-9]{32}",
}
"""Google, DigitalOcean, Shopify, Square, Databricks, Notion, Linear, Figma, Docker, Grafana, Vault, Supabase, Postman,
New Relic, Groq, xAI, Replicate, Perplexity, Tavily, Sentry, LangSmith, Atlassian, age, Facebook, OpenRouter,
Mailgun, Twilio."""
_FORMATS: tuple[tuple[str, tuple[str, ...], re.Pattern[str]], ...] = tuple(
    (name, signs, re.compile(pattern, re.DOTALL))
    for name, signs, pattern in (
        (
            "private key",
            ("-----BEGIN",),
            r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----"
            r"(?:(?:[\w+/=\s\\:,.]|-(?!-)){40,}|(?=[^-$<{]{0,39}-----END))(?:[^-]{0,39}-----END [A-Z0-9 ]{3,40}-----)?",
        ),
        (
            "private key",
            ("Private-Lines:",),
            r"Private-Lines: \d+(?:\s|\\[rn])+(?=[\w+/=]{40})[\w+/=\s\\]+(?:-MAC: [a-f0-9]+)?",
        ),
        ("AWS access key", ("AKIA", "ASIA"), r"(?<![A-Za-z0-9])(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9])"),
        ("GitHub token", ("gh", "github_pat_"), r"\b(?:gh[pousr]_[A-Za-z0-9]{36,251}|github_pat_[A-Za-z0-9_]{82})\b"),
        ("GitLab token", ("gl",), r"\bgl(?:pat|dt|ft|soat|rt|ptt|cbt)-[\w-]{20,64}"),
        (
            "Slack token",
            ("xox", "xapp"),
            r"\b(?:xox[abeoprs]-(?:\d+-)+[A-Za-z0-9-]{10,}|xapp-\d-\w+-\d+-[a-f0-9]{32,})",
        ),
        ("Slack webhook", ("hooks.slack",), r"https://hooks\.slack\.com/services/T\w{6,}/B\w{6,}/\w{20,}"),
        ("Google key", ("AIza", "GOCSPX"), r"\b(?:AIza[\w-]{35}|GOCSPX-[\w-]{28})(?![\w-])"),
        ("OpenAI or Anthropic key", ("sk-",), r"(?<![\w-])sk-(?=[\w-]*\d)(?=[\w-]*[A-Z])[\w-]{32,200}"),
        ("Hugging Face token", ("hf_",), r"\bhf_(?=\w*[A-Z])(?=\w*[a-z])[A-Za-z0-9]{34}\b"),
        ("Stripe key", ("k_live_", "whsec_"), r"\b(?:[rs]k_live_[A-Za-z0-9]{24,99}|whsec_[A-Za-z0-9+/=]{32,})"),
        ("SendGrid key", ("SG.",), r"\bSG\.[\w-]{22}\.[\w-]{43}\b"),
        ("npm or PyPI token", ("npm_", "pypi-"), r"\b(?:npm_[A-Za-z0-9]{36}|pypi-AgE[\w-]{70,})\b"),
        (
            "token of a service",
            tuple(_SERVICES),
            rf"\b(?:{'|'.join(re.escape(sign) + behind for sign, behind in _SERVICES.items())})(?![A-Za-z0-9])",
        ),
        ("Mailchimp key", ("-us",), r"\b[a-f0-9]{32}-us\d{1,2}\b"),
        ("Telegram token", (":AA",), r"\b\d{8,10}:AA[\w-]{33}(?![\w-])"),
        ("Discord token", (".",), r"\b[MN][A-Za-z0-9]{23,25}\.[\w-]{6}\.[\w-]{27,38}(?![\w-])"),
        ("Terraform token", (".atlasv1.",), r"\b[A-Za-z0-9]{14}\.atlasv1\.[\w-]{60,}"),
        ("JSON web token", ("eyJ",), r"\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{20,}"),
    )
)
"""What it is, of what one must stand in the text, and how it looks."""
_IN_URL = re.compile(
    r"\b[a-z][a-z0-9+.-]{1,20}://[^\s/:@'\"<>]{0,64}:([^\s/@,'\"<>]{3,100})@(?!localhost|[\w.-]*example\.)[\w.-]+",
    re.IGNORECASE,
)
_KEYWORDS = ("passw", "passwd", "pwd", "secret", "token", "key", "credential", "passwort")
_ASSIGNED = re.compile(
    r"(?:passwor[dt]|passwd|pwd|secret|token|credential|api_?-?key|access_?-?key|account_?-?key|auth_?-?key|private_?-?key)"
    r"\w{0,20}[\"'\]]{0,2}\s{0,3}(?:=|:=?|=>)\s{0,3}[\"'`]?([^\s\"'`,;<>]{8,100})",
    re.IGNORECASE,
)
_LONG = re.compile(r"[\w.:+/=-]{20}")
"""All but keys in several lines are so long: hardly any word is."""
_SAID = re.compile(r"\b(?:password|passcode|passwort|pwd) (?:is|ist) [\"'`]?([^\s\"'`,;<>]{8,100})", re.IGNORECASE)
_HEADER = re.compile(r"\b(?:[Bb]earer|Basic) ([\w+/=.~-]{20,1000})")
_NOT_GIVEN = re.compile(
    r"(?<![a-z])(?:example|sample|dummy|test|your|change|placeholder|redacted)|xxx|\*{3}|\.{3}|…|1234|abcd|abc.?123|_token_|\$\{|\{\{|^\$|^\{|^<|^%|\[|[()]"
    r"|://|^(?:pass(?:w(?:or)?d)?|pwd|secret|tiger)$",
    re.IGNORECASE,
)
_LEAST_BITS = 3.0
"""Entropy per character: below it stand words, above it eight or more different characters."""


def secret(text: str) -> Flaw | None:
    """Keys and tokens in their published formats, passwords in addresses, and random values given to a password."""
    return redacted("secret", text, _hits(text))


def _hits(text: str) -> Iterator[Hit]:
    for name, signs, pattern in _FORMATS if _LONG.search(text) or "-----BEGIN" in text else ():
        if any(sign in text for sign in signs):
            found = (match for match in pattern.finditer(text) if _real(name, match[0]))
            yield from (Hit(*match.span(), name, "[SECRET]") for match in found)
    if "://" in text and "@" in text:
        yield from _values(text, _IN_URL, "password in an address", _given)
    if "=" in text or ":" in text:
        lowered = text.lower()
        if any(word in lowered for word in _KEYWORDS):
            yield from _values(text, _ASSIGNED, "password or key", _random)
    if "pass" in text or "Pass" in text:
        yield from _values(text, _SAID, "password", _random)
    if "Bearer " in text or "Basic " in text:
        yield from _values(text, _HEADER, "authorisation", _random)


def _values(text: str, pattern: re.Pattern[str], what: str, is_one: Callable[[str], bool]) -> Iterator[Hit]:
    yield from (Hit(*found.span(1), what, "[SECRET]") for found in pattern.finditer(text) if is_one(found[1]))


def _real(name: str, value: str) -> bool:
    """Not the issuer's own example; a web token's head says how it is signed."""
    if name == "JSON web token":
        head = value.partition(".")[0]
        try:
            return "alg" in json.loads(base64.urlsafe_b64decode(head + "=" * (-len(head) % 4)))
        except (ValueError, binascii.Error, TypeError):
            return False
    return name == "private key" or not re.search(r"EXAMPLE|x{6}|X{6}|0{8}", value)


def _given(value: str) -> bool:
    return not _NOT_GIVEN.search(value)


def _random(value: str) -> bool:
    """Letters and digits, or three kinds of characters, in no order that a word or a name in code would have."""
    if _NOT_GIVEN.search(value):
        return False
    value = value.rstrip(".:!?]}")
    if len(value) < 8 or _bits(value) < _LEAST_BITS:
        return False
    lower, upper, digit = (re.search(kind, value) is not None for kind in ("[a-z]", "[A-Z]", r"\d"))
    other = re.search(r"[^A-Za-z0-9_.-]", value) is not None
    # Dotted and snake names are code; dates and numbers have no letters.
    if re.fullmatch(r"[A-Za-z_]+\d?(?:[._-][A-Za-z_]+\d?)*", value) or not (lower or upper):
        return False
    return digit or (lower and upper and other)


def _bits(value: str) -> float:
    """Shannon's entropy of the value's characters, per character."""
    return -sum(count / len(value) * math.log2(count / len(value)) for count in Counter(value).values())
