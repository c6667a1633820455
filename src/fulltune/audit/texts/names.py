"""Names of classes that are perhaps meant to be one: they differ only in capitals, blanks, form or look."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Mapping

from fulltune.text import counted

_ALIKE = str.maketrans("авекмнорстухіјѕԁԛԝһαβεζηικμνορτυχ", "abekmhopctyxijsdqwhabezhikmnoptyx")
"""Small Cyrillic and Greek letters that look like Latin ones, they or their capitals; after Unicode's confusables."""
_UNSEEN = re.compile("[\\s_\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufe00-\ufe0f\ufeff\U000e0100-\U000e01ef]")
_TO_JOIN = (
    "to join them: 'fulltune data RECIPE --accept \"class names\"', and in the recipe data.patch: RECIPE.patch.jsonl"
)


def alike(counts: Mapping[str, int]) -> list[list[str]]:
    """Groups of names that are perhaps meant to be one, in each the most frequent name first."""
    groups = defaultdict[str, list[str]](list)
    for name in sorted(counts, key=lambda name: (-counts[name], name)):
        plain = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
        groups[_UNSEEN.sub("", plain).translate(_ALIKE)].append(name)
    return [names for names in groups.values() if len(names) > 1]


def alike_in_words(counts: Mapping[str, int]) -> str | None:
    """Such classes with their rows, by their code where they cannot be told apart; None: there are none."""
    groups = []
    for names in alike(counts):
        shown = repr if len({name.casefold() for name in names}) == 1 else ascii
        groups.append(", ".join(f"{shown(name)} ({counted(counts[name], 'row')})" for name in names))
    told = f"classes that are perhaps meant to be one: {'; '.join(groups[:3])}"
    more = f" and {counted(len(groups) - 3, 'more group')}" if len(groups) > 3 else ""
    return f"{told}{more}; {_TO_JOIN}" if groups else None
