"""Files on the web."""

from __future__ import annotations

import os
import re
import time
from base64 import b64encode
from collections.abc import Callable
from http.client import HTTPException, HTTPMessage, HTTPResponse
from mimetypes import guess_extension
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import IO, TypeVar
from urllib.error import HTTPError
from urllib.parse import quote, unquote, urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from fulltune.data.readers.files import SUFFIXES, has_data_suffix
from fulltune.data.remote.listing import Listing, OnBytes, RemoteFile, revision_of
from fulltune.errors import DataError
from fulltune.recipe.address import PACKED

WAITS = (0.5, 1.0, 2.0, 4.0)
"""Seconds before each further try; a server may ask for up to a minute."""
_T = TypeVar("_T")


def list_files(address: str, revision: str | None) -> Listing:
    def ask() -> Listing:
        with _open(address, Range="bytes=0-0") as answer:  # as many servers refuse HEAD
            of = answer.headers
            size = re.search(r"\d+$", of.get("Content-Range" if answer.status == 206 else "Content-Length", ""))
            file = RemoteFile(_name(address, of), int(size[0]) if size else None, _version(of))
        return Listing((file,), revision_of([file]))

    return _persist(address, ask)


def download(address: str, listing: Listing, file: RemoteFile, target: Path, report: OnBytes) -> None:
    def ask() -> None:
        start = target.stat().st_size if target.exists() else 0
        if start and start == file.size:
            return
        if start > (file.size or 0) or file.version[:2] in ("", "W/"):  # which cannot tell that two parts fit together
            start = 0
        with _open(address, **({"Range": f"bytes={start}-", "If-Range": file.version} if start else {})) as answer:
            if file.version and _version(answer.headers) not in ("", file.version):
                target.unlink(missing_ok=True)
                raise DataError(f"{address}: changes while it is copied; run again when it is no longer written")
            goes_on = answer.headers.get("Content-Range", "").startswith(f"bytes {start}-")
            with target.open("ab" if goes_on else "wb") as out:
                while piece := answer.read(2**20):
                    report(out.write(piece))
                    if out.tell() > (file.size or out.tell()):
                        raise DataError(f"{address}: sends more than the {file.size:,} bytes that it announced")
                if out.tell() != (size := file.size or out.tell() + (answer.length or 0)):
                    raise ConnectionError(f"ends after {out.tell():,} of {size:,} bytes")

    _persist(address, ask)


def _persist(address: str, ask: Callable[[], _T]) -> _T:
    """Ask again after temporary errors."""
    for pause in (*WAITS, 60):
        asked = ""
        try:
            return ask()
        except HTTPError as error:
            reason, asked = str(error.reason).partition(".\n")[0], error.headers["Retry-After"] or ""
            problem = f"answers {error.code} {reason}"
            if error.code < 500 and error.code not in (408, 429):
                login = f"log in by 'machine {urlsplit(address).hostname} login NAME password PASSWORD' in ~/.netrc"
                advice = login if error.code in (401, 403) else "check the address"
                raise DataError(f"{address}: {problem}; {advice}, or download the file") from None
        except (OSError, HTTPException) as error:
            problem = f"cannot be copied ({getattr(error, 'reason', error) or type(error).__name__})"
        except ValueError as error:  # of the address, or of one that it redirects to
            raise DataError(f"{address}: leads to an address that is not valid ({error}); correct it") from None
        if (wait := max(pause, int(asked) if asked.isdigit() else 0)) >= 60:
            break
        time.sleep(wait)
    later = f"in {asked} s" if asked.isdigit() else "later"
    raise DataError(f"{address}: {problem}; try again {later}: what has arrived is kept")


def _name(address: str, headers: HTTPMessage) -> str:
    """Return a file name without folders. Raises `DataError` if it does not say how to read the file."""
    path, kind = unquote(urlsplit(address).path), headers.get_content_type()
    for name in (path, headers.get_filename() or "", f"data{guess_extension(kind) or ''}"):
        name = re.sub(r"[^\w.-]+", "-", re.split(r"[/\\]", name)[-1]).lstrip(".")
        if has_data_suffix(Path(name)) or name.lower().endswith(PACKED):
            return name
    raise DataError(f"{address}: unknown type ({kind}); expected {', '.join(SUFFIXES + PACKED)}")


def _version(headers: HTTPMessage) -> str:
    return headers.get("ETag") or headers.get("Last-Modified") or ""


def _open(url: str, **headers: str) -> HTTPResponse:
    request = Request(quote(url, safe="%/:?#=&@+,;~[]!$'()*"), headers={"User-Agent": "fulltune", **headers})
    answer: HTTPResponse = build_opener(_Redirects).open(_with_login(request), timeout=30)
    return answer


def _with_login(request: Request) -> Request:
    host, logins = urlsplit(request.full_url).hostname or "", Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    if logins.exists() and (request.type == "https" or host in ("localhost", "127.0.0.1")):
        try:
            login = netrc(str(logins)).hosts.get(host)
        except (NetrcParseError, UnicodeError) as error:  # whose text may contain a password
            line = getattr(error, "lineno", "?")
            raise DataError(f"{logins}: line {line}: expected 'machine HOST login NAME password ...'") from None
        if login:  # which is not sent to other hosts after a redirect
            encoded = b64encode(f"{login[0]}:{login[2]}".encode()).decode()
            request.add_unredirected_header("Authorization", f"Basic {encoded}")
    return request


class _Redirects(HTTPRedirectHandler):
    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Request | None:
        if req.type == "https" and not newurl.startswith("https:"):
            there = newurl.partition("?")[0]  # what follows may be a secret
            raise DataError(f"{req.full_url} -> {there}: is redirected away from https; check the address")
        redirected = super().redirect_request(req, fp, code, msg, headers, newurl)
        return redirected and _with_login(redirected)
