"""Find data files: what a path or a folder holds, and clear words where the system refuses to read it."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from fulltune.errors import DataError
from fulltune.system.run_folder import IDENTITY
from fulltune.text import counted, first_few, near_names

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet", ".arrow", ".feather", ".conll", ".iob", ".bio")
ONLY_BY_NAME = (".txt", ".annotated", ".iob2")
"""Kinds that a folder may hold for other reasons (a licence, notes): read when the recipe names the file."""
_KINDS = ", ".join(SUFFIXES)
_ABOUT_ROWS = {"state.json", "dataset_info.json"}
_LIKE_ROWS = (".xlsx", ".xls", ".ods", ".sqlite", ".pkl", ".h5", ".orc", ".avro", ".heic", ".heif", ".jxl", ".svg")
"""Kinds of tables and images that nobody reads here."""
_PACKED = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".br", ".z", ".zip", ".tar", ".tgz", ".7z", ".rar")


def data_files(path: Path) -> list[Path]:
    """A data file itself, or the data files in a folder, sorted. Raises `DataError` when there is none, or it is empty
    or of an unknown kind."""
    _refuse_name(path)
    with reading(path):
        try:
            status = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            raise DataError(_no_such_file(path)) from None
        if stat.S_ISDIR(status.st_mode):
            return _files_in(path)
    _refuse_no_file(path, status.st_mode)
    if path.suffix.lower() in _PACKED:
        raise DataError(_packed(path))
    if path.suffix.lower() not in (*SUFFIXES, *ONLY_BY_NAME):
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
        splits = sorted(file.name for file in listed if (file / "state.json").exists())
        first = next((split for split in splits if "train" in split), *splits[:1] or ["train"])
        raise DataError(
            f"{folder}: is a folder of several data sets ({', '.join(splits)}), expected one; name them one by one, "
            f"for example data.train: {folder / first}"
        )
    if names >= _ABOUT_ROWS:  # what Dataset.save_to_disk writes: the rest is about the rows
        listed = [file for file in listed if file.suffix.lower() != ".json"]
    files = [file for file in listed if file.suffix.lower() in SUFFIXES]
    if not files and (by_name := [file for file in listed if file.suffix.lower() in ONLY_BY_NAME]):
        raise DataError(
            f"{folder}: files such as {printable(by_name[0].name)} are not taken from a folder; name them one by one, "
            f"for example data.train: [{', '.join(printable(file) for file in by_name[:2])}]"
        )
    # Left alone, its rows would be missing in silence.
    packed = [file for file in listed if file.suffix.lower() in _PACKED and _is_data(file.stem)]
    if not files and not packed:
        problem = f"{folder}: no data file in this folder; expected {_KINDS}: name another folder, or a file"
        raise DataError([problem, *left_out(folder, SUFFIXES, ())])
    problems = [_packed(file) for file in packed]
    for file in files:
        try:
            _refuse_name(file)
            with reading(file):
                _refuse_no_file(file, _mode(file))
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(problems)
    return files


def left_out(folder: Path, kinds: Iterable[str], taken: Sequence[Path]) -> list[str]:
    """A note on what looks like rows of these kinds in a folder or deeper, is not hidden, no run's, and not read."""
    found = set[Path]()
    for place, folders, names in os.walk(folder):
        is_run = place != str(folder) and {IDENTITY, "recipe.yaml"} <= {*names}
        folders[:] = [] if is_run else [name for name in folders if not name.startswith(".")]
        files = [Path(place, name) for name in names if not is_run and name[0] != "." and name not in _ABOUT_ROWS]
        found |= {file for file in files if file.suffix.lower() in {*kinds, *_LIKE_ROWS}}
    shown = [printable(file.relative_to(folder)) for file in sorted(found - {*taken})]
    why = "what lies in deeper folders, or is of another kind, is not taken from a folder: name it, or move it"
    said = f"{folder}: {counted(len(shown), 'file')} left out of its rows ({first_few(shown, 3)}): {why}"
    return [said] * bool(shown)


def _is_data(name: str) -> bool:
    return Path(name).suffix.lower() in (*SUFFIXES, *ONLY_BY_NAME)


def _packed(file: Path) -> str:
    return f"{printable(file)}: is packed ('{file.suffix}'), expected {_KINDS}; unpack it, and name what was in it"


def _mode(file: Path) -> int:
    try:
        return file.stat().st_mode
    except FileNotFoundError:
        raise DataError(_no_such_file(file)) from None


def _refuse_no_file(file: Path, mode: int) -> None:
    """Who opens a pipe waits for whoever writes into it, and some devices never end."""
    if stat.S_ISDIR(mode):
        raise DataError(
            f"{file}: is a folder named as a data file, expected a file; rename it, or name its files one by one"
        )
    if not stat.S_ISREG(mode):
        raise DataError(
            f"{file}: is a pipe, a socket or a device, expected a file; write what it gives into a file, and name that"
        )


@contextlib.contextmanager
def reading(file: Path) -> Iterator[None]:
    """Turn the system's refusal to read into an error about this file. Raises `DataError` naming the file."""
    try:
        yield
    except OSError as error:
        path = printable(file)
        if isinstance(error, PermissionError):
            problem = (
                f"{path}: may not be read (permission denied), expected a file that you can read; change its "
                "permissions, or name a copy of your own"
            )
        elif error.errno == errno.ELOOP:
            problem = f"{path}: is a link that leads back to itself, expected a file; name the file itself"
        elif error.errno == errno.ENAMETOOLONG:
            problem = (
                f"{path[:60]}...: a path of {len(path):,} characters is too long for this system; give the path of a "
                "file"
            )
        else:
            reason = error.strerror or error
            problem = (
                f"{path}: cannot be read ({reason}), expected a file that stays where it is; put it back, or copy it"
            )
        raise DataError(problem) from None


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


def _refuse_name(path: Path) -> None:
    if not is_utf8(path):
        raise DataError(f"{printable(path)}: the name is not UTF-8, expected one that is; rename it")
