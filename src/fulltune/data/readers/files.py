from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from fulltune.errors import DataError
from fulltune.recipe.data import SUFFIXES as SUFFIXES
from fulltune.records.data import SplitName
from fulltune.text import near_names

ONLY_BY_NAME = (".txt", ".annotated", ".iob2")
"""Suffixes of files that are read only if the recipe names them."""
_KINDS = ", ".join(SUFFIXES)
_METADATA_FILES = {"state.json", "dataset_info.json"}
_IMAGES = "avif bmp dib gif ico jfif jp2 jpe jpeg jpg pbm pgm png pnm ppm tga tif tiff webp"
IMAGE_SUFFIXES = frozenset(f".{kind}" for kind in _IMAGES.split())
_MACOS_FOLDER = "__MACOSX"
_PACKED = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".br", ".z", ".zip", ".tar", ".tgz", ".7z", ".rar")


def list_data_files(path: Path, may_be_packed: bool = False) -> list[Path]:
    """Return a data file, or a folder's data files in order. Raises `DataError` if none can be read."""
    status = _stat_utf8_path(path)
    if stat.S_ISDIR(status.st_mode):
        with convert_os_errors(path):
            return _list_data_files_in_folder(path)
    _refuse_special_file(path, status)
    if path.suffix.lower() in _PACKED and not may_be_packed:
        raise DataError(_archive_problem(path))
    if not has_data_suffix(path) and not may_be_packed:
        raise DataError(f"{path}: unknown file type '{path.suffix}'; expected {_KINDS}: save it as one of them")
    if status.st_size == 0:
        raise DataError(f"{path}: the file is empty; choose another file, or export it again")
    return [path]


def _missing_file_error(path: Path) -> str:
    """Return an error message that suggests similar file names."""
    if path.is_symlink():
        return f"{path}: is a broken link, expected a file; repair it, or use the path of the file itself"
    parent = path.parent
    if not path.suffix and not parent.exists():
        name = "/".join(path.parts[-2:])
        return f"{path}: no such file; for a data set on the Hub, write {{hub: {name}}}, or give the path of a file"
    names = [file.name for file in parent.iterdir() if file.suffix in SUFFIXES] if parent.is_dir() else []
    near = near_names(path.name, names, cutoff=0.5) or sorted(names)[:4]
    hint = f" (in that folder: {', '.join(map(printable, near))})" if near else ""
    return f"{path}: no such file{hint}; give the path of a data file"


def _list_data_files_in_folder(folder: Path) -> list[Path]:
    """Return a folder's sorted data files. Raises `DataError` if there are none, or archives or special files."""
    listed = sorted(file for file in folder.iterdir() if not file.name.startswith("."))
    names = {file.name for file in listed}
    if "dataset_dict.json" in names:  # what DatasetDict.save_to_disk writes
        raise DataError(
            f"{folder}: contains several data sets, expected one; set the path of each split, for example data.train: "
            f"{folder / 'train'}"
        )
    if names >= _METADATA_FILES:  # what Dataset.save_to_disk writes: the other files describe the rows
        listed = [file for file in listed if file.suffix.lower() != ".json"]
    files = [file for file in listed if file.suffix.lower() in SUFFIXES]
    # The rows of an ignored archive would be missing without a message.
    packed = [file for file in listed if file.suffix.lower() in _PACKED and has_data_suffix(Path(file.stem))]
    if not files and not packed:
        raise DataError(
            f"{folder}: no data file in this folder; expected {_KINDS}: choose another folder, or list single files, "
            f"which may be in subfolders or end in {', '.join(ONLY_BY_NAME)}"
        )
    problems = [_archive_problem(file) for file in packed]
    for file in files:
        try:
            _refuse_special_file(file, _stat_utf8_path(file))
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(problems)
    return files


def has_data_suffix(file: Path) -> bool:
    return file.suffix.lower() in (*SUFFIXES, *ONLY_BY_NAME)


def _archive_problem(file: Path) -> str:
    return f"{printable(file)}: is an archive ('{file.suffix}'), expected {_KINDS}; unpack it and use its contents"


def _stat_utf8_path(path: Path) -> os.stat_result:
    """Return the status of a path. Raises `DataError` if the path is missing, unreadable or not UTF-8."""
    if not is_utf8(path):
        raise DataError(f"{printable(path)}: the name is not UTF-8; rename it")
    with convert_os_errors(path):
        try:
            return path.stat()
        except (FileNotFoundError, NotADirectoryError):
            raise DataError(_missing_file_error(path)) from None


