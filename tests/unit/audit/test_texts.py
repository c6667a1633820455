"""Flaws of single texts: for each check a table of planted ones and one of texts that only look like it."""

from __future__ import annotations

import importlib.util

import pytest

from fulltune.audit import texts as audit
from fulltune.audit.texts import _CHECKS, _shown, content, masked_cells, private
from fulltune.audit.texts.flaw import redacted
from fulltune.errors import SetupError

KEY = "qX7" + "vR2mLp9Zt4Wb8Ks1Yd6Hn3Jc5Gf0Aeu"
"""Random letters and digits; tokens are put together here, so that no scanner takes this file for a leak."""
BEGIN, END = "-----BEGIN " + "PRIVATE KEY-----", "-----END " + "PRIVATE KEY-----"
JWT = "eyJhbGciOiJIUzI1NiJ9." + "eyJzdWIiOiIxMjM0NTY3ODkwIn0." + KEY
KHMER, PERSIAN, HINDI = "មិន\u200bអាច\u200b\u200bបង្កើត", "می\u200cخواهم", "क्\u200dष"

FOUND: dict[str, list[str]] = {
    "broken encoding": [
        "The cafÃ© is closed",
        "Itâ€™s broken",
        "FÃ¼r MÃ¤dchen und MÃ¤nner",
        "naÃ¯ve rÃ©sumÃ©",
        "ä½\xa0å¥½",
        "Ð¿ÑÐ¸Ð²ÐµÑ\x82",
        "it\x92s Windows-1252",
        "lost \ufffd here",
        "a line\nand SeÃ±or on the next",
    ],
    "control characters": [
        "a\u200bb",
        "\ufeffThe first row",
        "user\u202egpj.exe",
        "NUL\x00 inside",
        "half \ud83d of one",
        "\x1b[31mred\x1b[0m",
        "co\u00adop\u00aderate",
        "page one\x0cpage two",
        "word\u2060joined",
        "\u200dstray joiner",
        "tag\U000e0041s that hide text",
        "left\u200eto right",
        "hidden\U000e0101\U000e0102 bytes",
        "one line\u2028and the next",
        "\uf0b7 a bullet of a symbol font",
        "never a character\ufdd0",
    ],
    "empty": ["\u2800", "\u3164", "", " ", "\n\t", "\u200b", "\ufeff", "\u00a0\u00a0", "\u2028", "\x00"],
    "no words": ["42", "...", "?!", "a", "1. b", "---", "12/03/2020", "(x)", "$ 5.00"],
    "markup": [
        "Hello<br>world",
        "<p>One paragraph.</p>",
        "Tom &amp; Jerry",
        'See <a href="https://fulltune.dev/x">the page</a>.',
        "1 &lt; 2",
        '<div class="x"></div>',
        "It&#8217;s here",
        "<b>bold</b> words",
        "<table><tr><td>cell</td></tr></table>",
        "<script>alert(1)</script>Text",
        "one&nbsp;two",
        "<p>One. <p>Two.",
        "Text <!-- more --> and more",
    ],
    "placeholder": [
        "Dear {{name}}, thank you",
        "Your order {{Order Number}} is on its way",
        "Hello {customer_name}!",
        "Hi {NAME}, welcome",
        "Total: ${amount} due",
        "Buy it now %s",
        "[INSERT NAME HERE]",
        "Sincerely, [Your Name]",
        "Lorem ipsum dolor sit amet",
        "Write to <your address here>",
        "Dear %(first)s, hello",
        "Dear {{ name | default: 'friend' }}",
        "{{#if member}} Welcome {{/if}}",
        "{% if user %} Hello {% endif %}",
        "Hello <%= @user.name %>",
        "Hi *|FNAME|*, welcome",
        "Dear {!Contact.FirstName}",
        "Dear «FirstName», hello",
        "%{count} items",
        "@@NAME@@ is here",
        'no column "%s" in it',
        "%d rows",
        "Yours, [Company Name]",
        "Dear <first name>",
        "Ut enim ad minim veniam",
    ],
    "chat tokens": [
        "<|im_start|>user\nHi<|im_end|>",
        "[INST] Hi [/INST]",
        "<s>[INST] Hi",
        "The answer is 4.</s>",
        "Below is a task.\n\n### Response:\n4",
        "### Instruction:\nAdd",
        "<|endoftext|>",
        "<start_of_turn>user",
        "<<SYS>> be kind <</SYS>>",
        "<s> A sentence",
        "[CLS] a text [SEP]",
        "in code: `<|eot_id|>`",
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>Hi",
        "[|user|]Hi[|endofturn|]",
        "[AVAILABLE_TOOLS][]",
        "[gMASK]<sop>Hi",
        "<fim_prefix>def",
        "USER: Hi ASSISTANT: Hello",
        "Human: Hi\n\nAssistant: Hello",
    ],
    "repetition": [
        "aaaaaaaaaaaaaaaaaaaaaaaa",
        "the the the the the the the the the",
        "I am a robot. I am a robot. I am a robot. I am a robot. I am a robot.",
        "yes, no, yes, no, yes, no, yes, no, yes, no",
        "哈哈哈哈哈哈哈哈哈哈哈哈哈哈哈哈哈哈哈哈哈哈哈",
        "今天很好今天很好今天很好今天很好今天很好今天很好今天很好",
        "Good start. " + "and then we went home " * 30,
        "z" * 40 + " is how it ended for the man who fell asleep on his keyboard in the late evening of a day",
        "buy now! " * 10,
        "the cat sat down and then the cat sat up again " * 6,
        "A text of more than eight words that was pasted by mistake. " * 2,
        "谢谢你，" * 12,
    ],
    "secret": [
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
    ],
    "personal data": [
        "Write to jane.doe@gmail.com please",
        "mail:j.smith@uni-bonn.de",
        "IBAN DE89 3704 0044 0532 0130 00 at my bank",
        "GB82WEST12345698765432",
        "my card is 4539 1488 0343 6467",
        "5425233430109903 is the number",
        "amex 3714 496353 98456",
        "SSN 536-90-4399",
        "NO93 8601 1117 947 THE account",
        "SSN: 536904399",
        "pay with 4539.1488.0343.6467",
        "pay with 4539\u00a01488\u00a00343\u00a06467",
        "pay with 4539-1488\u20130343 6467",
        "DE89.3704.0044.0532.0130.00 or GB82-WEST-1234-5698-7654-32",
    ],
    "phone number": [
        "Call me on +49 30 901820",
        "My number is (212) 736-5000.",
        "212-736-5000 is the desk",
        "+44 20 7946 1958",
        "ring 504 912 4635 for tickets",
        "1-800-356-9377",
        "Telefon: 030 901820 ab 9 Uhr",
        "Tel. 0171/1234567",
        "+33 1 42 68 53 00 à Paris",
        "Tél. : 01 42 68 53 00",
        "Phone: 612 34 56 78",
        "call me on 0171 1234567",
    ],
    "refusal": [
        "As an AI language model, I cannot feel.",
        "I'm sorry, but I can't assist with that request.",
        "I’m sorry, but I cannot provide that.",
        "I cannot assist with that.",
        "As a large language model I have no opinions.",
        "That goes against OpenAI's use policy.",
        "My knowledge cutoff is September 2021.",
        "Well, I'm just an AI, so I have no body.",
        "Als KI-Sprachmodell habe ich keine Meinung.",
        "En tant que modèle de langage, je ne peux pas.",
        "Como modelo de lenguaje no puedo opinar.",
        "I apologize, but I am unable to fulfill this request.",
        "I won't write malware for you.",
        "That is against my guidelines.",
        "I don't have access to real-time information.",
        "I am a large language model, trained by Google.",
        "Thanks for asking, but I can't help with that.",
        "Es tut mir leid, aber dabei kann ich nicht helfen.",
        "作为一个人工智能语言模型，我没有感情。",
        "Извините, но я не могу помочь с этим.",
    ],
}

