"""Secrets, personal data and phone numbers in the forms that they have in texts, drawn at random.

The forms of keys and tokens are those that their issuers publish. None is written here: each is assembled from its
prefix and random characters.
"""

from __future__ import annotations

import base64
import json
import random
import string
from collections.abc import Callable

import phonenumbers
from bench.text_defects import Plant, made, within

from fulltune.audit.texts.private import passes_luhn

Draw = random.Random
_ALNUM, _HEX = string.ascii_letters + string.digits, "0123456789abcdef"
_URL64 = _ALNUM + "-_"


def _some(signs: str, count: int) -> Callable[[Draw], str]:
    return lambda draw: "".join(draw.choices(signs, k=count))


def _token(*parts: str | int | tuple[str, int]) -> Plant:
    """Insert a token made of fixed texts, numbers of letters and digits, and numbers of given characters."""

    def piece(draw: Draw) -> str:
        token = "".join(
            part if isinstance(part, str) else _some(*(part if isinstance(part, tuple) else (_ALNUM, part)))(draw)
            for part in parts
        )
        return draw.choice(["{}", "my key is {}.", "({})", '"{}"', "TOKEN={}", "use {} for it"]).format(token)

    return made(piece)


def _pem(kind: str, lines: int) -> Plant:
    def piece(draw: Draw) -> str:
        body = "\n".join(_some(_ALNUM + "+/", 64)(draw) for _ in range(lines))
        dashes = "-" * 5
        return f"\n{dashes}BEGIN {kind}{dashes}\n{body}\n{dashes}END {kind}{dashes}\n"

    return made(piece)


def _web_token(draw: Draw) -> str:
    def part(of: dict[str, object]) -> str:
        return base64.urlsafe_b64encode(json.dumps(of).encode()).decode().rstrip("=")

    head = part({"alg": draw.choice(["HS256", "RS256"]), "typ": "JWT"})
    return f"{head}.{part({'sub': str(draw.randrange(10**9)), 'iat': 1700000000})}.{_some(_URL64, 43)(draw)}"


def _given(form: str, value: Callable[[Draw], str]) -> Plant:
    """Insert an assigned value, such as `password = ...`."""
    return made(lambda draw: form.format(value(draw)))


def _password(draw: Draw) -> str:
    """Draw a password as people choose them: a word, a number, a punctuation mark."""
    word = draw.choice(["Sommer", "dragon", "Liverpool", "sunshine", "Katze", "blueSky", "Monkey"])
    return word + str(draw.randrange(10, 9999)) + draw.choice("!?#@$")


_STRONG = _some(_ALNUM + "!#%&*+-?@^", 16)

