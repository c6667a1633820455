"""Find data files: what a path or a folder holds, which rows by their names, and clear words where nothing is read."""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from fulltune.errors import DataError
from fulltune.records.data import SplitName as Split
from fulltune.text import near_names

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet", ".arrow", ".feather", ".conll", ".iob", ".bio")
ONLY_BY_NAME = (".txt", ".annotated", ".iob2")
"""Kinds that a folder may hold for other reasons (a licence, notes): read when the recipe names the file."""
_KINDS = ", ".join(SUFFIXES)
_ABOUT_ROWS = {"state.json", "dataset_info.json"}
_IMAGES = "avif bmp dib gif ico jfif jp2 jpe jpeg jpg pbm pgm png pnm ppm tga tif tiff webp"
IMAGE_SUFFIXES = frozenset(f".{kind}" for kind in _IMAGES.split())
"""Kinds that Pillow reads; other files in the folders are left alone."""
_OF_ARCHIVES = "__MACOSX"
"""What unpacking leaves beside the folders, on systems other than Apple's."""
_PACKED = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".br", ".z", ".zip", ".tar", ".tgz", ".7z", ".rar")


def data_files(path: Path) -> list[Path]:
    """A data file itself, or the data files in a folder, sorted. Raises `DataError` when there is none, or it is empty
    or of an unknown kind."""
    status = _status(path)
    if stat.S_ISDIR(status.st_mode):
        with reading(path):
            return _files_in(path)
    _refuse_no_file(path, status)
    if path.suffix.lower() in _PACKED:
        raise DataError(_packed(path))
    if not is_data(path):
        raise DataError(f"{path}: unknown kind of file '{path.suffix}'; expected {_KINDS}: save it as one of them")
    if status.st_size == 0:
        raise DataError(f"{path}: the file is empty, expected rows; name another file, or write it again")
    return [path]


def _no_such_file(path: Path) -> str:
    if path.is_symlink():
        return f"{path}: is a link that leads nowhere, expected a file; repair it, or name the file itself"
    parent = path.parent
    if len(path.parts) == 2 and not path.suffix and not parent.exists():
        return (
            f"{path}: no such file; a data set of the Hub is not read by name: 'hf download {path} --repo-type dataset "
            f"--local-dir {path.name}', and give the file"
        )
    names = [file.name for file in parent.iterdir() if file.suffix in SUFFIXES] if parent.is_dir() else []
    near = near_names(path.name, names, cutoff=0.5) or sorted(names)[:4]
    hint = f" (in that folder: {', '.join(map(printable, near))})" if near else ""
    return f"{path}: no such file{hint}; give the path of a data file"


def _files_in(folder: Path) -> list[Path]:
    listed = sorted(file for file in folder.iterdir() if not file.name.startswith("."))
    names = {file.name for file in listed}
    if "dataset_dict.json" in names:  # what DatasetDict.save_to_disk writes
        raise DataError(
            f"{folder}: is a folder of several data sets, expected one; name them one by one, for example data.train: "
            f"{folder / 'train'}"
        )
    if names >= _ABOUT_ROWS:  # what Dataset.save_to_disk writes: the rest is about the rows
        listed = [file for file in listed if file.suffix.lower() != ".json"]
    files = [file for file in listed if file.suffix.lower() in SUFFIXES]
    # Left alone, its rows would be missing in silence.
    packed = [file for file in listed if file.suffix.lower() in _PACKED and is_data(Path(file.stem))]
    if not files and not packed:
        raise DataError(
            f"{folder}: no data file in this folder; expected {_KINDS}: name another folder, or files one by one, as "
            f"those in deeper folders and of the kinds {', '.join(ONLY_BY_NAME)}"
        )
    problems = [_packed(file) for file in packed]
    for file in files:
        try:
            _refuse_no_file(file, _status(file))
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(problems)
    return files


def is_data(file: Path) -> bool:
    """Whether its name says that it holds rows."""
    return file.suffix.lower() in (*SUFFIXES, *ONLY_BY_NAME)