SPARED: dict[str, list[str]] = {
    "broken encoding": [
        "The café isn’t open",
        "“Curly” quotes – and dashes…",
        "ＦＵＬＬ　ＷＩＤＴＨ",
        "windows\r\nline ends",
        "ÀÁÂÃ are capital letters",
        "Œuvre complète à l’été",
        "Straße, Größe, Übermut",
        "привет, мир",
        "你好，世界",
        "5 µm ± 2 °C × 3",
        "ﬁgures with a ligature",
        "CÃO is Portuguese for dog",
    ],
    "control characters": [
        "tabs\tand\r\nlines",
        "👩\u200d👩\u200d👧 family",
        "❤\ufe0f\u200d🔥",
        PERSIAN,
        HINDI,
        KHMER,
        "\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f England",
        "שלום \u200fעולם",
        "no\u00a0break",
        "café \u2013 dash",
        "葛\U000e0100飾 has a form of its own",
        "1\ufe0f⃣ keycap",
    ],
    "empty": ["a", ".", "0", "🙂", "猫", "-", "\u200bx", "_"],
    "no words": ["OK", "no", "猫", "水。", "👍", "A4 paper", "x = y", "I'm", "", " ", "Ça"],
    "markup": [
        "if a < b and c > d then stop",
        "for x<y we have y>x",
        "vector<int> and Map<String, List<b>>",
        "write to <joe@example.org>",
        "I <3 you",
        "AT&T and R&D",
        "use `<br>` for a new line",
        "```html\n<div>&nbsp;</div>\n```",
        "a <b, c> pair <a>",
        "<name> of the <title>",
        "x = foo(&p); y == 2;",
        "std::vector<i> v; for (int i = 0; i < n; i++) { <u> }",
        "<think>Let me see.</think> 4",
        "cats & dogs; mice",
    ],
    "placeholder": [
        '{"name": "Ann", "age": 3}',
        "\\frac{{a}}{{b}} and \\text{name}",
        "x^{{n}} + e^{max}",
        "the set {a, b, c}",
        "a discount of 5 %s is none",
        "100% sure",
        "def f(name):\n    return f'{name}' == x;",
        "read [your profile](https://fulltune.dev/me)",
        "`{name}` stands for the name",
        "[citation needed] and [1]",
        'export PATH="${PATH}:/opt/bin"',
        "GET /users/{user_id}/orders",
        "arr[insert] = 3",
        "costs $5 {about}",
        "say ###STOP### to end",
        "as '%d %H:%M' says",
        'either "%s%s" or "%s %s"',
        "an event <<RangeChanged>>",
        "the town «Saint-Denis» and «Bonjour»",
    ],
    "chat tokens": [
        "<s>old price</s> new price",
        "### Response times of servers",
        "[INSTRUCTIONS] are below",
        "the <system> tag",
        "a | b || c",
        "<|>",
        "Response: yes",
        "[PADDING] and [SEPARATE]",
        "prices <s>10</s> 8 and <s>5</s> 4</p>",
        "he was a good user",
        "the [MASK] of a cloze",
        "Assistant: a person who helps",
    ],
    "repetition": [
        "Never, never, never, never, never!",
        "I am soooooooooo happy about this",
        "No no no, that is wrong",
        "----------------------------------------",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "0 0 0 0 0 0 0 0 0 0 0 0 0 0 0",
        "In year 2 he pays 90. In year 3 he pays 100. In year 4 he pays 110. In year 5 he pays 12. In year 6 he pays 9",
        "The cat and the dog and the bird and the fish and the snake went to the house of the man",
        "haha that is so funny, ha ha ha",
        "Buffalo buffalo Buffalo buffalo buffalo",
        "SUNNNNNNNNNNA",
        "%s%s%s%s%s%s%s%s%s%s%s%s",
        "row your boat, row your boat",
        "",
    ],
    "secret": [
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
    ],
    "personal data": [
        "info@example.com",
        "ask at @handle or a@b",
        "git@github.com:x/y.git",
        "icon@2x.png",
        "card 4111 1111 1111 1111",
        "number 1234 5678 9012 3456",
        "DE00 3704 0044 0532 0130 00",
        "078-05-1120 was in an advert",
        "000-12-3456 and 2020-11-2020",
        "0.4539148803436467",
        "https://me:pw@host.net",
        "seed(348932549825235)",
        "a@b.com",
        "at 2021:03:04 10:11:12 from 84.112.31.7",
    ],
    "phone number": [
        "in 2020-2021 we sold 100-200 pieces",
        "555-123-4567 is not given out",
        "(415) 555-0123 in a film",
        "123-456-7890",
        "100 + 200 + 300 = 600",
        "order 2127365000",
        "18480-2880=<<18480-2880=15600>>15600",
        "ISBN 978-3-16-148410-0",
        "192.168.100.200",
        "1,000,000,000",
        "2024-11-28 10:15:30",
        "-7118.971 + 24745250.939695900956j",
        "doi:10.1088/0026-1394/44/2/003",
        "Cell. 2015 163(7) 1611",
    ],
    "refusal": [
        "I'm sorry, but I can't find your order.",
        "I cannot help but wonder about this.",
        "AI is changing the world.",
        "I am unable to log in to my account.",
        "Sorry, the shop is closed.",
        "A language model predicts the next token.",
        "I'm sorry for your loss.",
        "As an aide to the king he served well.",
        "He said he could not assist with the wedding.",
        "We can't provide a date before Monday.",
        "As an airline we apologise.",
        "As an artificial intelligence company we have grown.",
        "作为人工智能领域的重要分支，它很重要。",
        "I can't help but laugh.",
        "I will help with the dishes.",
    ],
}