def _refuse_special_file(file: Path, status: os.stat_result) -> None:
    """Raise `DataError` for pipes and devices."""
    if not stat.S_ISREG(status.st_mode):
        raise DataError(
            f"{file}: is a folder, pipe, socket or device, expected a file; rename it, or save its output in a file "
            "and use that file"
        )


@contextlib.contextmanager
def convert_os_errors(file: Path) -> Iterator[None]:
    """Turn an `OSError` in the block into a `DataError` that names the file."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{printable(file)[:300]}: cannot be read ({error.strerror or error}), expected a readable file; "
            "change its permissions, restore it, or use a copy"
        ) from None


def file_state(file: Path) -> tuple[int, ...]:
    """Return numbers that change when a file is replaced, written or truncated, or an empty tuple if it is missing."""
    try:
        now = file.stat()
    except OSError:  # broken links to images are reported later
        return ()
    return now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns


@contextlib.contextmanager
def raise_if_files_change(before: Mapping[Path, tuple[int, ...]]) -> Iterator[None]:
    """After the block, raise `DataError` if a file's `file_state` differs from `before`."""
    try:
        yield
    finally:
        if changed := [file for file, earlier in before.items() if file_state(file) != earlier]:
            how = "while it was being read; run again when no other program writes to it"
            raise DataError(
                [f"{printable(file)}: {'changed' if file_state(file) else 'was deleted'} {how}" for file in changed]
            ) from None


def printable(path: str | Path) -> str:
    """Format a path for messages; bytes that are not valid UTF-8 are escaped as `\\xe4`."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def is_utf8(name: str | Path) -> bool:
    return printable(name) == str(name)


# ---- images ----------------------------------------------------------------------------------------------------


def is_image_folder(folder: Path) -> bool:
    """Return whether a folder or its subfolders contain images but no tables."""
    if not folder.is_dir():
        return False
    if any(path.suffix.lower() in SUFFIXES and not path.name.startswith(".") for path in folder.iterdir()):
        return False
    return has_images(folder) or any(
        has_images(inner) or any(map(has_images, folders_in(inner))) for inner in folders_in(folder)
    )


def list_images(folder: Path) -> list[Path]:
    """Return the sorted images of all class folders. Raises `DataError` for images elsewhere."""
    expected = "expected one folder per class that contains its images"
    if has_images(folder):
        raise DataError(f"{folder}: images are directly in this folder; {expected}")
    classes = [inner for inner in folders_in(folder) if inner.name != _MACOS_FOLDER]
    problems = [
        f"{printable(inner)}: the folder name is not UTF-8, expected a class name; rename the folder"
        for inner in classes
        if not is_utf8(inner.name)
    ]
    problems += [
        f"{printable(inner)}: contains no image, {expected}; add images, or remove the folder; if its subfolders are "
        "the classes, set data.train to it"
        for inner in classes
        if not has_images(inner)
    ]
    if problems:
        raise DataError(problems)
    # Broken links are included, so that an unreadable image is reported instead of dropped silently.
    return [path for inner in classes for path in sorted(inner.iterdir()) if _is_image(path.name) and not path.is_dir()]


def folders_in(folder: Path) -> list[Path]:
    """Return visible subfolders, sorted."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def has_images(folder: Path) -> bool:
    """Return whether a folder directly contains images."""
    with os.scandir(folder) as entries:  # stops at the first image of perhaps a hundred thousand
        return any(_is_image(entry.name) for entry in entries)


def _is_image(name: str) -> bool:
    return Path(name).suffix.lower() in IMAGE_SUFFIXES and not name.startswith(".")


# ---- splits in file names --------------------------------------------------------------------------------------

_SPLIT_WORDS: dict[str, SplitName] = {
    **dict.fromkeys(("test", "testing", "heldout"), "test"),
    **dict.fromkeys(("eval", "evaluation", "dev", "development", "val", "valid", "validate", "validation"), "eval"),
    **dict.fromkeys(("train", "training"), "train"),
}
_JOINED_WORDS: dict[str, SplitName] = {
    f"{word}{kind}": split
    for word, split in _SPLIT_WORDS.items()
    for kind in ("set", "sets", "data", "split", "splits")
}
_PRECEDENCE: tuple[SplitName, ...] = ("test", "eval", "train")
"""A file whose name mentions several splits belongs to the first of these."""
_SHARD = re.compile(r"\d+-of-\d+(-[0-9a-f]{8,})?$")
_LAST_TWO = re.compile(rf"({'|'.join(_SPLIT_WORDS)})[\W_]+((?:set|data|split)s?)(?=[\W\d_v]*$)")


