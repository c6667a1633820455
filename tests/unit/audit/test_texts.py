"""Flaws of single texts: for each check a table of planted ones and one of texts that only look like it."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from pathlib import Path

import pytest

from fulltune.audit import texts as audit
from fulltune.audit.texts import _CHECKS, masked_cells
from fulltune.audit.texts.flaw import PATTERNS, RE, redact_hits

KEY = "qX7" + "vR2mLp9Zt4Wb8Ks1Yd6Hn3Jc5Gf0Aeu"
"""Random letters and digits; tokens are put together here, so that no scanner takes this file for a leak."""
BEGIN, END = "-----BEGIN " + "PRIVATE KEY-----", "-----END " + "PRIVATE KEY-----"
JWT = "eyJhbGciOiJIUzI1NiJ9." + "eyJzdWIiOiIxMjM0NTY3ODkwIn0." + KEY
PERSIAN = "می\u200cخواهم"

TEXTS = tomllib.loads(Path(__file__).with_name("texts.toml").read_text(encoding="utf-8"))
SECRETS = [
    f"{BEGIN}\nMIIEvQIBADANBgkqhkiG9w0BAQEFAASC\n{END}",
    "key AKIA" + "QWERTY7ASDFG2ZXC",
    "token ghp_" + KEY + "Ab1",
    "glpat-" + KEY[:20],
    "xoxb-123456789012-123456789012-" + KEY[:24],
    "AIza" + KEY + "b",
    "use sk-proj-" + KEY + KEY,
    "hf_" + KEY,
    "sk_live_" + KEY[:24],
    f"Bearer {JWT}",
    "postgres://admin:" + "s3cr3tPw@db.internal.net/app",
    "password = " + "Xk9#mQ2$vL",
    'API_KEY="' + KEY + '"',
    "github_pat_" + KEY * 2 + KEY[:14],
    "dop" + "_v1_" + "0123456789abcdef" * 4,
    "1234567890:AA" + KEY[:33],
    "gs" + "k_" + KEY + KEY[:18],
    "Authorization: Bearer " + KEY,
    "my password is " + "Sommer48!x",
    "password: " + "c0ntest#9Latest7Q",
    f"Encryption: none\nPrivate-Lines: 2\n{KEY * 2}\n{KEY}\nPrivate-MAC: " + "0a1b2c3d" * 5,
]
NO_SECRETS = [
    "My password: I forgot it and cannot log in",
    "password = your_password_here",
    "password: changeme123",
    "AKIAIOSFODNN7EXAMPLE is in the docs",
    "The secret: hardwork and patience",
    'token = os.environ["TOKEN_1"]',
    "secret_key = config.get_secret2()",
    "hf_hub_download and hf_xet",
    "https://user:password@example.com/x",
    "https://${USER}:${PASS}@host.net",
    "sk-learn-is-a-library-with-many-models-for-everyone",
    "-----BEGIN CERTIFICATE-----",
    "token: embedding_layer_norm",
    "eyJust a text with eyJ in it",
    "the key = 12345678901234",
    "key: `model.layers.0.self_attn`",
    BEGIN + "\n$PRIVATE_KEY\n" + END,
    "book(access_token='abc123xyz')",
    "worth 5 tokens:  ChatGPT: How do I",
    "the password is required, the key is torch.float32",
]
FOUND: dict[str, list[str]] = TEXTS["found"] | {"secret": SECRETS}
SPARED: dict[str, list[str]] = TEXTS["spared"] | {"secret": NO_SECRETS}
FOUND["control characters"] += ["half \ud83d of one"]


def rows(table: dict[str, list[str]]) -> list[tuple[str, str]]:
    return [(check, text) for check, texts in table.items() for text in texts]


def skip_without_extra(check: str) -> None:
    if check in audit.checks_without_package():
        pytest.skip("needs the extra audit")


@pytest.mark.parametrize(("check", "text"), rows(FOUND))
def test_planted_flaw_is_found(check: str, text: str) -> None:
    skip_without_extra(check)
    assert [flaw.check for flaw in audit.find_flaws(text, (check,))] == [check]


@pytest.mark.parametrize(("check", "text"), rows(SPARED))
def test_text_that_only_looks_flawed_is_spared(check: str, text: str) -> None:
    skip_without_extra(check)
    assert audit.find_flaws(text, (check,)) == []


def test_every_check_has_both_tables() -> None:
    assert set(FOUND) == set(SPARED) == set(_CHECKS)
    assert min(len(texts) for table in (FOUND, SPARED) for texts in table.values()) >= 8


@pytest.mark.parametrize(
    ("check", "text", "fixed"),
    [
        ("broken encoding", "“The cafÃ©\nisnâ€™t open”", "“The café\nisn’t open”"),
        ("broken encoding", "it\x92s", "it’s"),
        ("broken encoding", "lost \ufffd here", None),
        ("control characters", "a\u200bb\x00c", "abc"),
        ("control characters", "one\x0ctwo", "one\ntwo"),
        ("control characters", "\x1b[1;31mred\x1b[0m", "red"),
        ("control characters", "smile \ud83d\ude42!", "smile 🙂!"),
        ("control characters", "half \ud83d", "half "),
        ("control characters", f"\ufeff{PERSIAN}", PERSIAN),
        ("markup", "<p>a &lt; b</p>", "\na < b\n"),
        ("markup", "say <b>no</b>, `<br>`", "say no, `<br>`"),
        ("markup", "a&nbsp;b   c", "a b   c"),
        ("markup", "<div><br></div>", None),
        ("secret", f"key: {BEGIN}\nMIIEvQ\n{END} end", "key: [SECRET] end"),
        ("secret", "https://me:Qw3rtz9@fulltune.dev", "https://me:[SECRET]@fulltune.dev"),
        ("personal data", "jo@gmail.com or 4539 1488 0343 6467", "[EMAIL] or [CARD]"),
        ("personal data", "NO93 8601 1117 947 THE end", "[IBAN] THE end"),
        ("personal data", "no93 8601 1117 947 the end", "[IBAN] the end"),
        ("personal data", "pay de89370400440532013000, or De89 3704 0044 0532 0130 00", "pay [IBAN], or [IBAN]"),
        ("personal data", "gb29 nwbk 6016 1331 9268 19", "[IBAN]"),
        ("repetition", "no " * 20, None),
    ],
)
def test_repair(check: str, text: str, fixed: str | None) -> None:
    skip_without_extra(check)
    assert [flaw.fixed for flaw in audit.find_flaws(text, (check,))] == [fixed]


@pytest.mark.parametrize(("check", "text"), rows({name: FOUND[name] for name in ("secret", "personal data")}))
def test_what_is_private_is_masked_and_gone_after_redaction(check: str, text: str) -> None:
    (flaw,) = audit.find_flaws(text, (check,))
    assert flaw.fixed is not None
    assert audit.find_flaws(flaw.fixed, (check,)) == []
    assert not any(word in flaw.reason for word in text.split() if len(word) > 8)


def test_masks_of_short_values_show_nothing() -> None:
    flaw = redact_hits("secret", "pw is abc", [(6, 9, "password", "[SECRET]")])
    assert flaw is not None
    assert "abc"[:1] not in flaw.reason.removeprefix("password ").split(" at ")[0]


def test_places_that_overlap_are_replaced_once() -> None:
    text = "password=hf_" + KEY
    (flaw,) = audit.find_flaws(text, ("secret",))
    assert flaw.fixed == "password=[SECRET]"


def test_repairs_follow_each_other() -> None:
    text = "\ufeff<p>IsnÃ¢â‚¬â„¢t it, jo@gmail.com?</p>"
    assert audit.repair_text(text, ("markup", "personal data", "control characters", "broken encoding")).strip() == (
        "Isn’t it, [EMAIL]?"
    )
    assert audit.repair_text("fine as it is", audit.CHECKS_OF_READ_TEXTS[:-1]) == "fine as it is"


def test_columns_get_their_checks() -> None:
    assert "refusal" not in audit.CHECKS_OF_READ_TEXTS
    assert "no words" not in audit.CHECKS_OF_WRITTEN_TEXTS
    assert {*audit.CHECKS_OF_READ_TEXTS, *audit.CHECKS_OF_WRITTEN_TEXTS} == set(_CHECKS)
    assert audit.find_flaws("42", tuple(set(audit.CHECKS_OF_WRITTEN_TEXTS) - set(audit.checks_without_package()))) == []


def test_missing_package_is_told_and_never_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (audit.checks_without_package() == []) == all(map(importlib.util.find_spec, ("ftfy", "phonenumbers")))
    monkeypatch.setattr(audit, "is_installed", lambda package: False)
    assert audit.checks_without_package() == ["broken encoding", "phone number"]
    assert not {*audit.checks_without_package()} & {*audit.select_checks({"text": "text"})["read"]}
    assert audit.masked_text("write to jo@gmail.com, dé") == "write to [EMAIL], dé"


@pytest.mark.parametrize(
    ("check", "before", "flaw"),
    [
        ("markup", "<", "a<br>b"),
        ("markup", "<!-- ", "a<br>b"),
        ("markup", "&a", " &amp; b"),
        ("placeholder", "{{name ", "{{name}}"),
        ("chat tokens", "<|a", "<|im_end|>"),
        ("repetition", "ab cd ", "z" * 40),
        ("secret", BEGIN, f"\n{'MIIEvQ' * 9}\n{END}"),
        ("secret", "password=", "password=" + "Xk9#mQ2$vL"),
        ("personal data", "a@", " jo@gmail.com"),
        ("control characters", "\ud83d", "\x00"),
        ("broken encoding", "\ufffd", "cafÃ©"),
        ("refusal", "sorry, i cannot ", "as an ai"),
    ],
)
def test_flaw_behind_a_hostile_beginning_is_still_found(check: str, before: str, flaw: str) -> None:
    """Of 30,000 characters: an expression that starts over at each of them would take minutes."""
    text = before * (30_000 // len(before))
    detected = audit.find_flaws(text + flaw, (check,))
    assert detected
    assert detected != audit.find_flaws(text, (check,))


@pytest.mark.parametrize(
    "text",
    [
        "AK{}IAQWB5PDKHXZ7YLM2Q",
        "sk-or-v1-" + "0a1b2c3d" * 8,
        "redis://:p4ssW0rdQx9@cache.corp.io:6379",
    ],
)
@pytest.mark.parametrize("unseen", ["", "\u061c", "\u034f", "\ufe0f", "<wbr>", "<!-- x -->", "&shy;"])
def test_what_is_private_is_masked_whatever_hides_in_it(text: str, unseen: str) -> None:
    whole = text.replace("{}", unseen) if "{}" in text else text + unseen
    assert "[SECRET]" in audit.masked_text(f"see {whole} here")
    cells = masked_cells({"anna.miller@web-of-anna.de": 4539148803436467, "n": [5, True, f"see {whole} here"]})
    assert list(cells) == ["[EMAIL]", "n"]
    assert cells["[EMAIL]"] == "[CARD]"
    assert cells["n"][:2] == [5, True]
    assert "[SECRET]" in cells["n"][2]


def test_what_only_looks_hidden_is_kept() -> None:
    text = "a heart \u2764\ufe0f <!-- and a note --> stays"
    assert audit.masked_text(text) == text


def test_each_key_of_the_table_is_read_and_each_that_is_read_is_there() -> None:
    source = Path(audit.__file__).parents[2]
    code = "\n".join(
        file.read_text(encoding="utf-8") for file in [*source.rglob("audit/**/*.py"), source / "data/check.py"]
    )
    for name, table in (("RE", RE), ("PATTERNS", PATTERNS)):
        assert set(re.findall(rf'\b{name}\["(\w+)"\]', code)) <= set(table)
        assert [key for key in table if f'"{key}"' not in code] == []
    assert [word for word in PATTERNS["words"] if not any(f"<{word}>" in str(one) for one in PATTERNS.values())] == []
