"""A Hub on this machine, which serves data sets from memory and can be told to fail."""

from __future__ import annotations

import hashlib
import json
import threading
import urllib.parse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest import mock

from huggingface_hub import constants


class Hub:
    """Data sets by name, each with commits by reference."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.commits: dict[str, dict[str, bytes]] = {}
        self.refs: dict[str, dict[str, str]] = {}
        self.failures: dict[str, tuple[int, str]] = {}
        """Status and error code of the answers to paths that contain a text."""
        self.requests: list[str] = []

    def push(self, name: str, files: Mapping[str, bytes | str], ref: str = "refs/heads/main") -> str:
        """Commit these files, and return the commit."""
        contents = {path: text.encode() if isinstance(text, str) else text for path, text in files.items()}
        commit = hashlib.sha1(repr((self.url, name, sorted(contents.items()))).encode()).hexdigest()
        self.commits[commit] = contents
        self.refs.setdefault(name, {})[ref] = commit
        return commit

    def find_commit(self, name: str, revision: str) -> str | None:
        refs = self.refs[name]
        by_name = {ref.removeprefix("refs/heads/").removeprefix("refs/tags/"): commit for ref, commit in refs.items()}
        return revision if revision in self.commits else (refs | by_name).get(revision)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def _send(self, code: int, body: bytes, **headers: str) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _send_json(self, content: Any, code: int = 200, error: str = "") -> None:
        headers = {"Content_Type": "application/json"} | ({"X_Error_Code": error} if error else {})
        self._send(code, json.dumps(content).encode(), **headers)

    def do_GET(self) -> None:
        url = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {url}")
        for part, (code, error) in self.hub.failures.items():
            if part in url:
                return self._send_json({"error": "told to fail"}, code, error)
        parts = url.removeprefix("/api").removeprefix("/datasets/").split("/")
        name, rest = "/".join(parts[:2]), parts[2:]
        if name not in self.hub.refs:
            return self._send_json({"error": "Repository not found"}, 401, "RepoNotFound")
        if rest == ["refs"]:
            return self._send_json(self._list_refs(name))
        kind, ref = (rest[0], "/".join(rest[1:])) if rest else ("revision", "main")
        path = ""
        if kind == "resolve":
            ref, path = rest[1], "/".join(rest[2:])
        commit = self.hub.find_commit(name, ref)
        if commit is None and kind == "tree":  # of a folder
            commit, path = self.hub.find_commit(name, rest[1]), "/".join(rest[2:])
        if commit is None:
            return self._send_json({"error": f"Invalid rev id: {ref}"}, 404, "RevisionNotFound")
        files = self.hub.commits[commit]
        if kind == "revision":
            return self._send_json({"id": name, "sha": commit, "siblings": [], "tags": []})
        if kind == "tree" and not path:
            entries = [
                {"type": "file", "path": file, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for file, content in files.items()
            ]
            folders = {file.rpartition("/")[0] for file in files} - {""}
            entries += [{"type": "directory", "path": folder, "oid": "0" * 40, "size": 0} for folder in folders]
            return self._send_json(entries)
        if path not in files:
            return self._send_json({"error": "Entry not found"}, 404, "EntryNotFound")
        content = files[path]
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X_Repo_Commit": commit, "Accept_Ranges": "bytes"}
        if given := self.headers.get("Range"):
            first, _, last = given.removeprefix("bytes=").partition("-")
            end = min(int(last) if last else len(content) - 1, len(content) - 1)
            headers["Content_Range"] = f"bytes {first}-{end}/{len(content)}"
            return self._send(206, content[int(first) : end + 1], **headers)
        return self._send(200, content, **headers)

    do_HEAD = do_POST = do_GET

    def _list_refs(self, name: str) -> dict[str, Any]:
        kinds = {"branches": "refs/heads/", "tags": "refs/tags/", "converts": "refs/convert/"}
        refs = self.hub.refs[name].items()
        return {
            kind: [
                {"name": ref.removeprefix(before), "ref": ref, "targetCommit": commit}
                for ref, commit in refs
                if ref.startswith(before)
            ]
            for kind, before in kinds.items()
        }


@contextmanager
def serve_hub(cache: Path) -> Iterator[Hub]:
    """Serve a Hub that this process uses instead of the real one, with its own cache."""
    handler = type("Handler", (_Handler,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    url = f"http://127.0.0.1:{server.server_port}"
    handler.hub = hub = Hub(url)  # type: ignore[attr-defined]  # a handler's own
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    try:
        with mock.patch.multiple(
            constants,
            ENDPOINT=url,
            HUGGINGFACE_CO_URL_TEMPLATE=template,
            HF_HUB_CACHE=str(cache),
            HF_HUB_OFFLINE=False,
        ):
            yield hub
    finally:
        server.shutdown()
        server.server_close()