_SECRETS: dict[str, Plant] = {
    "AWS access key": _token("AK" + "IA", (string.ascii_uppercase + "234567", 16)),
    "AWS secret key": _given("aws_secret_access_key = {}", _some(_ALNUM + "/+", 40)),
    "GitHub": _token("gh" + "p_", 36),
    "GitHub, fine-grained": _token("github" + "_pat_", 22, "_", 59),
    "GitHub, of an app": _token("gh" + "s_", 36),
    "GitLab": _token("gl" + "pat-", (_URL64, 20)),
    "Slack, of a bot": _token("xo" + "xb-", (string.digits, 12), "-", (string.digits, 12), "-", 24),
    "Slack, of an app": _token(
        "xa" + "pp-1-A", (string.ascii_uppercase + string.digits, 10), "-", (string.digits, 13), "-", (_HEX, 64)
    ),
    "Slack webhook": _token("https://hooks.slack" + ".com/services/T", 9, "/B", 9, "/", 24),
    "Google API key": _token("AI" + "za", (_URL64, 35)),
    "Google client secret": _token("GOC" + "SPX-", (_URL64, 28)),
    "Google OAuth access": _token("ya" + "29.a0", (_URL64, 120)),
    "OpenAI": _token("sk" + "-", 48),
    "OpenAI, of a project": _token("sk" + "-proj-", (_URL64, 120)),
    "Anthropic": _token("sk" + "-ant-api03-", (_URL64, 93), "AA"),
    "Hugging Face": _token("h" + "f_", (string.ascii_letters, 34)),
    "Stripe": _token("sk" + "_live_", 24),
    "Stripe, restricted": _token("rk" + "_live_", 99),
    "SendGrid": _token("S" + "G.", (_URL64, 22), ".", (_URL64, 43)),
    "npm": _token("np" + "m_", 36),
    "PyPI": _token("py" + "pi-AgEIcHlwaS5vcmc", (_URL64, 150)),
    "Twilio": _token("S" + "K", (_HEX, 32)),
    "Mailgun": _token("ke" + "y-", (_HEX, 32)),
    "Mailchimp": _token((_HEX, 32), "-us12"),
    "DigitalOcean": _token("dop" + "_v1_", (_HEX, 64)),
    "Shopify": _token("shp" + "at_", (_HEX, 32)),
    "Square": _token("sq0" + "csp-", (_URL64, 43)),
    "Telegram bot": _token((string.digits, 10), ":AA", (_URL64, 33)),
    "Discord bot": _token("MT", 22, ".", 6, ".", (_URL64, 38)),
    "Databricks": _token("da" + "pi", (_HEX, 32)),
    "Notion": _token("nt" + "n_", (string.digits, 11), 35),
    "Linear": _token("lin" + "_api_", 40),
    "Figma": _token("fig" + "d_", (_URL64, 40)),
    "Docker": _token("dckr" + "_pat_", (_URL64, 27)),
    "Grafana": _token("gl" + "sa_", 32, "_", (_HEX, 8)),
    "HashiCorp Vault": _token("hv" + "s.", (_URL64, 95)),
    "Terraform": _token(14, ".atlas" + "v1.", (_URL64, 67)),
    "Postman": _token("PM" + "AK-", (_HEX, 24), "-", (_HEX, 34)),
    "New Relic": _token("NR" + "AK-", (string.ascii_uppercase + string.digits, 27)),
    "Groq": _token("gs" + "k_", 52),
    "xAI": _token("xa" + "i-", 80),
    "Replicate": _token("r8" + "_", 37),
    "Perplexity": _token("pp" + "lx-", 48),
    "Tavily": _token("tv" + "ly-", 32),
    "LangSmith": _token("lsv" + "2_pt_", (_HEX, 32), "_", (_HEX, 10)),
    "Supabase": _token("sb" + "p_", (_HEX, 40)),
    "Sentry": _token("sntr" + "ys_", (_URL64, 120)),
    "Atlassian": _token("ATA" + "TT3xFfGF0", (_URL64, 180)),
    "Facebook": _token("EA" + "AC", 150),
    "age": _token("AGE-SECRET" + "-KEY-1", (string.ascii_uppercase + string.digits, 58)),
    "Azure storage": _given("AccountName=shop;AccountKey={}==;EndpointSuffix=core", _some(_ALNUM + "+/", 86)),
    "JSON web token": made(_web_token),
    "private key, RSA": _pem("RSA PRIVATE" + " KEY", 12),
    "private key, OpenSSH": _pem("OPENSSH PRIVATE" + " KEY", 6),
    "private key, PKCS 8": _pem("PRIVATE" + " KEY", 8),
    "PGP key": _pem("PGP PRIVATE" + " KEY BLOCK", 20),
    "password in an address of a database": _given("postgresql://app:{}@db3.shop.net:5432/orders", _some(_ALNUM, 14)),
    "password in an address, MongoDB": _given("mongodb+srv://root:{}@cluster0.ab1cd.mongodb.net", _some(_ALNUM, 12)),
    "password in an address, weak": _given(
        "ftp://admin:{}@files.shop.net", lambda draw: draw.choice(["letmein", "qwerty7", "winter"])
    ),
    "bearer token": _given("Authorization: Bearer {}", _some(_HEX, 40)),
    "basic authorisation": _given(
        "Authorization: Basic {}", lambda draw: base64.b64encode(f"app:{_STRONG(draw)}".encode()).decode()
    ),
    "password = random": _given("password = {}", _STRONG),
    "password: random": _given("Password: {}", _STRONG),
    "password in JSON": _given('{{"password": "{}"}}', _STRONG),
    "password in a command": _given("mysql -u root --password={}", _STRONG),
    "password of a user's making": _given("password: {}", _password),
    "password in a sentence": _given("my password is {}", _password),
    "PIN in a sentence": _given("my PIN is {}", _some(string.digits, 4)),
    "API key without a prefix": _given("api_key: {}", _some(_HEX, 32)),
    "client secret": _given("client_secret={}", _some(_ALNUM + "~._-", 40)),
    "random characters alone": made(_some(_ALNUM, 40)),
}

# ---- personal data ----------------------------------------------------------------------------------------------

_PERSONS = ("anna.kowalski", "j.smith", "mueller", "t_hansen", "maria-jose", "li.wei88", "o.brien")
_HOSTS = ("gmail.com", "web.de", "yahoo.co.uk", "uni-bonn.de", "orange.fr", "qq.com", "acme-tools.io", "mail.ru")


def _mail(draw: Draw) -> str:
    return f"{draw.choice(_PERSONS)}@{draw.choice(_HOSTS)}"