def _packed(file: Path) -> str:
    return f"{printable(file)}: is packed ('{file.suffix}'), expected {_KINDS}; unpack it, and name what was in it"


def _status(path: Path) -> os.stat_result:
    """What the system says of a path. Raises `DataError` where there is none, or a name that is not UTF-8."""
    if not is_utf8(path):
        raise DataError(f"{printable(path)}: the name is not UTF-8, expected one that is; rename it")
    with reading(path):
        try:
            return path.stat()
        except (FileNotFoundError, NotADirectoryError):
            raise DataError(_no_such_file(path)) from None


def _refuse_no_file(file: Path, status: os.stat_result) -> None:
    """Who opens a pipe waits for whoever writes into it, and some devices never end."""
    if not stat.S_ISREG(status.st_mode):
        raise DataError(
            f"{file}: is a folder, a pipe, a socket or a device, expected a file; rename it, or write what it "
            "gives into a file, and name that"
        )


@contextlib.contextmanager
def reading(file: Path) -> Iterator[None]:
    """Turn the system's refusal to read into an error about this file. Raises `DataError` naming the file."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{printable(file)[:300]}: cannot be read ({error.strerror or error}), expected a file that you may read "
            "and that stays where it is; change its permissions, put it back, or name a copy"
        ) from None


def state(file: Path) -> tuple[int, ...]:
    """What changes of a file when it is replaced, written or cut, even where its time of change is set back."""
    try:
        now = file.stat()
    except OSError:  # a link of an image that leads nowhere is listed later
        return ()
    return now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns


@contextlib.contextmanager
def unchanged(before: Mapping[Path, tuple[int, ...]]) -> Iterator[None]:
    """Read files that are those of an earlier `state` to the end. Raises `DataError` naming each that is another one
    now, whatever else went wrong because of it."""
    try:
        yield
    finally:
        if changed := [file for file, earlier in before.items() if state(file) != earlier]:
            how = "while it was read, expected it to stay as it is; run again when nothing writes to it"
            raise DataError(
                [f"{printable(file)}: {'changed' if state(file) else 'was deleted'} {how}" for file in changed]
            ) from None


def printable(path: str | Path) -> str:
    """A path for messages: bytes that are not UTF-8, which a name on disk may hold, as `\\xe4`."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def is_utf8(name: str | Path) -> bool:
    """Whether a name on disk is UTF-8 and can be written down."""
    return printable(name) == str(name)


# ---- images ----------------------------------------------------------------------------------------------------


def is_image_folder(folder: Path) -> bool:
    """True for a folder that holds images, in itself or in its folders, and no table beside them."""
    if not folder.is_dir():
        return False
    if any(path.suffix.lower() in SUFFIXES and not path.name.startswith(".") for path in folder.iterdir()):
        return False
    return has_images(folder) or any(
        has_images(inner) or any(map(has_images, folders_in(inner))) for inner in folders_in(folder)
    )


def image_files(folder: Path) -> list[Path]:
    """The images of all classes, sorted. Raises `DataError` when the images do not lie in one folder per class."""
    expected = "expected one folder per class with the images in it"
    if has_images(folder):
        raise DataError(f"{folder}: images lie directly in this folder; {expected}")
    classes = [inner for inner in folders_in(folder) if inner.name != _OF_ARCHIVES]
    problems = [
        f"{printable(inner)}: the folder's name is not UTF-8, expected the name of a class; rename the folder"
        for inner in classes
        if not is_utf8(inner.name)
    ]
    problems += [
        f"{printable(inner)}: holds no image, {expected}; put some into it, or remove it; if its folders are the "
        "classes, name it as data.train"
        for inner in classes
        if not has_images(inner)
    ]
    if problems:
        raise DataError(problems)
    # A link that leads nowhere counts: an image that cannot be read is listed, never dropped unseen.
    return [path for inner in classes for path in sorted(inner.iterdir()) if _is_image(path.name) and not path.is_dir()]