def _parse_split_from_name(file: Path) -> tuple[SplitName | None, tuple[str, ...]]:
    """Return the split that a file name mentions, or None, and the name's other words, without suffix, numbers and
    version.

    A split word such as `dev` counts only as the last word, as one of two words (`dev_matched`), or joined to a word
    such as `set` (`testset_w_refs`).
    """
    inner = file.with_suffix("") if file.suffix.lower() in _PACKED else file
    stem = re.sub(r"held[\W_]out", "heldout", _SHARD.sub("", inner.stem.lower()))
    parts = [part for part in re.split(r"[\W\d_]+", _LAST_TWO.sub(r"\1\2", stem)) if part and part != "v"]
    ends = parts if len(parts) == 2 else parts[-1:]
    splits = {_JOINED_WORDS.get(part) for part in parts} | {_SPLIT_WORDS.get(part) for part in ends}
    rest = () if _JOINED_WORDS.keys() & set(parts) else tuple(part for part in parts if part not in _SPLIT_WORDS)
    return next((split for split in _PRECEDENCE if split in splits), None), rest


def group_files_by_split(files: Sequence[Path]) -> dict[SplitName | None, list[Path]]:
    """Group a folder's files by the split in their names (or None).

    A split in a longer name (`crash_test`) counts only if there is a train file, or a file whose name differs only in
    the split word.
    """
    names = {file: _parse_split_from_name(file) for file in files}
    has_train = any(split == "train" for split, _ in names.values())
    splits: dict[SplitName | None, list[Path]] = {}
    for file, (split, rest) in names.items():
        counts = not rest or has_train or any(rest == other and split != of for of, other in names.values())
        splits.setdefault(split if counts else None, []).append(file)
    return splits


def group_folders_by_split(folder: Path) -> dict[SplitName | None, list[Path]]:
    """Group subfolders by the split in their names; {} if they are no splits or lie beside data files."""
    listed = folder.iterdir() if folder.is_dir() else ()
    if any(file.suffix.lower() in SUFFIXES and file.name != "dataset_dict.json" for file in listed):
        return {}
    splits = group_files_by_split(folders_in(folder)) if folder.is_dir() else {}
    of_classes = any(has_images(inner) for inners in splits.values() for inner in inners)
    return splits if {"train"} < splits.keys() - {None} and not of_classes else {}


def find_held_out_files_beside(train: Path) -> dict[SplitName, list[Path]]:
    """Map eval and test to the files next to a train file whose names differ only in the split word."""
    own, splits = _parse_split_from_name(train), dict[SplitName, list[Path]]()
    for file in sorted(train.parent.iterdir()) if own[0] == "train" and train.parent.is_dir() else ():
        split, rest = _parse_split_from_name(file)
        if has_data_suffix(file) and rest == own[1] and split in ("eval", "test"):
            splits.setdefault(split, []).append(file)
    return splits


def refuse_held_out_files(paths: Sequence[str], copies: Mapping[str, Sequence[str]]) -> None:
    """Raise `DataError` if a training folder, or the copies of an address, have names that suggest eval or test."""
    problems = []
    for path in paths:
        folder, files = Path(path), [*map(Path, copies.get(path, ()))]
        with convert_os_errors(folder):
            splits = group_folders_by_split(folder)
            for inside in (files, [*{file.parent: None for file in files}]):
                splits |= groups if len(groups := group_files_by_split(inside)) > 1 else {}
            if not splits and folder.is_dir() and not is_image_folder(folder):
                splits = group_files_by_split(list_data_files(folder))
        if held_out := [file.name for split in ("eval", "test") for file in splits.get(split, ())]:
            problems.append(
                f"{path}: is used for training but contains {', '.join(held_out)}, whose names suggest held-out "
                "rows; set data.train to the other files, and data.eval or data.test to these files"
            )
    if problems:
        raise DataError(problems)