def rows(table: dict[str, list[str]]) -> list[tuple[str, str]]:
    return [(check, text) for check, texts in table.items() for text in texts]


def skip_without_extra(check: str) -> None:
    if check in audit.missing():
        pytest.skip("needs the extra audit")


@pytest.mark.parametrize(("check", "text"), rows(FOUND))
def test_planted_flaw_is_found(check: str, text: str) -> None:
    skip_without_extra(check)
    assert [flaw.check for flaw in audit.flaws(text, (check,))] == [check]


@pytest.mark.parametrize(("check", "text"), rows(SPARED))
def test_text_that_only_looks_flawed_is_spared(check: str, text: str) -> None:
    skip_without_extra(check)
    assert audit.flaws(text, (check,)) == []


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
        ("repetition", "no " * 20, None),
    ],
)
def test_repair(check: str, text: str, fixed: str | None) -> None:
    skip_without_extra(check)
    assert [flaw.fixed for flaw in audit.flaws(text, (check,))] == [fixed]


@pytest.mark.parametrize(("check", "text"), rows({name: FOUND[name] for name in ("secret", "personal data")}))
def test_what_is_private_is_masked_and_gone_after_redaction(check: str, text: str) -> None:
    (flaw,) = audit.flaws(text, (check,))
    assert flaw.fixed is not None
    assert audit.flaws(flaw.fixed, (check,)) == []
    assert not any(word in flaw.reason for word in text.split() if len(word) > 8)


