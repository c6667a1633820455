"""Images as rows: a folder with one folder per class, or a table that names them. Nothing is decoded here."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fulltune.data.readers.files import SUFFIXES as DATA_SUFFIXES
from fulltune.data.readers.files import is_utf8, printable
from fulltune.errors import DataError
from fulltune.recipe.fields import is_address
from fulltune.tasks.columns import USUAL_NAMES, BadCell

_KINDS = "avif bmp dib gif ico jfif jp2 jpe jpeg jpg pbm pgm png pnm ppm tga tif tiff webp"
SUFFIXES = frozenset(f".{kind}" for kind in _KINDS.split())
"""Kinds that Pillow reads; other files in the folders are left alone."""
_OF_ARCHIVES = "__MACOSX"
"""What unpacking leaves beside the folders, on systems other than Apple's."""


def is_image_folder(folder: Path) -> bool:
    """True for a folder that holds images, in itself or in its folders, and no table beside them."""
    if not folder.is_dir():
        return False
    if any(path.suffix.lower() in DATA_SUFFIXES and not path.name.startswith(".") for path in folder.iterdir()):
        return False
    return has_images(folder) or any(
        has_images(inner) or any(map(has_images, folders_in(inner))) for inner in folders_in(folder)
    )


def files(folder: Path) -> list[Path]:
    """The images of all classes, sorted. Raises `DataError` when the images do not lie in one folder per class."""
    expected = "expected one folder per class with the images in it"
    if has_images(folder):
        raise DataError(f"{folder}: images lie directly in this folder; {expected}")
    classes = folders_in(folder)
    if unwritable := [
        f"{printable(inner)}: the folder's name is not UTF-8, expected the name of a class; rename the folder"
        for inner in classes
        if not is_utf8(inner.name)
    ]:
        raise DataError(unwritable)
    # A link that leads nowhere counts: an image that cannot be read is listed, never dropped unseen.
    images = [
        path for inner in classes for path in sorted(inner.iterdir()) if _is_image(path.name) and not path.is_dir()
    ]
    deeper = [inner for inner in classes if not has_images(inner) and any(map(has_images, folders_in(inner)))]
    if deeper and not images:
        names = ", ".join(inner.name for inner in deeper[:3])
        raise DataError(
            f"{folder}: the images lie two folders deep ({names}); {expected}: name for example "
            f"{folder / deeper[0].name} as data.train, and the others as data.eval and data.test"
        )
    if deeper:
        raise DataError(f"{deeper[0]}: holds folders and no image, other folders beside it hold images; {expected}")
    if empty := [inner for inner in classes if not has_images(inner) and inner.name != _OF_ARCHIVES] if images else []:
        raise DataError([f"{inner}: holds no image, {expected}; put some into it, or remove it" for inner in empty])
    return images


def rows(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Place and row of each image: `{"image": path, "label": name of its folder}`."""
    for path in files(folder):
        name = printable(path.name)
        image = str(path) if is_utf8(path.name) else BadCell("a file whose name is not UTF-8; rename it", name)
        yield f"{path.parent.name}/{name}", {"image": image, "label": path.parent.name}


def columns_of(row: Mapping[str, Any], column: str | None) -> list[str]:
    """The columns that can hold a table's images: the one that the recipe names, or each with a usual name."""
    names = (column,) if column is not None else USUAL_NAMES["image"]
    return [name for name in row if name == column or name.lower().strip() in names]


def beside(row: Mapping[str, Any], folder: Path, column: str | None) -> dict[str, Any]:
    """A table's row whose image paths, relative to its folder, are whole: of this column, or of each with a usual name.

    A cell is a path, bytes, or `{"bytes": ..., "path": ...}` as `datasets` writes it.
    """
    changed = dict(row)
    for name in columns_of(row, column):
        value = row[name]
        if isinstance(value, str) and is_address(value.strip()):
            changed[name] = BadCell(f"the address '{value.strip()}', expected a file; images are not downloaded")
        elif isinstance(value, str) and value.strip():
            changed[name] = str(folder / value.strip())
        elif isinstance(value, dict) and not value.get("bytes") and isinstance(value.get("path"), str):
            changed[name] = {**value, "path": str(folder / value["path"])}
    return changed


def folders_in(folder: Path) -> list[Path]:
    """Its folders that are not hidden, sorted."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def has_images(folder: Path) -> bool:
    """Whether images lie in the folder itself."""
    with os.scandir(folder) as entries:  # stops at the first one: a folder may hold a hundred thousand
        return any(_is_image(entry.name) for entry in entries)


def _is_image(name: str) -> bool:
    return Path(name).suffix.lower() in SUFFIXES and not name.startswith(".")
