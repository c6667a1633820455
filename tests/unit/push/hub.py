"""A Hub on this machine's loopback: the calls that create a repository and commit files, with what they left."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]


@dataclass
class Repository:
    private: bool
    branches: dict[str, Files] = field(default_factory=lambda: {"main": {".gitattributes": b"*.safetensors"}})
    commits: int = 0


@dataclass
class Hub:
    address: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    stored: Files = field(default_factory=dict)
    """Contents of large files by their SHA-256, which a commit then names."""
    requests: list[str] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)
    refuses: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Status and message by a pattern of `METHOD /path`."""
    cuts: bool = False
    """Close the connection in the middle of a large file."""

    def files(self, name: str, branch: str = "main") -> Files:
        return {path: text for path, text in self.repositories[name].branches[branch].items() if path[0] != "."}

    def answer(self, call: str, query: str, body: bytes) -> tuple[int, Any]:
        """Return the status and the JSON that answer `METHOD /path`."""
        for pattern, (status, message) in self.refuses.items():
            if re.search(pattern, call):
                return status, {"error": message}
        sent = json.loads(body) if body[:1] == b"{" and b"\n{" not in body else {}
        if call == "POST /api/repos/create":
            return self._create(f"{sent['organization']}/{sent['name']}", sent)
        if call == "POST /api/validate-yaml":
            return 200, {"warnings": [], "errors": []}
        if match := re.fullmatch(r"POST /(.+)\.git/info/lfs/objects/batch", call):
            return 200, {"transfer": "basic", "objects": [self._place(one) for one in sent["objects"]]}
        match = re.fullmatch(r"(GET|POST) /api/models/([^/]+/[^/]+)(?:/(\w+)/(.+))?", call)
        if match is None or match[2] not in self.repositories:
            return 404, {"error": "Repository not found"}
        repository, action, revision = self.repositories[match[2]], match[3], match[4] or "main"
        if action == "branch":
            repository.branches[revision] = dict(repository.branches["main"])
            return 200, {}
        if revision not in repository.branches:
            return 404, {"error": "Revision not found"}
        if action == "preupload":
            return 200, {"files": [self._mode(one["path"]) for one in sent["files"]]}
        if action == "commit":
            return 200, self._commit(match[2], revision, body, as_pr="create_pr=1" in query)
        siblings = [{"rfilename": path} for path in repository.branches[revision]]
        return 200, {"id": match[2], "sha": "a" * 40, "private": repository.private, "siblings": siblings}

    def _create(self, name: str, sent: dict[str, Any]) -> tuple[int, Any]:
        if name in self.repositories:
            return 409, {"error": "You already created this model repo", "url": f"{self.address}/{name}"}
        is_private = sent.get("visibility", "private" if sent.get("private") else "public") == "private"
        self.repositories[name] = Repository(is_private)
        return 200, {"url": f"{self.address}/{name}"}

    def _place(self, one: dict[str, Any]) -> dict[str, Any]:
        return {**one, "actions": {"upload": {"href": f"{self.address}/lfs/{one['oid']}"}}}

    def _mode(self, path: str) -> dict[str, Any]:
        mode = "lfs" if path.endswith((".safetensors", ".gguf", ".onnx", ".data")) else "regular"
        return {"path": path, "uploadMode": mode, "shouldIgnore": False}

    def _commit(self, name: str, revision: str, body: bytes, as_pr: bool) -> dict[str, Any]:
        """Apply all operations or, if a large file is missing, none."""
        repository = self.repositories[name]
        files = dict(repository.branches[revision])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.stored[value["oid"]]
        repository.branches["refs/pr/1" if as_pr else revision] = files
        repository.commits += 1
        pull = f"{self.address}/{name}/discussions/1" if as_pr else None
        return {"commitUrl": f"{self.address}/{name}/commit/{'b' * 40}", "commitOid": "b" * 40, "pullRequestUrl": pull}


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Answer requests in a thread during the block."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            url = urlsplit(self.path)
            call = f"{self.command} {unquote(url.path)}"
            hub.requests.append(call)
            hub.tokens.add(self.headers["Authorization"])
            length = int(self.headers["Content-Length"] or 0)
            if self.command == "PUT":
                if hub.cuts:
                    self.rfile.read(length // 2)
                    self.close_connection = True
                    self.connection.close()
                    return
                content = self.rfile.read(length)
                assert hashlib.sha256(content).hexdigest() == url.path.rpartition("/")[2]
                hub.stored[url.path.rpartition("/")[2]] = content
                status, answer = 200, {}
            else:
                status, answer = hub.answer(call, url.query, self.rfile.read(length))
            text = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            if status >= 400:
                self.send_header("X-Error-Message", answer["error"])
            self.end_headers()
            self.wfile.write(text)

        do_POST = do_PUT = do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
