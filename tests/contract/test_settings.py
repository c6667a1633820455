"""The settings of a recipe are counted: a new one takes the place of another, or has its reason here."""

from __future__ import annotations

import re
from pathlib import Path

from fulltune.recipe.fields import Recipe

KNOWN = Path(__file__).with_name("settings.txt")


def settings() -> set[str]:
    """`Block.field` of every setting that a recipe may have."""
    schema = Recipe.model_json_schema()
    blocks = {"Recipe": schema, **schema["$defs"]}
    return {f"{block}.{name}" for block, what in blocks.items() for name in what.get("properties", ())}


def test_no_setting_comes_without_a_reason_or_stays_listed_when_it_is_gone() -> None:
    lines = [line for line in KNOWN.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    known, _, late = ("\n".join(lines)).partition("\n\n")
    reasons = dict(re.findall(r"^(\S+): (.{20,})$", late, re.MULTILINE))
    assert settings() == {*known.splitlines(), *reasons}, (
        f"{KNOWN.name}: a setting that is gone is struck out; a new one takes a struck one's place, or stands below "
        "the empty line as `Block.field: why a user needs it`"
    )
