"""A small Hugging Face hub on loopback: one dataset at one commit, by the requests that `datasets` makes."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "org/chats"


@contextmanager
def serving(files: dict[str, bytes]) -> Iterator[tuple[str, list[str]]]:
    """Serves a dataset with these files; yields the hub's address and the list of requests."""
    requests: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(files, requests))
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


def _handler(files: dict[str, bytes], requests: list[str]) -> type[BaseHTTPRequestHandler]:
    entries = [{"type": "file", "path": name, "size": len(body), "oid": _oid(body)} for name, body in files.items()]
    information = {
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
        "siblings": [{"rfilename": name} for name in files],
    }

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            requests.append(f"{self.command} {self.path}")
            api, resolve = f"/api/datasets/{REPOSITORY}", f"/datasets/{REPOSITORY}/resolve/{COMMIT}/"
            if path == f"{api}/revision/{COMMIT}":
                self._reply(information)
            elif path.startswith(f"{api}/tree/{COMMIT}"):
                self._reply(_children(entries, path.removeprefix(f"{api}/tree/{COMMIT}").strip("/")))
            elif path.startswith(resolve) and path.removeprefix(resolve) in files:
                self._send(files[path.removeprefix(resolve)], "application/octet-stream")
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
            if status == 404:
                known = f"/{REPOSITORY}" in self.path
                missing = "EntryNotFound" if COMMIT in self.path else "RevisionNotFound"
                self.send_header("X-Error-Code", missing if known else "RepoNotFound")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """The requests are in the list."""

    return Handler
