"""Local copies of data that lies elsewhere."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType

from fulltune.data.remote import unpack
from fulltune.data.remote.listing import Listing, OnBytes, RemoteFile, revision_of
from fulltune.errors import DataError, DoesNotFitError, FulltuneError, SetupError
from fulltune.recipe.address import BUCKETS, DATABASES, HUB, PACKED, WEB, is_fetched, scheme_of
from fulltune.recipe.fields import Recipe
from fulltune.records.data import SOURCES, RemoteSource, RemoteSources
from fulltune.records.events import Listener, Message, RowsRead
from fulltune.system.hardware import disk_free_bytes
from fulltune.text import counted, format_bytes

_COMPLETE = "copied"  # no data file's name
_MARGIN_BYTES = 2**26
_REPORT_SECONDS = 0.5


def cache_folder() -> Path:
    return Path(os.environ.get("FULLTUNE_CACHE") or Path.home() / ".cache" / "fulltune") / "sources"


def load_sources(run_folder: Path) -> dict[str, RemoteSource]:
    """Return a run's remote sources by address."""
    path = run_folder / SOURCES
    return {one.address: one for one in RemoteSources.load(path).sources} if path.exists() else {}


def fetch_sources(recipe: Recipe, run_folder: Path, listener: Listener) -> dict[str, RemoteSource]:
    """Copy all data of a recipe that lies elsewhere, and return it by address. Revisions are recorded in the run folder
    before anything is read, and stay the same when the run resumes."""
    block = recipe.data
    paths = (*block.task_files, *(file.path for file in block.mixed_files), block.eval, block.test)
    addresses = [path for path in dict.fromkeys(paths) if path is not None and is_fetched(path)]
    if not addresses:
        return {}
    sources, problems = load_sources(run_folder), list[str]()
    for address in addresses:

        def record(source: RemoteSource) -> None:
            sources[source.address] = source
            run_folder.mkdir(parents=True, exist_ok=True)
            RemoteSources(sources=tuple(sources[one] for one in addresses if one in sources)).save(run_folder / SOURCES)

        try:
            record(fetch(address, listener, sources.get(address), record))
        except DataError as error:
            problems += error.problems
        except OSError as error:
            problems.append(f"{address}: cannot be copied ({error}); make room on the disk, or set FULLTUNE_CACHE")
    if problems:
        raise DataError(problems)
    return {address: sources[address] for address in addresses}


def fetch(
    address: str,
    listener: Listener,
    earlier: RemoteSource | None = None,
    record: Callable[[RemoteSource], None] = lambda source: None,
) -> RemoteSource:
    """Return the local copies of an address's files, of the revision of `earlier` if given. `record` is called with the
    revision before files are read."""
    store, pinned = _store_of(address), earlier.revision if earlier else ""
    try:
        listing = store.list_files(address, None)
    except FulltuneError as error:
        # A copy that a run has begun with is as good as the original, which may be out of reach by now.
        source = earlier if earlier and earlier.is_complete else _find_copy_offline(address)
        if source is None:
            raise
        listener(Message(text=f"{address}: using the local copy of {source.revision[:12]} ({error.problems[0]})"))
        return source
    if earlier and pinned:
        if listing.revision and listing.revision != pinned:
            text = f"{address}: is now at {listing.revision[:12]}; this run goes on with {pinned[:12]}"
            listener(Message(text=text, level="warning"))
        if earlier.is_complete:
            return earlier
        if listing.revision != pinned:
            listing = store.list_files(address, pinned)
    changed = f"{address}: has changed since this run began, and the local copy is gone; start a new run (--fresh)"
    if pinned and listing.revision not in ("", pinned):
        raise DataError(changed)
    if listing.revision:
        record(RemoteSource(address=address, revision=listing.revision))
    copied = _copy(address, store, listing, listener)
    if pinned and copied.revision != pinned:
        raise DataError(changed)
    return copied


def _store_of(address: str) -> ModuleType:
    from fulltune.data.remote import buckets, hub, local, sql, web

    match scheme_of(address):
        case "hf":
            return hub
        case scheme if scheme in WEB:
            return web
        case scheme if scheme in BUCKETS:
            return buckets
        case scheme if scheme in DATABASES:
            return sql
        case _:
            return local


