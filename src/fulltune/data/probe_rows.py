"""Texts that must not be trained on: those on which forgetting is measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fulltune.data.sources import find_files
from fulltune.data.split import HELD_OUT
from fulltune.errors import DataError
from fulltune.forgetting.generic_text import beginning, generic_texts, parts
from fulltune.recipe.fields import Recipe
from fulltune.text import counted, first_few


def refuse_trained_texts(recipe: Recipe) -> None:
    """Refuse a probe of the user's own whose texts are train rows; whole cells and their lines are compared.

    Raises:
        DataError: Naming the rows.
    """
    block = recipe.preserve
    if block.probe is None:
        return
    found = None if block.budget is None else parts(block)
    texts = generic_texts(block.probe)[0] if found is None else [*found.choosing, *found.sealed]
    measured = set(map(beginning, texts))
    places: list[str] = []
    problems: list[str] = []
    for name, files in find_files(recipe).items():
        if name in HELD_OUT:
            continue
        for place, row in files.rows(problems):
            said = {part for cell in row.values() for text in _texts(cell) for part in _parts(text)}
            if not said.isdisjoint(measured):
                places.append(str(place))
    if places:
        raise DataError(
            f"preserve.probe: {block.probe}: {counted(len(places), 'row')} of data.train "
            f"{'has' if len(places) == 1 else 'have'} a text of it ({first_few(places)}); what is trained on says "
            "nothing about forgetting: remove them from one of the files"
        )


def _texts(cell: Any) -> Iterator[str]:
    """All texts in a cell, those of a conversation's messages too."""
    if isinstance(cell, str):
        yield cell
    elif isinstance(cell, (list, tuple, Mapping)):
        for inner in cell.values() if isinstance(cell, Mapping) else cell:
            yield from _texts(inner)


def _parts(text: str) -> set[str]:
    """How a text, its lines and its paragraphs begin: a model reads no more of a text that is measured."""
    return {beginning(" ".join(part.split())) for part in (text, *text.splitlines(), *text.split("\n\n"))}
