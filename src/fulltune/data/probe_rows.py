"""Texts that must not be trained on: those on which forgetting is measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fulltune.data.sources import find_files
from fulltune.data.split import HELD_OUT
from fulltune.errors import DataError
from fulltune.forgetting.generic_text import generic_texts, parts
from fulltune.recipe.fields import Recipe
from fulltune.tasks.columns import normalised
from fulltune.text import counted, first_few


def refuse_trained_texts(recipe: Recipe) -> None:
    """Refuse a probe of the user's own whose texts are train rows; whole cells and their lines are compared.

    Raises:
        DataError: Naming the rows.
    """
    block = recipe.preserve
    if block.probe is None:
        return
    if block.budget is None:
        texts = generic_texts(block.probe)[0]
    else:
        found = parts(block)
        texts = [*found.choosing, *found.sealed]
    probed = {normalised(text) for text in texts}
    problems: list[str] = []
    places = [
        str(place)
        for name, files in find_files(recipe).items()
        if name not in HELD_OUT
        for place, row in files.rows(problems)
        if any(_parts(text) & probed for cell in row.values() for text in _texts(cell))
    ]
    if places:
        raise DataError(
            f"preserve.probe: {block.probe}: {counted(len(places), 'train row')} have a text of it "
            f"({first_few(places)}); what is trained on says nothing about forgetting: remove them from one of the "
            "files"
        )


def _texts(cell: Any) -> Iterator[str]:
    """All texts in a cell, those of a conversation's messages too."""
    if isinstance(cell, str):
        yield cell
    elif isinstance(cell, (list, tuple, Mapping)):
        for inner in cell.values() if isinstance(cell, Mapping) else cell:
            yield from _texts(inner)


def _parts(text: str) -> set[str]:
    """A text, its lines and its paragraphs."""
    return {normalised(" ".join(part.split())) for part in (text, *text.splitlines(), *text.split("\n\n"))}