def _find_copy_offline(address: str) -> RemoteSource | None:
    """Return the newest complete copy if the Hub is switched off (`HF_HUB_OFFLINE`), else None."""
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if not HF_HUB_OFFLINE or scheme_of(address) != HUB:
        return None
    files = sorted(cache_folder().glob(f"{_slug(address)}-*/{_COMPLETE}"), key=lambda file: -file.stat().st_mtime)
    copies = (_complete_copy(file.parent) for file in files)
    return next((one for one in copies if one and one.address == address), None)


def _copy(address: str, store: ModuleType, listing: Listing, listener: Listener) -> RemoteSource:
    """Copy the files into the cache, or return the copy that is there; a stopped copy goes on where it ended."""
    base = cache_folder() / f"{_slug(address)}-{_digest(address, listing.revision)}"
    with _locked(base):
        if listing.revision and (there := _complete_copy(base)):
            return there
        part = base.with_name(f"{base.name}.part")
        if not listing.revision:  # what is there may be of another version
            shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True, exist_ok=True)
        _refuse_full_disk(address, listing, part)
        rows = f", {counted(listing.rows, 'row')}" if listing.rows is not None else ""
        size = f", {format_bytes(listing.size)}" if listing.size else ""
        at = f" at {listing.revision[:12]}" if listing.revision else ""
        listener(Message(text=f"{address}{at}: {counted(len(listing.files), 'file')}{size}{rows}"))
        report, files = _progress(address, listing, listener), list[Path]()
        for file in listing.files:
            target = part / file.name
            if Path(file.name).is_absolute() or ".." in Path(file.name).parts:
                raise DataError(f"{address}: the file '{file.name}' would lie outside {part}; expected another name")
            target.parent.mkdir(parents=True, exist_ok=True)
            store.download(address, listing, file, target, report)
            files += unpack.unpacked(target, part) if target.name.lower().endswith(PACKED) else [target]
        revision = listing.revision or _hash_contents(files)
        whole = base if listing.revision else base.with_name(f"{_slug(address)}-{_digest(address, revision)}")
        source = RemoteSource(
            address=address,
            revision=revision,
            files=tuple(str(whole / file.relative_to(part)) for file in files),
            size=sum(file.stat().st_size for file in files),
            notes=listing.notes,
        )
        source.save(part / _COMPLETE)
        if not _complete_copy(whole):  # which another process may be reading
            shutil.rmtree(whole, ignore_errors=True)
            part.rename(whole)
        shutil.rmtree(part, ignore_errors=True)
    return source


def _complete_copy(base: Path) -> RemoteSource | None:
    with suppress(SetupError, OSError):  # a damaged record is made again
        return source if (source := RemoteSource.load(base / _COMPLETE)).is_complete else None
    return None


def _refuse_full_disk(address: str, listing: Listing, part: Path) -> None:
    there = sum(file.stat().st_size for file in part.rglob("*") if file.is_file())
    need, free = listing.size - there + _MARGIN_BYTES, disk_free_bytes(part)
    if need > free:
        raise DoesNotFitError(
            f"{address}: needs {format_bytes(need)} in {cache_folder()}, but only {format_bytes(free)} are free; free "
            "some space, or set FULLTUNE_CACHE to a folder on a larger disk"
        )


def _progress(address: str, listing: Listing, listener: Listener) -> OnBytes:
    done, reported, size = 0, time.monotonic(), listing.size

    def report(num_bytes: int) -> None:
        nonlocal done, reported
        done += num_bytes
        if time.monotonic() - reported > _REPORT_SECONDS:
            reported = time.monotonic()
            listener(RowsRead(name="copying", done=done, total=max(size, done) or None, unit="bytes"))

    return report


def _hash_contents(files: Sequence[Path]) -> str:
    versions = []
    for file in files:
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        versions.append(RemoteFile(file.name, file.stat().st_size, digest))
    return revision_of(versions)


def _slug(address: str) -> str:
    return re.sub(r"\W+", "-", address.partition("?")[0].partition("://")[2] or Path(address).name).strip("-")[-60:]


def _digest(address: str, revision: str) -> str:
    return hashlib.sha256(f"{address} {revision}".encode()).hexdigest()[:12]


@contextmanager
def _locked(base: Path) -> Iterator[None]:
    """Let only one process at a time copy an address."""
    base.parent.mkdir(parents=True, exist_ok=True)
    with base.with_name(f"{base.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
