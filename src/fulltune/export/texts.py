"""Compare the token ids and rendered chats of two tokenizers on real and difficult texts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from itertools import chain, islice, product
from typing import Any

from fulltune.data.contamination import texts_in_cell
from fulltune.export.source import Source
from fulltune.inference.store import read_original_rows
from fulltune.models.base import processor_fingerprint
from fulltune.records.export import ExportCheck
from fulltune.tasks import PLACE

_MAX_TEXTS = 200
_DIFFICULT = (
    "Café — 123 😊 naïve",
    "  two  spaces\tand a tab\n\nand lines",
    "日本語 한국어 العربية हिन्दी",
    "3.14159 1,000,000 x=y+1; def f(a): return a",
    "👩‍👩‍👧‍👦 🇩🇪 e\u0301 \u00a0 \u200b",
)
_PARAMETERS = {"type": "object", "properties": {"query": {"type": "string"}}}
_TOOLS = [{"type": "function", "function": {"name": "find", "description": "Search.", "parameters": _PARAMETERS}}]
_CHATS = (
    [{"role": "user", "content": "What is 2+2? Café — 123 😊"}],
    [{"role": "system", "content": ""}, {"role": "user", "content": "Hi"}],
    [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "Two."}, {"role": "user", "content": "3?"}],
)


def sample_texts(source: Source) -> list[str]:
    """Return different texts of test, eval and train rows, difficult texts, and every special token between words."""
    splits = chain.from_iterable(read_original_rows(source.scoring.data / name) for name in ("test", "eval", "train"))
    rows = ({name: cell for name, cell in row.items() if name != PLACE} for row in splits)
    texts = chain.from_iterable(map(texts_in_cell, rows))
    return [
        *list(dict.fromkeys(islice(texts, 10 * _MAX_TEXTS)))[:_MAX_TEXTS],
        *_DIFFICULT,
        *(f"a {token} b" for token in source.processor.all_special_tokens),
    ]


def render_chats(tokenizer: Any) -> list[str]:
    """Render chats with a tokenizer's template, except those that it refuses, such as a system prompt."""
    texts = []
    for chat, tools in product(_CHATS if tokenizer.chat_template else (), (None, _TOOLS)):
        with contextlib.suppress(Exception):  # templates raise errors of many types
            texts.append(tokenizer.apply_chat_template(chat, tools, tokenize=False, add_generation_prompt=True))
    return texts


def check_token_ids(
    name: str, texts: list[str], ids: Callable[[str], list[int]], exported_ids: Callable[[str], list[int]]
) -> ExportCheck:
    """Check that both tokenizers return the same ids for every text."""
    different = [text for text in texts if ids(text) != exported_ids(text)]
    result = f"{len(texts) - len(different)} of {len(texts)} texts"
    if different:
        result += f"; different for {different[0][:60]!r}"
    return ExportCheck(name=name, result=result, expected="all", passed=bool(texts) and not different)


def check_equal(name: str, actual: object, expected: object) -> ExportCheck:
    """Check that two values, too long to print, are equal."""
    passed = actual == expected
    return ExportCheck(name=name, result="yes" if passed else "no", expected="yes", passed=passed)


def check_processor(source: Source, exported: Any) -> list[ExportCheck]:
    """Check a reloaded tokenizer or image processor."""
    ours = source.processor
    same = check_equal("same processor settings", processor_fingerprint(exported), processor_fingerprint(ours))
    if source.scoring.task.FACTS.reads != "text":
        return [same]
    chats = render_chats(ours)
    checks = [
        same,
        check_token_ids(
            "same token ids",
            [*sample_texts(source), *chats],
            lambda text: ours(text)["input_ids"],
            lambda text: exported(text)["input_ids"],
        ),
    ]
    return [*checks, check_equal("same rendered chats", render_chats(exported), chats)] if chats else checks
