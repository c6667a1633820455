"""Files that say by their names which rows they hold: `train.tsv`, `dev.tsv`, `my-test-00000.parquet`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from fulltune.data.images import is_image_folder
from fulltune.data.read import ONLY_BY_NAME, READERS, files_of
from fulltune.errors import DataError
from fulltune.records import SplitName as Split

WORDS: dict[Split, frozenset[str]] = {
    "test": frozenset({"test", "testing"}),
    "eval": frozenset({"eval", "evaluation", "dev", "development", "val", "valid", "validation"}),
    "train": frozenset({"train", "training"}),
}
"""In the order in which they count: what is named test is never trained on, whatever else its name says."""
_BETWEEN = re.compile(r"[^a-z]+")


def split_of(file: Path) -> Split | None:
    """The split that a file's name says; None when it says none."""
    found = set(_BETWEEN.split(file.name.lower()))
    return next((split for split, words in WORDS.items() if words & found), None)


def by_split(files: Iterable[Path]) -> dict[Split | None, list[Path]]:
    """Files by the split that their names say."""
    found: dict[Split | None, list[Path]] = {}
    for file in files:
        found.setdefault(split_of(file), []).append(file)
    return found


def held_out_beside(train: Path) -> dict[Split, list[Path]]:
    """Files beside one named train whose names differ from its name in that word only."""
    if split_of(train) != "train":
        return {}
    own, found = _rest(train), dict[Split, list[Path]]()
    for file in sorted(train.parent.iterdir()):
        split = split_of(file)
        if split in ("eval", "test") and file.suffix.lower() in (*READERS, *ONLY_BY_NAME) and _rest(file) == own:
            found.setdefault(split, []).append(file)
    return found


def _rest(file: Path) -> list[str]:
    """A file's name without the word for its split and without its suffix, which need not be the same."""
    words = frozenset().union(*WORDS.values())
    return [part for part in re.split(r"[^a-z0-9]+", file.stem.lower()) if part and part not in words]


def refuse_held_out(paths: Sequence[str]) -> None:
    """A folder that is given for training must not hold rows that are named as held out.

    Raises:
        DataError: Naming the files, and what to write.
    """
    problems = []
    for folder in map(Path, paths):
        if not folder.is_dir() or is_image_folder(folder):
            continue
        found = by_split(files_of(folder))
        held_out: dict[Split, list[Path]] = {split: found[split] for split in ("eval", "test") if split in found}
        if not held_out:
            continue
        rest = [file for split, files in found.items() if split not in held_out for file in files]
        write = [f"data.train: {_written(rest)}"] if rest else []
        write += [f"data.{split}: {_written(files)}" for split, files in held_out.items()]
        names = ", ".join(file.name for files in held_out.values() for file in files)
        problems.append(
            f"{folder}: is given for training and holds {names}, named as rows that are not trained on; write "
            f"{', '.join(write)}"
        )
    if problems:
        raise DataError(problems)


def _written(files: Sequence[Path]) -> str:
    return str(files[0]) if len(files) == 1 else f"[{', '.join(map(str, files))}]"
