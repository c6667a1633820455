"""Personal data in a text: e-mail addresses, accounts, cards, addresses of computers, US social security numbers.

Names and street addresses are not looked for: that takes a model, and its mistakes.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator

from fulltune.audit.flaw import Flaw, Hit, redacted
from fulltune.errors import SetupError

try:
    import phonenumbers
except ImportError:
    # It comes with the extra `audit`; `fulltune.audit.missing` says when it is not there.
    phonenumbers = None  # type: ignore[assignment]  # a module else

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
    **{"AD": 24, "AE": 23, "AL": 28, "AT": 20, "AZ": 28, "BA": 20, "BE": 16, "BG": 22, "BH": 22, "BR": 29, "BY": 28},
    **{"CH": 21, "CR": 22, "CY": 28, "CZ": 24, "DE": 22, "DK": 18, "DO": 28, "EE": 20, "EG": 29, "ES": 24, "FI": 18},
    **{"FO": 18, "FR": 27, "GB": 22, "GE": 22, "GI": 23, "GL": 18, "GR": 27, "GT": 28, "HR": 21, "HU": 28, "IE": 22},
    **{"IL": 23, "IQ": 23, "IS": 26, "IT": 27, "JO": 30, "KW": 30, "KZ": 20, "LB": 28, "LC": 32, "LI": 21, "LT": 20},
    **{"LU": 20, "LV": 21, "LY": 25, "MC": 27, "MD": 24, "ME": 22, "MK": 19, "MR": 27, "MT": 31, "MU": 30, "NL": 18},
    **{"NO": 15, "PK": 24, "PL": 28, "PS": 29, "PT": 25, "QA": 29, "RO": 24, "RS": 22, "SA": 24, "SC": 31, "SD": 18},
    **{"SE": 24, "SI": 19, "SK": 24, "SM": 27, "ST": 25, "SV": 28, "TL": 23, "TN": 24, "TR": 26, "UA": 29, "VA": 22},
    **{"VG": 24, "XK": 20},
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
    return redacted("personal data", text, _hits(text, digits))


def _hits(text: str, digits: bool) -> Iterator[Hit]:
    if "@" in text:
        found = filter(_somebody, _EMAIL.finditer(text))
        yield from (Hit(*match.span(), "e-mail address", "[EMAIL]") for match in found)
    if digits:
        yield from _numbers(text)


def _numbers(text: str) -> Iterator[Hit]:
    yield from _accounts(text)
    for found in _CARD.finditer(text):
        if _is_card(re.sub(r"\D", "", found[0])):
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


def _is_card(digits: str) -> bool:
    return bool(_ISSUER.fullmatch(digits)) and digits not in _TEST_CARDS and passes_luhn(digits)


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


# ---- phone numbers ----------------------------------------------------------------------------------------------

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
    """Phone numbers that the numbering plans allow: with a country's code, in North American form, or named as one.

    Raises:
        SetupError: When phonenumbers is not installed.
    """
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
