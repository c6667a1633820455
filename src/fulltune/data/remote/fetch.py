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
from errno import ENOSPC
from pathlib import Path
from types import ModuleType

from fulltune.data.remote import unpack
from fulltune.data.remote.listing import Listing, OnBytes
from fulltune.errors import DataError, DoesNotFitError, FulltuneError, SetupError
from fulltune.recipe.address import BUCKETS, DATABASES, HUB, PACKED, WEB, hub_place, is_fetched, scheme_of
from fulltune.recipe.fields import Recipe
from fulltune.records.data import SOURCES, RemoteSource, RemoteSources
from fulltune.records.events import Listener, Message, RowsRead
from fulltune.system.hardware import disk_free_bytes
from fulltune.text import counted, format_bytes

_COMPLETE = "copied"  # no data file's name
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
    is_fold = run_folder.parent.name == "folds"  # and begins with the sources of all folds
    is_planned = is_fold or any(run_folder.rglob("plan/*.json"))
    for address in addresses:

        def record(source: RemoteSource) -> None:
            sources[source.address] = source
            run_folder.mkdir(parents=True, exist_ok=True)
            RemoteSources(sources=tuple(sources[one] for one in addresses if one in sources)).save(run_folder / SOURCES)

        try:
            pins = {_place(one.address): one.revision for one in sources.values()}
            begun = RemoteSource(address=address, revision=pins.get(_place(address), ""))
            record(fetch(address, listener, sources.get(address, begun), record, is_planned))
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(problems)
    return {address: sources[address] for address in addresses}


def fetch(
    address: str,
    listener: Listener,
    earlier: RemoteSource | None = None,
    record: Callable[[RemoteSource], None] = lambda source: None,
    is_planned: bool = True,
) -> RemoteSource:
    """Return the local copies of an address's files, of the revision of `earlier` if given. `record` is called with the
    revision before files are read. Unless a run is planned with them, rows without a revision are read again."""
    store, pinned = _store_of(address), earlier.revision if earlier else ""
    try:
        listing = store.list_files(address, None)
    except FulltuneError as error:
        # A copy that a run has begun with is as good as the original, which may be out of reach by now.
        source = earlier if earlier and earlier.is_complete else _find_copy_offline(address, pinned)
        if source is None:
            raise
        listener(Message(text=f"{address}: using the local copy of {source.revision[:12]} ({error.problems[0]})"))
        return source
    if not is_planned and (store is unpack or not listing.revision):
        earlier, pinned = None, ""
    if earlier and pinned:
        if listing.revision not in ("", pinned):
            text = f"{address}: is now at {listing.revision[:12]}; this run goes on with {pinned[:12]}"
            listener(Message(text=text, level="warning"))
        if earlier.is_complete:
            if not listing.revision:
                listener(Message(text=f"{address}: is not read again; this run goes on with {pinned[:12]}"))
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
    from fulltune.data.remote import buckets, hub, sql, web

    stores = {HUB: hub, **dict.fromkeys(WEB, web), **dict.fromkeys(BUCKETS, buckets), **dict.fromkeys(DATABASES, sql)}
    return stores.get(scheme_of(address), unpack)


def _place(address: str) -> tuple[str, ...]:
    """Return a data set and a revision on the Hub, which is the same commit for all files of a run, or the address."""
    name, revision, _ = hub_place(address)
    return (name, revision or "main") if scheme_of(address) == HUB else (address,)


def _find_copy_offline(address: str, pinned: str) -> RemoteSource | None:
    """Return the newest complete copy if the Hub is switched off (`HF_HUB_OFFLINE`), else None."""
    from huggingface_hub.constants import HF_HUB_OFFLINE

    is_off = HF_HUB_OFFLINE and scheme_of(address) == HUB
    records = cache_folder().glob(f"{_slug(address)}-*/{_COMPLETE}") if is_off else ()
    copies = (_complete_copy(record.parent) for record in sorted(records, key=os.path.getmtime, reverse=True))
    return next((one for one in copies if one and one.address == address and pinned in ("", one.revision)), None)


def _copy(address: str, store: ModuleType, listing: Listing, listener: Listener) -> RemoteSource:
    """Copy the files into the cache, or return the copy that is there; a stopped copy goes on where it ended."""
    base = cache_folder() / f"{_slug(address)}-{_digest(address, listing.revision)}"
    with _locked(address, base):
        if listing.revision and (whole_copy := _complete_copy(base)):
            return whole_copy
        part = base.with_name(f"{base.name}.part")
        if not listing.revision:  # what is there may be of another version
            shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True, exist_ok=True)
        there = sum(file.stat().st_size for file in part.rglob("*") if file.is_file())
        if (need := listing.size - there + unpack.MARGIN_BYTES) > (free := disk_free_bytes(part)):
            raise OSError(ENOSPC, f"needs {format_bytes(need)} in {part}, but only {format_bytes(free)} are free")
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
            files += unpack.unpacked(target) if target.name.lower().endswith(PACKED) else [target]
        revision = listing.revision or _hash_contents(files)
        whole = cache_folder() / f"{_slug(address)}-{_digest(address, revision)}"
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
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]


def _slug(address: str) -> str:
    return re.sub(r"\W+", "-", address.partition("?")[0].partition("://")[2] or Path(address).name).strip("-")[-60:]


def _digest(address: str, revision: str) -> str:
    return hashlib.sha256(f"{address} {revision}".encode()).hexdigest()[:12]


@contextmanager
def _locked(address: str, base: Path) -> Iterator[None]:
    """Let only one process at a time copy an address, and say what to do about errors of the disk."""
    try:
        base.parent.mkdir(parents=True, exist_ok=True)
        with base.with_name(f"{base.name}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
    except OSError as error:
        kind = DoesNotFitError if error.errno == ENOSPC else DataError
        reason = re.sub(r"^\[Errno \d+\] ", "", str(error))
        raise kind(f"{address}: cannot be copied ({reason}); make room on the disk, or set FULLTUNE_CACHE") from None
