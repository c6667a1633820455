"""Private data in a text: passwords, keys and tokens of services, e-mail addresses, accounts, cards, phone numbers."""

from __future__ import annotations

import importlib.util
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import cache

from fulltune.audit.texts.flaw import PATTERNS, Flaw, compiled, redacted
from fulltune.errors import SetupError

_Hit = tuple[int, int, str, str]
_MAYBE_SECRET = re.compile(r"[\w.:+/=-]{20}|-----BEGIN|://|(?i:pass|pwd|secret|token|key|credential)")
_MAYBE_PERSONAL = re.compile(r"@|\d\d\d\d")
"""What is asked first: it takes a tenth of the time."""


def secret(text: str) -> Flaw | None:
    """Keys and tokens in their published formats, passwords in addresses, and random values given to a password."""
    return redacted("secret", text, _hits("secret", text)) if _MAYBE_SECRET.search(text) else None


def personal_data(text: str) -> Flaw | None:
    """All kinds but phone numbers, which need a library; well-known examples and test numbers are left alone."""
    return redacted("personal data", text, _hits("personal", text)) if _MAYBE_PERSONAL.search(text) else None


def _hits(kind: str, text: str) -> Iterator[_Hit]:
    lowered = text.lower()
    for what, signs, pattern, is_one in _KINDS[kind]:
        if not signs or any(sign in lowered for sign in signs):
            for found in pattern.finditer(text):
                group = found.lastindex or 0
                if is_one(found[group]):
                    yield *found.span(group), what, _INSTEAD.get(what, "[SECRET]")


_INSTEAD = {
    "e-mail address": "[EMAIL]",
    "account number (IBAN)": "[IBAN]",
    "payment card": "[CARD]",
    "US social security number": "[SSN]",
    "phone number": "[PHONE]",
}


# ---- whether what looks like it is it -------------------------------------------------------------------------------

_NOT_GIVEN = re.compile(
    r"(?<![a-z])(?:example|sample|dummy|test|your|change|placeholder|redacted)|xxx|\*{3}|\.{3}|…|1234|abcd|abc.?123|_token_|\$\{|\{\{|^\$|^\{|^<|^%|\[|[()]"
    r"|://|^(?:pass(?:w(?:or)?d)?|pwd|secret|tiger)$",
    re.IGNORECASE,
)
_LEAST_BITS = 3.0
"""Entropy per character: below it stand words, above it eight or more different characters."""
_NOBODY = re.compile(
    r"@(?:[\w-]+\.)*(?:example\.(?:com|org|net|edu)|\w+\.(?:example|test|invalid|localhost|local|lan|internal))$"
    r"|^(?:git|noreply|no-reply|donotreply|do-not-reply|you|your\.?name|user|username|name|someone|email)@"
    r"|^\w@\w\.\w+$|@(?:domain|email|yourdomain|company|test|website)\.com$",
    re.IGNORECASE,
)
_FILES = {"png", "jpg", "jpeg", "gif", "webp", "svg", "css", "js", "py", "txt"}
"""`icon@2x.png` is a file."""

_ISSUER = re.compile(
    r"4\d{12}(?:\d{3}){0,2}|5[1-5]\d{14}|2(?:22[1-9]|2[3-9]\d|[3-6]\d\d|7[01]\d|720)\d{12}|3[47]\d{13}"
    r"|6(?:011|4[4-9]\d|5\d\d)\d{12}|3(?:0[0-5]|[689]\d)\d{11}|35(?:2[89]|[3-8]\d)\d{12}|62\d{14,17}"
)
"""Visa, Mastercard, American Express, Discover, Diners, JCB, UnionPay: first digits and lengths."""
_TEST_CARDS = {"4111111111111111", "4242424242424242", "4012888888881881", "5555555555554444", "5105105105105100"}
_TEST_CARDS |= {"378282246310005", "371449635398431", "6011111111111117", "30569309025904", "3530111333300000"}
_ADVERTISED_SSN = {"078-05-1120", "219-09-9999", "123-45-6789"}


def _real(value: str) -> bool:
    """Not the issuer's own example."""
    return not re.search(r"EXAMPLE|x{6}|X{6}|0{8}", value)


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


def _somebody(address: str) -> bool:
    # The password in an address of the web may look like a name.
    return "://" not in address and not _NOBODY.search(address) and address.rpartition(".")[2].lower() not in _FILES


def _is_card(number: str) -> bool:
    digits = re.sub(r"\D", "", number)
    return bool(_ISSUER.fullmatch(digits)) and digits not in _TEST_CARDS and passes_luhn(digits)


def passes_mod_97(iban: str) -> bool:
    """ISO 7064: the check digits of an account number are right."""
    digits = [str(int(character, 36)) for character in iban if character.isalnum()]
    return int("".join(digits[4:] + digits[:4])) % 97 == 1


def passes_luhn(digits: str) -> bool:
    """ISO 7812: the last digit of a card's number is right."""
    doubled = (int(digit) * 2 for digit in digits[-2::-2])
    return (sum(map(int, digits[-1::-2])) + sum(value - 9 if value > 9 else value for value in doubled)) % 10 == 0


_VALID: Mapping[str, Callable[[str], bool]] = {
    "": lambda value: True,
    "real": _real,
    "given": lambda value: not _NOT_GIVEN.search(value),
    "random": _random,
    "somebody": _somebody,
    "iban": passes_mod_97,
    "card": _is_card,
    "ssn": lambda value: value not in _ADVERTISED_SSN,
}
_KINDS = {
    kind: [(what, signs.split(), compiled(pattern), _VALID[valid]) for what, signs, pattern, valid in PATTERNS[kind]]
    for kind in ("secret", "personal", "phone")
}


# ---- phone numbers --------------------------------------------------------------------------------------------------

_MAYBE_PHONE = re.compile(r"[\d)][\s./-]?(?:\(?\d[\s()./-]{0,2}){5,}\d")
_NORTH_AMERICAN = re.compile(
    r"(?:1[ .-])?(?:\(\d{3}\)[ .-]?|\d{3}[ ./-] ?)\d{3}[ .-]\d{4}(?:\s?(?:x|ext)\D{0,3}\d{1,6})?"
)
_INTERNATIONAL = re.compile(r"\+[\d(](?!\d*\.\d{5})")
_FICTIONAL = re.compile(r"1?[2-9]\d\d55501\d\d")
"""North American numbers that are given to nobody, for films."""


@cache
def knows_phone_numbers() -> bool:
    """Whether phonenumbers is installed."""
    return importlib.util.find_spec("phonenumbers") is not None


def phone_number(text: str) -> Flaw | None:
    """Phone numbers that the numbering plans allow: with a country's code, in North American form, or named as one."""
    if not knows_phone_numbers():
        raise SetupError("looking for phone numbers needs the package 'phonenumbers'; pip install 'fulltune[audit]'")
    if not _MAYBE_PHONE.search(text):
        return None
    from phonenumbers import PhoneNumberMatcher

    hits = list(_hits("phone", text))
    for number in PhoneNumberMatcher(text, "US"):
        raw, before = number.raw_string, text[: number.start].rstrip(" ")[-1:]
        # Ten digits in a row may be any number, and so may those of a sum.
        written = _INTERNATIONAL.match(raw) or _NORTH_AMERICAN.fullmatch(raw)
        if written and before not in set("=+-*/<>^×") and not _FICTIONAL.fullmatch(re.sub(r"\D", "", raw)):
            hits.append((number.start, number.end, "phone number", "[PHONE]"))
    return redacted("phone number", text, hits)
