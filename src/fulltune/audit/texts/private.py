"""Private data in a text: passwords, keys and tokens of services, e-mail addresses, accounts, cards, phone numbers."""

from __future__ import annotations

import base64
import binascii
import ipaddress
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator

from fulltune.audit.texts.flaw import Flaw, Hit, redacted
from fulltune.errors import SetupError

try:
    import phonenumbers
except ImportError:
    # It comes with the extra `audit`; `missing` says when it is not there.
    phonenumbers = None  # type: ignore[assignment]  # a module else

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
    return redacted("secret", text, _secrets(text))


def _secrets(text: str) -> Iterator[Hit]:
    for name, signs, pattern in _FORMATS if _LONG.search(text) or "-----BEGIN" in text else ():
        if any(sign in text for sign in signs):
            found = (match for match in pattern.finditer(text) if _real(name, match[0]))
            yield from (Hit(*match.span(), name, "[SECRET]") for match in found)
    if "://" in text and "@" in text:
        yield from _values(text, _IN_URL, "password in an address", lambda value: not _NOT_GIVEN.search(value))
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


def _random(value: str) -> bool:
    """Letters and digits, or three kinds of characters, in no order that a word or a name in code would have."""
    if _NOT_GIVEN.search(value):
        return False
    value = value.rstrip(".:!?]}")
    shares = [count / len(value) for count in Counter(value).values()]
    if len(value) < 8 or -sum(share * math.log2(share) for share in shares) < _LEAST_BITS:
        return False
    lower, upper, digit = (re.search(kind, value) is not None for kind in ("[a-z]", "[A-Z]", r"\d"))
    other = re.search(r"[^A-Za-z0-9_.-]", value) is not None
    # Dotted and snake names are code; dates and numbers have no letters.
    if re.fullmatch(r"[A-Za-z_]+\d?(?:[._-][A-Za-z_]+\d?)*", value) or not (lower or upper):
        return False
    return digit or (lower and upper and other)


_EMAIL = re.compile(
    r"(?<![\w.%+/-])\w[\w.%+-]{0,63}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,8}([A-Za-z]{2,24})(?![\w@])"
)
_NOBODY = re.compile(
    r"@(?:[\w-]+\.)*(?:example\.(?:com|org|net|edu)|\w+\.(?:example|test|invalid|localhost|local|lan|internal))$"
    r"|^(?:git|noreply|no-reply|donotreply|do-not-reply|you|your\.?name|user|username|name|someone|email)@"
    r"|^\w@\w\.\w+$|@(?:domain|email|yourdomain|company|test|website)\.com$",
    re.IGNORECASE,
)
_FILES = {"png", "jpg", "jpeg", "gif", "webp", "svg", "css", "js", "py", "txt"}
"""`icon@2x.png` is a file."""

_BETWEEN = r"[ .\t\u00a0\u2007\u2009\u202f\u2010-\u2015\u2212-]"
"""Blanks of all widths, dots and dashes, as they stand between groups of digits."""
_IBAN = re.compile(rf"(?<![A-Za-z0-9])([A-Z]{{2}})(\d{{2}}(?:{_BETWEEN}?[A-Z0-9]){{11,30}})")
_IBAN_LENGTHS = {
    country: int(length)
    for country, length in re.findall(
        r"(\w\w)(\d\d)",
        "AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BR29 BY28 CH21 CR22 CY28 CZ24 DE22 DK18 DO28 EE20 EG29 "
        "ES24 FI18 FO18 FR27 GB22 GE22 GI23 GL18 GR27 GT28 HR21 HU28 IE22 IL23 IQ23 IS26 IT27 JO30 KW30 KZ20 "
        "LB28 LC32 LI21 LT20 LU20 LV21 LY25 MC27 MD24 ME22 MK19 MR27 MT31 MU30 NL18 NO15 PK24 PL28 PS29 PT25 "
        "QA29 RO24 RS22 SA24 SC31 SD18 SE24 SI19 SK24 SM27 ST25 SV28 TL23 TN24 TR26 UA29 VA22 VG24 XK20",
    )
}
"""Characters of an account number by country, from the registry of ISO 13616."""