def folders_in(folder: Path) -> list[Path]:
    """Its folders that are not hidden, sorted."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def has_images(folder: Path) -> bool:
    """Whether images lie in the folder itself."""
    with os.scandir(folder) as entries:  # stops at the first one: a folder may hold a hundred thousand
        return any(_is_image(entry.name) for entry in entries)


def _is_image(name: str) -> bool:
    return Path(name).suffix.lower() in IMAGE_SUFFIXES and not name.startswith(".")


# ---- names that say which rows a file holds --------------------------------------------------------------------

_WORDS: dict[str, Split] = {
    **dict.fromkeys(("test", "testing", "heldout"), "test"),
    **dict.fromkeys(("eval", "evaluation", "dev", "development", "val", "valid", "validate", "validation"), "eval"),
    **dict.fromkeys(("train", "training"), "train"),
}
_JOINED: dict[str, Split] = {
    f"{word}{kind}": split for word, split in _WORDS.items() for kind in ("set", "sets", "data", "split", "splits")
}
_ORDER: tuple[Split, ...] = ("test", "eval", "train")
"""In which they count: what is named test is never trained on, whatever else its name says."""
_SHARD = re.compile(r"\d+-of-\d+(-[0-9a-f]{8,})?$")
_LAST_TWO = re.compile(rf"({'|'.join(_WORDS)})[\W_]+((?:set|data|split)s?)(?=[\W\d_v]*$)")


def _of_name(file: Path) -> tuple[Split | None, tuple[str, ...]]:
    """The split that a name says, and what it says beside that; its suffix, numbers and version say nothing.

    A word counts alone, at the end, before a single other part (`dev_matched`), or anywhere if it is joined with what
    it is a word for (`testset_w_refs`).
    """
    stem = re.sub(r"held[\W_]out", "heldout", _SHARD.sub("", file.stem.lower()))
    parts = [part for part in re.split(r"[\W\d_]+", _LAST_TWO.sub(r"\1\2", stem)) if part and part != "v"]
    ends = parts if len(parts) == 2 else parts[-1:]
    splits = {_JOINED.get(part) for part in parts} | {_WORDS.get(part) for part in ends}
    rest = () if _JOINED.keys() & set(parts) else tuple(part for part in parts if part not in _WORDS)
    return next((split for split in _ORDER if split in splits), None), rest


def by_split(files: Sequence[Path]) -> dict[Split | None, list[Path]]:
    """Files of one folder by the split that their names say; None: they say none.

    A name that says more than its split (`crash_test`) can be a title. It counts beside a file that is named train, or
    one that differs from it in that word only.
    """
    names = {file: _of_name(file) for file in files}
    has_train = any(split == "train" for split, _ in names.values())
    splits: dict[Split | None, list[Path]] = {}
    for file, (split, rest) in names.items():
        counts = not rest or has_train or any(rest == other and split != of for of, other in names.values())
        splits.setdefault(split if counts else None, []).append(file)
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
    own, splits = _of_name(train), dict[Split, list[Path]]()
    for file in sorted(train.parent.iterdir()) if own[0] == "train" and train.parent.is_dir() else ():
        split, rest = _of_name(file)
        if is_data(file) and rest == own[1] and split in ("eval", "test"):
            splits.setdefault(split, []).append(file)
    return splits


def refuse_held_out(paths: Sequence[str]) -> None:
    """A folder that is given for training must not hold rows that are named as held out."""
    problems = []
    for folder in map(Path, paths):
        with reading(folder):
            splits = split_folders(folder)
            if not splits and folder.is_dir() and not is_image_folder(folder):
                splits = by_split(data_files(folder))
        if held_out := [file.name for split in ("eval", "test") for file in splits.get(split, ())]:
            problems.append(
                f"{folder}: is given for training and holds {', '.join(held_out)}, named as rows that are not trained "
                "on; name its other files as data.train, and these, or a folder of theirs, as data.eval and data.test"
            )
    if problems:
        raise DataError(problems)
