"""Files that say by their names which rows they hold: `train.tsv`, `dev.tsv`, `my-test-00000.parquet`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fulltune.data.readers.files import ONLY_BY_NAME, SUFFIXES, data_files, reading
from fulltune.data.readers.images import folders_in, has_images, is_image_folder
from fulltune.errors import DataError
from fulltune.records.data import SplitName as Split

_WORDS: dict[str, Split] = {
    "test": "test",
    "heldout": "test",
    **dict.fromkeys(("eval", "dev", "val", "valid", "validate", "validation"), "eval"),
    "train": "train",
}
_IN_TITLES: dict[str, Split] = {"testing": "test", "evaluation": "eval", "development": "eval", "training": "train"}
"""Words that titles hold, too (`training_manual`): they count alone, and as `training_set` or `trainingdata`."""
_JOINED: dict[str, Split] = {
    f"{word}{kind}": split
    for word, split in (_WORDS | _IN_TITLES).items()
    for kind in ("set", "sets", "data", "split", "splits")
}
_ORDER: tuple[Split, ...] = ("test", "eval", "train")
"""In which they count: what is named test is never trained on, whatever else its name says."""
_SHARD = re.compile(r"\d+-of-\d+(-[0-9a-f]{8,})?$")
_LAST_TWO = re.compile(r"([^\W\d_]+)[\W_]+((?:set|data|split)s?)(?=[\W\d_v]*$)")
_HELD_OUT = re.compile(r"held[\W_]out")


@dataclass(frozen=True)
class _Name:
    """What a file's name says."""

    split: Split | None
    is_whole: bool
    """It says no more than the split: no title does."""
    rest: tuple[str, ...]
    """Its parts without the word for the split."""


def _read(file: Path) -> _Name:
    """Take a name apart; its suffix and shards' numbers say nothing.

    A word counts alone, at the end, before a single other part (`dev_matched`), or anywhere if it is joined with what
    it is a word for (`testset_w_refs`).
    """
    stem = _HELD_OUT.sub("heldout", _SHARD.sub("", file.stem.lower()))
    stem = _LAST_TWO.sub(lambda two: two[1] + two[2] if two[1] + two[2] in _JOINED else two[0], stem)
    parts = [part for part in re.split(r"[\W\d_]+", stem) if part and part != "v"]
    ends = parts if len(parts) == 2 else parts[-1:]
    splits = {_JOINED.get(part) for part in parts} | {_WORDS.get(part) for part in ends}
    if len(parts) == 1:
        splits.add(_IN_TITLES.get(parts[0]))
    words = _WORDS | _IN_TITLES | _JOINED
    return _Name(
        next((split for split in _ORDER if split in splits), None),
        all(part in words for part in parts) or any(part in _JOINED for part in parts),
        tuple(part for part in re.split(r"[\W_]+", stem) if part and part not in words),
    )


def by_split(files: Sequence[Path]) -> dict[Split | None, list[Path]]:
    """Files of one folder by the split that their names say; None: they say none.

    A name that says more than its split (`crash_test`) can be a title. It counts beside a file that is named train, or
    one that differs from it in that word only.
    """
    names = {file: _read(file) for file in files}
    has_train = any(name.split == "train" for name in names.values())
    splits: dict[Split | None, list[Path]] = {}
    for file, name in names.items():
        counts = name.is_whole or has_train
        counts = counts or any(name.rest == other.rest and name.split != other.split for other in names.values())
        splits.setdefault(name.split if counts else None, []).append(file)
    return splits


def split_folders(folder: Path) -> dict[Split | None, list[Path]]:
    """A folder's folders by the split that their names say, where it holds rows in folders `train` and others alone."""
    listed = folder.iterdir() if folder.is_dir() else ()
    if any(file.suffix.lower() in SUFFIXES and file.name != "dataset_dict.json" for file in listed):
        return {}
    splits = by_split(folders_in(folder)) if folder.is_dir() else {}
    of_classes = any(has_images(inner) for inners in splits.values() for inner in inners)
    return splits if {"train"} < splits.keys() - {None} and not of_classes else {}


def held_out_beside(train: Path) -> dict[Split, list[Path]]:
    """Files beside one named train whose names differ from its name in that word only."""
    own, splits = _read(train), dict[Split, list[Path]]()
    for file in sorted(train.parent.iterdir()) if own.split == "train" and train.parent.is_dir() else ():
        name = _read(file)
        is_data = file.suffix.lower() in (*SUFFIXES, *ONLY_BY_NAME)
        if is_data and name.rest == own.rest and name.split in ("eval", "test"):
            splits.setdefault(name.split, []).append(file)
    return splits


def refuse_held_out(paths: Sequence[str]) -> None:
    """A folder that is given for training must not hold rows that are named as held out."""
    problems = []
    for folder in map(Path, paths):
        with reading(folder):
            splits = split_folders(folder)
            splits.pop(None, None)
            if not splits and folder.is_dir() and not is_image_folder(folder):
                splits = by_split(data_files(folder))
        held_out: dict[Split, list[Path]] = {split: splits.pop(split) for split in ("eval", "test") if split in splits}
        if not held_out:
            continue
        rest = [str(file) for files in splits.values() for file in files]
        shown = f"[{', '.join(rest)}]" if len(rest) > 1 else "".join(rest)
        write = [f"data.train: {shown}"] if rest else []
        write += [f"data.{split}: {_one_path(files)}" for split, files in held_out.items()]
        names = ", ".join(file.name for files in held_out.values() for file in files)
        problems.append(
            f"{folder}: is given for training and holds {names}, named as rows that are not trained on; write "
            f"{', '.join(write)}"
        )
    if problems:
        raise DataError(problems)


def _one_path(files: Sequence[Path]) -> str:
    """What a setting that takes one path can be given."""
    if len(files) == 1:
        return str(files[0])
    return f"a folder of their own, with {', '.join(file.name for file in files)} moved into it"