def _with_check_digit(head: str) -> str:
    return next(head + digit for digit in string.digits if passes_luhn(head + digit))


def _card(prefix: str, size: int, groups: tuple[int, ...] = (), sign: str = " ") -> Plant:
    def piece(draw: Draw) -> str:
        digits = _with_check_digit(prefix + _some(string.digits, size - len(prefix) - 1)(draw))
        places = [sum(groups[:count]) for count in range(len(groups))]
        shown = (
            sign.join(digits[at : at + count] for at, count in zip(places, groups, strict=True)) if groups else digits
        )
        return draw.choice(["{}", "card {}", "my number is {},", "({})"]).format(shown)

    return made(piece)


def _iban(country: str, form: str, is_grouped: bool) -> Plant:
    """Insert an IBAN; `form` has n for a digit and a for a letter."""

    def piece(draw: Draw) -> str:
        account = "".join(draw.choice(string.digits if sign == "n" else string.ascii_uppercase) for sign in form)
        number = int("".join(str(int(sign, 36)) for sign in f"{account}{country}00"))
        whole = f"{country}{98 - number % 97:02}{account}"
        if is_grouped:
            whole = " ".join(whole[at : at + 4] for at in range(0, len(whole), 4))
        return draw.choice(["{}", "IBAN: {}", "to {}, please"]).format(whole)

    return made(piece)


def _ssn(sign: str) -> Callable[[Draw], str]:
    return lambda draw: sign.join(
        (f"{draw.randrange(100, 660)}", f"{draw.randrange(10, 99)}", f"{draw.randrange(1000, 9999)}")
    )


_DIGITS = _some(string.digits, 9)
_PERSONAL: dict[str, Plant] = {
    "e-mail": made(_mail),
    "e-mail with a label": made(lambda draw: f"E-mail: {_mail(draw)}."),
    "e-mail with a tag": made(lambda draw: _mail(draw).replace("@", f"+shop{draw.randrange(9)}@")),
    "e-mail in capitals": made(lambda draw: _mail(draw).upper()),
    "e-mail behind a name": made(lambda draw: f"Anna K. <{_mail(draw)}>"),
    "e-mail in a link": made(lambda draw: f"mailto:{_mail(draw)}?subject=x"),
    "e-mail with umlauts": made(lambda draw: f"jürgen.{draw.choice(_PERSONS)}@web.de"),
    "e-mail spelt out": made(lambda draw: _mail(draw).replace("@", " at ").replace(".", " dot ")),
    "e-mail with (at)": made(lambda draw: _mail(draw).replace("@", draw.choice(["(at)", "[at]"]))),
    "Visa": _card("4", 16),
    "Visa in groups": _card("4", 16, (4, 4, 4, 4)),
    "Visa with hyphens": _card("4", 16, (4, 4, 4, 4), "-"),
    "Visa with dots": _card("4", 16, (4, 4, 4, 4), "."),
    "Mastercard in groups": _card("53", 16, (4, 4, 4, 4)),
    "Mastercard, second range": _card("2345", 16),
    "American Express": _card("37", 15),
    "American Express in groups": _card("34", 15, (4, 6, 5)),
    "Diners": _card("36", 14, (4, 6, 4)),
    "Maestro": _card("6759", 16),
    "IBAN, Germany": _iban("DE", "n" * 18, True),
    "IBAN, Germany, in one": _iban("DE", "n" * 18, False),
    "IBAN, Great Britain": _iban("GB", "aaaa" + "n" * 14, True),
    "IBAN, France": _iban("FR", "n" * 10 + "a" * 3 + "n" * 10, True),
    "IBAN, Netherlands": _iban("NL", "aaaa" + "n" * 10, False),
    "IBAN, Poland": _iban("PL", "n" * 24, True),
    "IBAN, Malta": _iban("MT", "aaaa" + "n" * 5 + "a" * 18, True),
    "IBAN in small letters": lambda text, draw: within(text, _iban("DE", "n" * 18, False)("", draw).lower(), draw),
    "US social security number": made(_ssn("-")),
    "the same with blanks": made(_ssn(" ")),
    "the same in one, named": made(lambda draw: f"SSN {_ssn('')(draw)}"),
    "Canadian insurance number": made(
        lambda draw: "SIN {}-{}-{}".format(*(_some(string.digits, 3)(draw) for _ in range(3)))
    ),
    "British insurance number": made(
        lambda draw: f"NI number QQ {draw.randrange(10, 99)} {draw.randrange(10, 99)} {draw.randrange(10, 99)} C"
    ),
    "passport": made(lambda draw: f"passport no. C{_DIGITS(draw)[:8]}"),
    "bitcoin address": made(lambda draw: "bc1q" + _some("qpzry9x8gf2tvdw0s3jn54khce6mua7l", 38)(draw)),
    "MAC address": made(lambda draw: ":".join(_some(_HEX, 2)(draw) for _ in range(6))),
    "date of birth": made(lambda draw: f"born on {draw.randrange(1, 28)} May {draw.randrange(1940, 2005)}"),
    "street address": made(
        lambda draw: f"{draw.randrange(1, 300)} Maple Street, Springfield, IL 627{draw.randrange(10, 99)}"
    ),
    "place on the map": made(lambda draw: f"52.{_DIGITS(draw)[:5]}, 13.{_DIGITS(draw)[:5]}"),
}