_CARD = re.compile(
    rf"(?<![\w.,$€£\[-])(?<!\w\()(?:\d{{15,16}}|\d{{4}}(?:{_BETWEEN}\d{{4}}){{3}}(?:{_BETWEEN}\d{{3}})?"
    rf"|\d{{4}}{_BETWEEN}\d{{6}}{_BETWEEN}\d{{4,5}})(?![\w-]|[.,]\d)"
)
_ISSUER = re.compile(
    r"4\d{12}(?:\d{3}){0,2}|5[1-5]\d{14}|2(?:22[1-9]|2[3-9]\d|[3-6]\d\d|7[01]\d|720)\d{12}|3[47]\d{13}"
    r"|6(?:011|4[4-9]\d|5\d\d)\d{12}|3(?:0[0-5]|[689]\d)\d{11}|35(?:2[89]|[3-8]\d)\d{12}|62\d{14,17}"
)
"""Visa, Mastercard, American Express, Discover, Diners, JCB, UnionPay: first digits and lengths."""
_TEST_CARDS = {"4111111111111111", "4242424242424242", "4012888888881881", "5555555555554444", "5105105105105100"}
_TEST_CARDS |= {"378282246310005", "371449635398431", "6011111111111117", "30569309025904", "3530111333300000"}
_IPV4 = re.compile(r"(?<![\w.])(\d{1,3})\.(\d{1,3})\.(\d{1,3})\.(\d{1,3})(?![\w-]|\.\d)")
_IPV6 = re.compile(r"(?<![\w:.])[23][0-9a-fA-F]{3}:[0-9a-fA-F:]{2,34}(?![\w:])")
_VERSION = re.compile(r"(?:version|release|firmware|build|section|chapter|ver\.?|v)\s*$", re.IGNORECASE)
_PUBLIC_SERVICES = {"8.8.8.8", "8.8.4.4", "1.1.1.1", "1.0.0.1", "9.9.9.9", "208.67.222.222", "208.67.220.220"}
_SSN = re.compile(r"(?<![\w-])(?!000|666|9\d\d)\d{3}-(?!00)\d\d-(?!0000)\d{4}(?![\w-])")
_NAMED_SSN = re.compile(
    r"\b(?i:ssn|social security (?:number|no\.?))[ :#]{0,3}(?:is )?(\d{3}[ -]?\d\d[ -]?\d{4})(?![\w-])"
)
_ADVERTISED_SSN = {"078-05-1120", "219-09-9999", "123-45-6789"}
_FOUR_DIGITS = re.compile(r"\d\d\d\d|\d\.\d{1,3}\.\d")


def personal_data(text: str) -> Flaw | None:
    """All kinds but phone numbers, which need a library; well-known examples and test numbers are left alone."""
    # Of accounts, cards and social security numbers each has four digits in a row.
    digits = _FOUR_DIGITS.search(text) is not None or "::" in text or text.count(":") >= 7
    if not digits and "@" not in text:
        return None
    return redacted("personal data", text, _personal(text, digits))


def _personal(text: str, digits: bool) -> Iterator[Hit]:
    if "@" in text:
        found = filter(_somebody, _EMAIL.finditer(text))
        yield from (Hit(*match.span(), "e-mail address", "[EMAIL]") for match in found)
    if digits:
        yield from _numbers(text)


def _numbers(text: str) -> Iterator[Hit]:
    yield from _accounts(text)
    for found in _CARD.finditer(text):
        digits = re.sub(r"\D", "", found[0])
        if _ISSUER.fullmatch(digits) and digits not in _TEST_CARDS and passes_luhn(digits):
            yield Hit(*found.span(), "payment card", "[CARD]")
    for found in _IPV4.finditer(text):
        if _is_public(found):
            yield Hit(*found.span(), "IP address", "[IP]")
    for found in _IPV6.finditer(text):
        if _is_global(found[0]):
            yield Hit(*found.span(), "IP address", "[IP]")
    for found in _NAMED_SSN.finditer(text):
        if found[1] not in _ADVERTISED_SSN:
            yield Hit(*found.span(1), "US social security number", "[SSN]")
    for found in _SSN.finditer(text):
        if found[0] not in _ADVERTISED_SSN:
            yield Hit(*found.span(), "US social security number", "[SSN]")


def _somebody(found: re.Match[str]) -> bool:
    # The password in an address of the web may look like a name.
    word = found.string[max(0, found.start() - 100) : found.start()].rpartition(" ")[2]
    return "://" not in word and not _NOBODY.search(found[0]) and found[1].lower() not in _FILES


def _accounts(text: str) -> Iterator[Hit]:
    for found in _IBAN.finditer(text):
        size = _IBAN_LENGTHS.get(found[1], 0)
        # As many characters as the country has, whatever stands behind them.
        places = [place for place in range(*found.span()) if text[place].isalnum()][:size]
        if not size or len(places) < size or text[places[-1] + 1 : places[-1] + 2].isalnum():
            continue
        if passes_mod_97("".join(text[place] for place in places)):
            yield Hit(found.start(), places[-1] + 1, "account number (IBAN)", "[IBAN]")


