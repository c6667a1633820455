from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping

from fulltune.audit.texts.flaw import PATTERNS, RE, Flaw, redact_hits, to_regex

_Hit = tuple[int, int, str, str]


def check_known_forms(check: str, hint: re.Pattern[str], text: str) -> Flaw | None:
    """Detect passwords, keys and tokens in published formats (`secret`), or `personal data` other than phone numbers,
    except examples and test numbers."""
    return redact_hits(check, text, _find_hits(check.split()[0], text)) if hint.search(text) else None


def _find_hits(kind: str, text: str) -> Iterator[_Hit]:
    """Yield start, end, name and replacement of each valid match of this kind."""
    lowered = text.lower()
    for what, signs, pattern, is_valid in _KINDS[kind]:
        if not signs or any(sign in lowered for sign in signs):
            for match in pattern.finditer(text):
                group = match.lastindex or 0
                if is_valid(match[group]):
                    yield *match.span(group), what, PATTERNS["instead"].get(what, "[SECRET]")


# ---- validation of matches ------------------------------------------------------------------------------------------

_MIN_ENTROPY_BITS = 3.0


def _looks_random(value: str) -> bool:
    """Return whether a value is probably a secret key rather than a word, name or date."""
    if RE["not_given"].search(value):
        return False
    value = value.rstrip(".:!?]}")
    shares = [count / len(value) for count in Counter(value).values()]
    if len(value) < 8 or -sum(share * math.log2(share) for share in shares) < _MIN_ENTROPY_BITS:
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
    """Check an account number's check digits (ISO 7064)."""
    digits = [str(int(character, 36)) for character in iban if character.isalnum()]
    return int("".join(digits[4:] + digits[:4])) % 97 == 1


def passes_luhn(digits: str) -> bool:
    """Check a card number's check digit (ISO 7812)."""
    doubled = (int(digit) * 2 for digit in digits[-2::-2])
    return (sum(map(int, digits[-1::-2])) + sum(value - 9 if value > 9 else value for value in doubled)) % 10 == 0


_VALID: Mapping[str, Callable[[str], bool]] = {
    "": lambda value: True,
    "real": lambda value: not RE["issuers_example"].search(value),
    "given": lambda value: not RE["not_given"].search(value),
    "random": _looks_random,
    "somebody": lambda value: not RE["nobody"].search(value),
    "iban": passes_mod_97,
    "card": _is_card,
    "ssn": lambda value: value not in PATTERNS["advertised_ssns"],
}
_KINDS = {
    kind: [(what, signs.split(), to_regex(pattern), _VALID[valid]) for what, signs, pattern, valid in PATTERNS[kind]]
    for kind in ("secret", "personal", "phone")
}


# ---- phone numbers --------------------------------------------------------------------------------------------------


def check_phone_number(text: str) -> Flaw | None:
    """Detect valid phone numbers that are international, North American, or labelled as phone numbers."""
    if not RE["maybe_phone"].search(text):
        return None
    from phonenumbers import PhoneNumberMatcher

    hits = list(_find_hits("phone", text))
    for number in PhoneNumberMatcher(text, "US"):
        raw, before = number.raw_string, text[: number.start].rstrip(" ")[-1:]
        # Ten digits in a row, or in a calculation, may be any number.
        written = RE["international"].match(raw) or RE["north_american"].fullmatch(raw)
        if written and before not in set("=+-*/<>^×") and not RE["fictional"].fullmatch(re.sub(r"\D", "", raw)):
            hits.append((number.start, number.end, "phone number", "[PHONE]"))
    return redact_hits("phone number", text, hits)