# ---- phone numbers ----------------------------------------------------------------------------------------------

_COUNTRIES = (
    "DE FR GB IT ES NL PL SE NO CH AT BE PT IE GR CZ HU RO UA RU TR IL IN PK CN JP KR ID TH VN AU NZ ZA NG EG KE BR MX"
    " AR CO"
)
_Number = phonenumbers.PhoneNumber


def _number(draw: Draw, country: str | None = None) -> tuple[_Number, str]:
    """Draw a valid number, and its country."""
    while True:
        country = country or draw.choice(_COUNTRIES.split())
        kind = draw.choice([phonenumbers.PhoneNumberType.MOBILE, phonenumbers.PhoneNumberType.FIXED_LINE])
        example = phonenumbers.example_number_for_type(country, kind)
        assert example is not None, country
        digits = str(example.national_number)
        number = _Number(
            example.country_code,
            int(digits[:-5] + _some(string.digits, 5)(draw)),
            italian_leading_zero=example.italian_leading_zero,
        )
        if phonenumbers.is_valid_number(number):
            return number, country


def _phone(form: int, *said: str, change: Callable[[str], str] = str, country: str | None = None) -> Plant:
    return made(
        lambda draw: draw.choice(said or ("{}",)).format(
            change(phonenumbers.format_number(_number(draw, country)[0], form))
        )
    )


_E164, _INTERNATIONAL = phonenumbers.PhoneNumberFormat.E164, phonenumbers.PhoneNumberFormat.INTERNATIONAL
_NATIONAL = phonenumbers.PhoneNumberFormat.NATIONAL


def _with_zero(number: str) -> str:
    code, _, rest = number.partition(" ")
    return f"{code} (0) {rest}"


_PHONES: dict[str, Plant] = {
    "international, in one": _phone(_E164),
    "international, with blanks": _phone(_INTERNATIONAL),
    "international, in a sentence": _phone(_INTERNATIONAL, "call me on {}.", "Tel.: {}", "(phone {})", "WhatsApp {}!"),
    "international, with hyphens": _phone(_INTERNATIONAL, change=lambda one: one.replace(" ", "-")),
    "international, with dots": _phone(_INTERNATIONAL, change=lambda one: one.replace(" ", ".").replace("-", ".")),
    "international, with (0)": _phone(_INTERNATIONAL, change=_with_zero),
    "international, with 00": _phone(_INTERNATIONAL, change=lambda one: "00" + one[1:]),
    "international, without +": _phone(_INTERNATIONAL, change=lambda one: one[1:]),
    "national, behind Tel. or Phone": _phone(
        _NATIONAL, "Tel. {}", "Phone: {}", "Mobile {}", "my phone number is {}", "Fax: {}"
    ),
    "national, in other languages": _phone(_NATIONAL, "Telefon: {}", "Tél. : {}", "Teléfono {}", "тел. {}", "Handy {}"),
    "national, 'call me'": _phone(_NATIONAL, "call me on {}", "ring {}", "text {} please"),
    "national, alone": _phone(_NATIONAL),
    "US (212) 555-1234": _phone(_NATIONAL, country="US"),
    "US 212-555-1234": _phone(_NATIONAL, country="US", change=lambda one: one.replace("(", "").replace(") ", "-")),
    "US 212.555.1234": _phone(
        _NATIONAL, country="US", change=lambda one: one.replace("(", "").replace(") ", ".").replace("-", ".")
    ),
    "US 212 555 1234": _phone(
        _NATIONAL, country="US", change=lambda one: one.replace("(", "").replace(")", "").replace("-", " ")
    ),
    "US 1-212-555-1234": _phone(_INTERNATIONAL, country="US", change=lambda one: one[1:].replace(" ", "-")),
    "US 2125551234": _phone(_NATIONAL, country="US", change=lambda one: "".join(filter(str.isdigit, one))),
}

PRIVATE: dict[str, dict[str, Plant]] = {
    "secret": _SECRETS,
    "personal data": _PERSONAL,
    "phone number": _PHONES,
}
