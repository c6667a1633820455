"""Private data in a text: passwords, keys and tokens of services, e-mail addresses, accounts, cards, phone numbers."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping

from fulltune.audit.texts.flaw import PATTERNS, RE, Flaw, compiled, redacted

_Hit = tuple[int, int, str, str]


def secret(text: str) -> Flaw | None:
    """Keys and tokens in their published formats, passwords in addresses, and random values given to a password."""
    return redacted("secret", text, _hits("secret", text)) if RE["maybe_secret"].search(text) else None


def personal_data(text: str) -> Flaw | None:
    """All kinds but phone numbers, which need a library; well-known examples and test numbers are left alone."""
    return redacted("personal data", text, _hits("personal", text)) if RE["maybe_personal"].search(text) else None


def _hits(kind: str, text: str) -> Iterator[_Hit]:
    lowered = text.lower()
    for what, signs, pattern, is_one in _KINDS[kind]:
        if not signs or any(sign in lowered for sign in signs):
            for found in pattern.finditer(text):
                group = found.lastindex or 0
                if is_one(found[group]):
                    yield *found.span(group), what, PATTERNS["instead"].get(what, "[SECRET]")


# ---- whether what looks like it is it -------------------------------------------------------------------------------

_MIN_BITS = 3.0
"""Entropy per character: below it stand words, above it eight or more different characters."""


def _random(value: str) -> bool:
    """Letters and digits, or three kinds of characters, in no order that a word or a name in code would have."""
    if RE["not_given"].search(value):
        return False
    value = value.rstrip(".:!?]}")
    shares = [count / len(value) for count in Counter(value).values()]
    if len(value) < 8 or -sum(share * math.log2(share) for share in shares) < _MIN_BITS:
        return False
    lower, upper, digit = (re.search(kind, value) is not None for kind in ("[a-z]", "[A-Z]", r"\d"))
    other = re.search(r"[^A-Za-z0-9_.-]", value) is not None
    # Dotted and snake names are code; dates and numbers have no letters.
    if re.fullmatch(r"[A-Za-z_]+\d?(?:[._-][A-Za-z_]+\d?)*", value) or not (lower or upper):
        return False
    return digit or (lower and upper and other)


def _is_card(number: str) -> bool:
    digits = re.sub(r"\D", "", number)
    return bool(RE["issuer"].fullmatch(digits)) and digits not in PATTERNS["test_cards"] and passes_luhn(digits)


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
    "real": lambda value: not RE["issuers_example"].search(value),
    "given": lambda value: not RE["not_given"].search(value),
    "random": _random,
    "somebody": lambda value: not RE["nobody"].search(value),
    "iban": passes_mod_97,
    "card": _is_card,
    "ssn": lambda value: value not in PATTERNS["advertised_ssns"],
}
_KINDS = {
    kind: [(what, signs.split(), compiled(pattern), _VALID[valid]) for what, signs, pattern, valid in PATTERNS[kind]]
    for kind in ("secret", "personal", "phone")
}


# ---- phone numbers --------------------------------------------------------------------------------------------------


def phone_number(text: str) -> Flaw | None:
    """Phone numbers that the numbering plans allow: with a country's code, in North American form, or named as one."""
    if not RE["maybe_phone"].search(text):
        return None
    from phonenumbers import PhoneNumberMatcher

    hits = list(_hits("phone", text))
    for number in PhoneNumberMatcher(text, "US"):
        raw, before = number.raw_string, text[: number.start].rstrip(" ")[-1:]
        # Ten digits in a row may be any number, and so may those of a sum.
        written = RE["international"].match(raw) or RE["north_american"].fullmatch(raw)
        if written and before not in set("=+-*/<>^×") and not RE["fictional"].fullmatch(re.sub(r"\D", "", raw)):
            hits.append((number.start, number.end, "phone number", "[PHONE]"))
    return redacted("phone number", text, hits)