def test_masks_of_short_values_show_nothing() -> None:
    flaw = redacted("secret", "pw is abc", [(6, 9, "password", "[SECRET]")])
    assert flaw is not None
    assert "abc"[:1] not in flaw.reason.removeprefix("password ").split(" at ")[0]


def test_places_that_overlap_are_replaced_once() -> None:
    text = "password=hf_" + KEY
    (flaw,) = audit.flaws(text, ("secret",))
    assert flaw.fixed == "password=[SECRET]"


def test_repairs_follow_each_other() -> None:
    text = "\ufeff<p>IsnÃ¢â‚¬â„¢t it, jo@gmail.com?</p>"
    assert audit.repaired(text, ("markup", "personal data", "control characters", "broken encoding")).strip() == (
        "Isn’t it, [EMAIL]?"
    )
    assert audit.repaired("fine as it is", audit.OF_TEXTS[:-1]) == "fine as it is"


def test_columns_get_their_checks() -> None:
    assert "refusal" not in audit.OF_TEXTS
    assert "no words" not in audit.OF_ANSWERS
    assert {*audit.OF_TEXTS, *audit.OF_ANSWERS} == set(_CHECKS)
    assert audit.flaws("42", tuple(set(audit.OF_ANSWERS) - set(audit.missing()))) == []


def test_missing_package_is_told_and_never_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (audit.missing() == []) == all(map(importlib.util.find_spec, ("ftfy", "phonenumbers")))
    monkeypatch.setattr(private, "knows_phone_numbers", lambda: False)
    monkeypatch.setattr(content, "knows_encodings", lambda: False)
    assert audit.missing() == ["broken encoding", "phone number"]
    for check in audit.missing():
        with pytest.raises(SetupError, match=r"fulltune\[audit\]"):
            audit.flaws("any té¬xt", (check,))
    assert audit.masked_text("write to jo@gmail.com, dé") == "write to [EMAIL], dé"


@pytest.mark.parametrize(
    ("iban", "right"),
    [("DE89370400440532013000", True), ("DE89370400440532013001", False), ("GB82WEST12345698765432", True)],
)
def test_check_digits_of_accounts(iban: str, right: bool) -> None:
    assert private.passes_mod_97(iban) is right


@pytest.mark.parametrize(
    ("digits", "right"), [("79927398713", True), ("79927398710", False), ("4539148803436467", True)]
)
def test_check_digit_of_cards(digits: str, right: bool) -> None:
    assert private.passes_luhn(digits) is right


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
    """Of 100,000 characters: an expression that starts over at each of them would take minutes."""
    text = before * (100_000 // len(before))
    found = audit.flaws(text + flaw, (check,))
    assert found
    assert found != audit.flaws(text, (check,))


@pytest.mark.skipif(bool(audit.missing()), reason="needs the extra audit")
@pytest.mark.parametrize(
    "text",
    [
        "A <b>good</b> day at the caf\u00c3\u00a9, {{name}}",
        "A <b>good</b> day, {{name}}, write to john@example.com",
        "A good day, write to jo<i></i>hn@exam\u200bple.com, {{name}}",
        "the key is AKIAIOSF\u200bODNN7EXAMPLE, as of my last knowledge",
    ],
)
def test_flaws_say_the_same_whether_or_not_anything_had_to_be_masked(text: str) -> None:
    checks = tuple(dict.fromkeys((*audit.OF_TEXTS, *audit.OF_ANSWERS)))
    raw = [flaw for check in checks if (flaw := _CHECKS[check](text)) is not None]
    assert raw
    assert audit.flaws(text, checks) == [_shown(flaw, audit.masked_text(text)) for flaw in raw]


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
