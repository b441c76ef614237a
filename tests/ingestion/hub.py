"""A small Hugging Face hub on loopback: one dataset or model at one commit, by the requests that its clients make."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "org/chats"


@contextmanager
def serving(
    files: dict[str, bytes], kind: str = "datasets", *, gated: bool = False, cut: str = ""
) -> Iterator[tuple[str, list[str]]]:
    """Serves these files; yields the hub's address and the list of requests.

    Args:
        files: contents by name.
        kind: `datasets` or `models`; the branch `main` of a model is at the same commit.
        gated: nobody has accepted the terms.
        cut: the file of which only the first half ever arrives.
    """
    requests: list[str] = []
    handler = type("Handler", (_Handler,), {"hub": _Hub(files, requests, kind, gated, cut)})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _children(entries: list[dict[str, object]], folder: str) -> list[dict[str, object]]:
    """The files and folders directly in `folder`."""
    start = f"{folder}/" if folder else ""
    inside = [entry for entry in entries if str(entry["path"]).startswith(start)]
    files = [entry for entry in inside if "/" not in str(entry["path"]).removeprefix(start)]
    names = {str(entry["path"]).removeprefix(start).partition("/")[0] for entry in inside if entry not in files}
    return [*files, *({"type": "directory", "path": f"{start}{name}", "oid": "0" * 40} for name in sorted(names))]


@dataclass
class _Hub:
    """What a hub serves, as in `serving`, and the requests so far."""

    files: dict[str, bytes]
    requests: list[str]
    kind: str
    gated: bool
    cut: str

    @property
    def api(self) -> str:
        return f"/api/{self.kind}/{REPOSITORY}"

    @property
    def resolve(self) -> str:
        prefix = "" if self.kind == "models" else f"/{self.kind}"
        return f"{prefix}/{REPOSITORY}/resolve/{COMMIT}/"

    @property
    def entries(self) -> list[dict[str, object]]:
        files = self.files.items()
        return [{"type": "file", "path": name, "size": len(body), "oid": _oid(body)} for name, body in files]

    @property
    def information(self) -> dict[str, object]:
        return {
            "_id": "0" * 24,
            "id": REPOSITORY,
            "author": "org",
            "sha": COMMIT,
            "lastModified": "2026-01-01T00:00:00.000Z",
            "private": False,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "createdAt": "2026-01-01T00:00:00.000Z",
            "siblings": [{"rfilename": name} for name in self.files],
        }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: _Hub

    def do_GET(self) -> None:
        path, hub = unquote(urlsplit(self.path).path), self.hub
        hub.requests.append(f"{self.command} {self.path}")
        name = path.removeprefix(hub.resolve) if path.startswith(hub.resolve) else ""
        if hub.gated and path.startswith(hub.api):
            self._reply({"error": "Access to this repository is restricted."}, 403)
        elif path in (f"{hub.api}/revision/{COMMIT}", f"{hub.api}/revision/main", hub.api):
            self._reply(hub.information)
        elif path.startswith(f"{hub.api}/tree/{COMMIT}"):
            self._reply(_children(hub.entries, path.removeprefix(f"{hub.api}/tree/{COMMIT}").strip("/")))
        elif self.command == "GET" and hub.cut and name == hub.cut:
            self._break_off(hub.files[name])
        elif name in hub.files:
            self._send(hub.files[name], "application/octet-stream")
        else:
            self._reply({}, 404)

    do_HEAD = do_GET

    def _reply(self, value: object, status: int = 200) -> None:
        self._send(json.dumps(value).encode(), "application/json", status)

    def _send(self, body: bytes, kind: str, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{_oid(body)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        if status == 403:
            self.send_header("X-Error-Code", "GatedRepo")
        if status == 404:
            known = f"/{REPOSITORY}" in self.path
            missing = "EntryNotFound" if COMMIT in self.path else "RevisionNotFound"
            self.send_header("X-Error-Code", missing if known else "RepoNotFound")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _break_off(self, body: bytes) -> None:
        """Sends the first half of a file and closes the connection; a request for the rest gets nothing."""
        self.close_connection = True
        if "Range" not in self.headers:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2])

    def log_message(self, format: str, *args: object) -> None:
        """The requests are in the list."""