def passes_mod_97(iban: str) -> bool:
    """ISO 7064: the check digits of an account number without blanks are right."""
    return int("".join(str(int(character, 36)) for character in iban[4:] + iban[:4])) % 97 == 1


def passes_luhn(digits: str) -> bool:
    """ISO 7812: the last digit of a card's number is right."""
    doubled = (int(digit) * 2 for digit in digits[-2::-2])
    return (sum(map(int, digits[-1::-2])) + sum(value - 9 if value > 9 else value for value in doubled)) % 10 == 0


def _is_global(address: str) -> bool:
    try:
        return ipaddress.IPv6Address(address).is_global
    except ValueError:
        return False


def _is_public(found: re.Match[str]) -> bool:
    """Not a network at home, an example, a public service, or the number of a section or a version."""
    parts = [int(part) for part in found.groups()]
    if max(parts) > 255 or max(parts) < 20 or found[0] in _PUBLIC_SERVICES:
        return False
    if any(len(part) > 1 and part[0] == "0" for part in found.groups()):
        return False
    before = found.string[max(0, found.start() - 12) : found.start()]
    return ipaddress.IPv4Address(found[0]).is_global and not _VERSION.search(before)


_MAYBE_PHONE = re.compile(r"[\d)][\s./-]?(?:\(?\d[\s()./-]{0,2}){5,}\d")
_NAMED_PHONE = re.compile(
    r"\b(?:(?:tel|telephone|t[ée]l[ée]phone|telefone?|tel[ée]fono|тел|телефон|phone|fax|whatsapp)[ .:#]{1,4}"
    r"(?:no\.? |number |is ){0,2}(\(?\+?\d[\d ()./-]{6,18}\d)(?!\w)"
    r"|(?:t[ée]l|mobile|mobil|handy|cell|call(?: me| us)?(?: on| at)?)[ .:#]{1,4}"
    r"(?:no\.? |number |is ){0,2}(\(?0\d[\d ()./-]{6,18}\d)(?!\w))",
    re.IGNORECASE,
)
"""What a word announces; behind some words, which may stand before any number, with its trunk zero."""
_WITH_TWO_ZEROS = re.compile(r"(?<![\w.+])00([1-9]\d{0,2} \(?[\d ()./-]{5,16}\d)(?!\w)")
_NORTH_AMERICAN = re.compile(
    r"(?:1[ .-])?(?:\(\d{3}\)[ .-]?|\d{3}[ ./-] ?)\d{3}[ .-]\d{4}(?:\s?(?:x|ext)\D{0,3}\d{1,6})?"
)
_INTERNATIONAL = re.compile(r"\+[\d(](?!\d*\.\d{5})")
_FICTIONAL = re.compile(r"1?[2-9]\d\d55501\d\d")
"""North American numbers that are given to nobody, for films."""


def knows_phone_numbers() -> bool:
    """Whether phonenumbers is installed."""
    return phonenumbers is not None


def phone_number(text: str) -> Flaw | None:
    """Phone numbers that the numbering plans allow: with a country's code, in North American form, or named as one."""
    if phonenumbers is None:
        raise SetupError("looking for phone numbers needs the package 'phonenumbers'; pip install 'fulltune[audit]'")
    if not _MAYBE_PHONE.search(text):
        return None
    named = [found.span(found.lastindex or 0) for found in _NAMED_PHONE.finditer(text)]
    named += [found.span() for found in _WITH_TWO_ZEROS.finditer(text) if _is_assigned(f"+{found[1]}")]
    hits = [Hit(*span, "phone number", "[PHONE]") for span in named]
    for number in phonenumbers.PhoneNumberMatcher(text, "US"):
        raw, before = number.raw_string, text[: number.start].rstrip(" ")[-1:]
        # Ten digits in a row may be any number, and so may those of a sum.
        written = _INTERNATIONAL.match(raw) or _NORTH_AMERICAN.fullmatch(raw)
        if written and before not in set("=+-*/<>^×") and not _FICTIONAL.fullmatch(re.sub(r"\D", "", raw)):
            hits.append(Hit(number.start, number.end, "phone number", "[PHONE]"))
    return redacted("phone number", text, hits)


def _is_assigned(number: str) -> bool:
    try:
        return bool(phonenumbers.is_valid_number(phonenumbers.parse(number)))
    except phonenumbers.NumberParseException:
        return False
