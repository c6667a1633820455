"""Words and their BIO tags: cells into lists, checks of the scheme, entities as spans of words."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fulltune.errors import DataError
from fulltune.recipe.data import DataBlock
from fulltune.tasks import PLACE, Refused, Row, Target
from fulltune.tasks.columns import is_blank
from fulltune.tasks.labels import parsed_list

_log = logging.getLogger(__name__)
_BIO = re.compile(r"O|[BI]-\S+")
_OTHER_SCHEME = re.compile(r"[SELUM]-\S+")
_WORD = re.compile(r"https?://\S*[\w/]|[@#]?\w+(?:[.'’&/-]\w+)*|\S")
_SHOWN = 5
"""Places that are named one by one."""


def words(value: Any) -> list[str] | None:
    """A cell with the words (or tags) of a sentence: a list, a list as JSON, or words between spaces; else None."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, str):
        text = value.strip()
        listed = parsed_list(text) if text.startswith("[") and text.endswith("]") else None
        value = value.split() if listed is None else listed
    if not isinstance(value, (list, tuple)) or any(isinstance(part, (list, tuple, dict)) for part in value):
        return None
    return ["" if part is None else str(part) for part in value]


def _cells(row: Row, columns: Mapping[str, str]) -> tuple[list[str] | None, list[str] | None]:
    tokens, tags = row.get(columns["tokens"]), row.get(columns["tags"])
    # Beside tags between spaces, a sentence such as `[1]` is a word and no list.
    if isinstance(tokens, str) and isinstance(tags, str) and not tags.lstrip().startswith("["):
        return tokens.split(), tags.split()
    return words(tokens), words(tags)


def words_and_tags(row: Row, columns: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Both lists of a usable row; tags in strict BIO."""
    found, tags = _cells(row, columns)
    assert found is not None, "refuse() leaves out rows without words"
    assert tags is not None, "refuse() leaves out rows without tags"
    return found, strict(tags)


def refuse(row: Row, target: Target) -> Refused | None:
    """Rows without words, without tags, with more or fewer tags than words, or with tags that are not BIO."""
    names = (target.columns["tokens"], target.columns["tags"])
    found, tags = _cells(row, target.columns)
    for name, role, cell in zip(names, ("tokens", "tags"), (found, tags), strict=True):
        if cell is None:
            return Refused(f"no {role}", f"column '{name}' holds {str(row.get(name))[:60]!r}, expected a list of words")
        if is_blank("".join(cell)):
            return Refused(f"no {role}", f"column '{name}' is empty")
    assert found is not None
    assert tags is not None
    if len(found) != len(tags):
        return Refused("counts differ", f"{len(found)} tokens and {len(tags)} tags; expected one tag for each token")
    wrong = next((tag for tag in tags if not _BIO.fullmatch(tag)), None)
    return None if wrong is None else Refused("not BIO", f"tag {wrong!r}, expected O, B-TYPE or I-TYPE")


def strict(tags: Sequence[str]) -> list[str]:
    """The same entities, each of which begins with `B-`.

    An `I-` tag that continues nothing begins an entity, as seqeval and the older IOB1 scheme read it.
    """
    return [
        f"B{tag[1:]}" if tag.startswith("I-") and before[2:] != tag[2:] else tag
        for before, tag in zip(["O", *tags], tags, strict=False)
    ]


def spans(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """Entities: type, first word, and the word after the last."""
    found: list[tuple[str, int, int]] = []
    for position, tag in enumerate(tags):
        if tag == "O":
            continue
        kind, start, end = found[-1] if found else ("", 0, -1)
        if tag.startswith("I-") and kind == tag[2:] and end == position:
            found[-1] = (kind, start, position + 1)
        else:
            found.append((tag[2:], position, position + 1))
    return found


def bracketed(sentence: Sequence[str], tags: Sequence[str]) -> str:
    """A sentence with its entities: `[Ada Lovelace]PER was born in [London]LOC`."""
    shown = list(sentence)
    for kind, start, end in spans(tags):
        shown[start] = f"[{shown[start]}"
        shown[end - 1] = f"{shown[end - 1]}]{kind}"
    return " ".join(shown)


def split_text(text: str) -> list[str]:
    """Words of running text; punctuation stands apart, as in CoNLL files."""
    return _WORD.findall(text)


def types(labels: Iterable[str]) -> list[str]:
    """Entity types, in the order of their labels."""
    return list(dict.fromkeys(label[2:] for label in labels if label != "O"))


def find_target(rows: Iterable[Row], columns: Mapping[str, str], data: DataBlock, where: str) -> Target:
    """`O`, then `B-` and `I-` of every entity type, sorted. Raises `DataError` when tags are numbers or not BIO, naming
    the first places, or when no row has an entity."""
    found: set[str] = set()
    wrong: list[tuple[str, int, str]] = []
    num_rows, num_wrong, num_begun, first_begun = 0, 0, 0, ""
    for row in rows:
        num_rows += 1
        at = str(row.get(PLACE, f"{where}: row {num_rows}"))
        sentence, tags = (cell or [] for cell in _cells(row, columns))
        unknown = [(place, tag) for place, tag in enumerate(tags, start=1) if tag not in found]
        bad = [(at, place, tag) for place, tag in unknown if not _BIO.fullmatch(tag)]
        num_wrong += len(bad)
        wrong += bad[: _SHOWN - len(wrong)]
        if bad or len(tags) != len(sentence):
            continue  # the second kind is refused row by row
        found.update(tags)
        if (repaired := strict(tags)) != list(tags):
            num_begun += 1
            place = next(i for i, pair in enumerate(zip(tags, repaired, strict=True)) if pair[0] != pair[1])
            first_begun = first_begun or f"'{tags[place]}' in {at}, word {place + 1}"
    if wrong:
        raise DataError(_not_bio(wrong, num_wrong, columns["tags"], where))
    kinds = sorted(types(found))
    if not kinds:
        raise DataError(
            f"{where}: no row has an entity (column '{columns['tags']}' holds only O, or counts of tokens and tags "
            f"differ; {num_rows} rows); there is nothing to learn"
        )
    if num_begun:
        _log.warning(
            "%s: in %d of %d rows an I- tag continues no entity (first: %s); it is read as the beginning of one, as in "
            "the IOB1 scheme",
            *(where, num_begun, num_rows, first_begun),
        )
    return Target("tags", columns, ("O", *sorted(f"{mark}-{kind}" for mark in "BI" for kind in kinds)))


def _not_bio(wrong: Sequence[tuple[str, int, str]], count: int, column: str, where: str) -> list[str]:
    """A line with advice, then a line for each of the first places."""
    tags = [tag for *_, tag in wrong]
    if all(tag.removeprefix("-").isdecimal() for tag in tags):
        advice = (
            "holds numbers, expected names such as B-PER; numbers are places in a data set's list of class labels: "
            "put the names in (with `datasets`: features[column].feature.int2str)"
        )
    elif any(_OTHER_SCHEME.fullmatch(tag) for tag in tags):
        advice = "is in another scheme (BIOES, BILOU), expected BIO: write S- and U- as B-, E- L- and M- as I-"
    else:
        advice = (
            "holds tags that are not BIO, expected O, B-TYPE (first word of an entity) or I-TYPE (each further word): "
            "rename them"
        )
    places = [f"{at}, word {place}: tag {tag[:60]!r}" for at, place, tag in wrong]
    return [f"{where}: column '{column}' {advice} ({count} such tags)", *places]
