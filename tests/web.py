"""A web server on this machine, with ranges, versions, and faults on request."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import md5
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Fault:
    """What is wrong with an answer."""

    status: int = 0
    """Answers with this status and no content, if not 0."""
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    """Closes the connection after so many bytes."""
    then: Callable[[], Any] = lambda: None
    """Is called before the content is sent."""


@dataclass
class Site:
    address: str
    files: dict[str, bytes] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    """Headers of all answers with content; an empty one is left out."""
    faults: list[Fault] = field(default_factory=list)
    """Faults of the next answers with content; the listing asks for one byte and comes first."""
    always: Fault | None = None
    requests: list[tuple[str, str]] = field(default_factory=list)
    """Method and range of each request."""
    logins: list[str | None] = field(default_factory=list)
    pause: float = 0.0
    """Seconds between 16 KiB of content."""


@contextmanager
def serve() -> Iterator[Site]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path, wanted = self.path.partition("?")[0], self.headers.get("Range", "")
            site.requests.append((path, wanted))
            site.logins.append(self.headers.get("Authorization"))
            fault = site.always or (site.faults.pop(0) if site.faults else Fault())
            whole = site.files.get(path)
            if fault.status or whole is None:
                self.send_response(fault.status or 404)
                for name, value in {**fault.headers, "Content-Length": "0"}.items():
                    self.send_header(name, value)
                self.end_headers()
                return
            headers = {"ETag": f'"{md5(whole).hexdigest()}"', **site.headers, **fault.headers}
            match = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted)
            fits = self.headers.get("If-Range") in (None, headers["ETag"]) and headers.get("Accept-Ranges") != "none"
            start, stop = (int(match[1]), int(match[2] or len(whole) - 1) + 1) if match and fits else (0, len(whole))
            self.send_response(206 if match and fits else 200)
            if match and fits:
                headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(whole)}"
            for name, value in {"Content-Length": str(stop - start), **headers}.items():
                if value:
                    self.send_header(name, value)
            self.end_headers()
            content = whole[start:stop][: fault.cut]
            fault.then()
            for at in range(0, len(content), 2**14):
                self.wfile.write(content[at : at + 2**14])
                if site.pause:  # tests replace `sleep`
                    time.sleep(site.pause)

        def do_HEAD(self) -> None:
            self.send_error(site.always.status if site.always else 405)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    site = Site(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield site
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
