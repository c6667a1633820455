"""Files in object stores."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

from pyarrow.fs import FileSelector, FileSystem

from fulltune.data.readers.files import SUFFIXES
from fulltune.data.remote.listing import Listing, OnBytes, RemoteFile, may_hold_rows, revision_of
from fulltune.errors import DataError
from fulltune.recipe.address import PACKED
from fulltune.text import first_few, near_names

_LOGIN = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or run 'aws configure'",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS, or run 'gcloud auth application-default login'",
    "ab": "set AZURE_TENANT_ID, AZURE_CLIENT_ID and AZURE_CLIENT_SECRET, or run 'az login'",
}


def list_files(address: str, revision: str | None) -> Listing:
    with _explained(address):
        system, path = _open(address)
        chosen, (folder, _, pattern) = [system.get_file_info(path)], path.rpartition("/")
        if not chosen[0].is_file:
            if chosen[0].type.name == "Directory":
                folder, pattern = path, "*"
            infos = system.get_file_info(FileSelector(folder))
            listed = {one.base_name: one for one in infos if may_hold_rows(one.base_name)}
            names = [name for name, one in sorted(listed.items()) if one.is_file and fnmatchcase(name, pattern)]
            chosen = [listed[name] for name in names if pattern != "*" or name.lower().endswith(SUFFIXES + PACKED)]
    if not chosen:
        near = first_few(near_names(pattern, listed) or [*listed]) or "nothing"
        raise DataError(f"{address}: no such data file, but {near}; check the address")
    # The version has whole seconds: what was written in this one may still be replaced by as many bytes.
    time.sleep(min(2, max(0, *((one.mtime_ns or 0) / 1e9 + 2 - time.time() for one in chosen))))
    files = tuple(RemoteFile(one.base_name, one.size, str(one.mtime_ns), one.path) for one in chosen)
    return Listing(files, revision_of(files))


def download(address: str, listing: Listing, file: RemoteFile, target: Path, report: OnBytes) -> None:
    with _explained(address), target.open("ab") as out:
        system, _ = _open(address)
        with system.open_input_file(file.key) as source:
            source.seek(out.tell())
            while piece := source.read(2**23):
                report(out.write(piece))
        now = system.get_file_info(file.key)
        if (out.tell(), now.size, str(now.mtime_ns)) != (file.size, file.size, file.version):
            target.unlink()
            raise DataError(f"{address}: {file.name} changes while it is copied; run again when it is not written")


def _open(address: str) -> tuple[FileSystem, str]:
    scheme, bucket, path, query = re.findall(r"(?s)^(\w+)://([^/?]*)/?([^?]*)\??(.*)$", address)[0]
    limit = "&retry_limit_seconds=20" if scheme.lower() == "gs" and "retry_limit" not in query else ""
    system, root = FileSystem.from_uri(f"{scheme.lower()}://{bucket}/?{query}{limit}")
    return system, f"{root.rstrip('/')}/{path}".rstrip("/")


@contextmanager
def _explained(address: str) -> Iterator[None]:
    """Turn errors of a store and of the disk into a `DataError` that says what to do."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = re.sub(r"(?s).*AWS Error |\[Errno \d+\] |\. Detail: .*|\n.*", "", str(error))
        is_denied = re.search("DENIED|KEY_ID|SIGNATURE|CREDENTIAL|AUTH|40[13]", reason, re.IGNORECASE)
        check = "check bucket, region (AWS_REGION), endpoint, network and disk"
        hint = _LOGIN[address.lower()[:2]] if is_denied else check
        raise DataError(f"{address}: cannot be copied ({reason}); {hint}") from None
