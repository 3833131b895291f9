"""A stand-in for the part of the Hugging Face hub that fetching uses: a real HTTP server on loopback."""

from __future__ import annotations

import hashlib
import json
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves `files` (path -> bytes) as the dataset repository `repository`."""

    daemon_threads = True

    def __init__(self, repository: str, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repository, self.files = repository, files
        self.served: dict[str, int] = {}  # bytes of content sent, by path
        self.cut: dict[str, int] = {}  # path -> close the connection once after so many bytes
        self.corrupt: set[str] = set()  # paths whose content is sent with one byte changed

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _json(self, value: object, status: int = 200, code: str = "") -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        if not self.path.startswith(f"/api/datasets/{self.server.repository}/paths-info/{COMMIT}"):
            return self._json({"error": "Repository not found"}, 404, "RepoNotFound")
        if "json" in self.headers.get("Content-Type", ""):
            paths = json.loads(body)["paths"]
        else:
            paths = urllib.parse.parse_qs(body)["paths"]
        found = []
        for path in paths:
            if path in self.server.files:
                data = self.server.files[path]
                entry = {"type": "file", "path": path, "size": len(data), "oid": _git_hash(data)}
                if path.endswith((".bin", ".model")):
                    digest = hashlib.sha256(data).hexdigest()
                    entry["lfs"] = {"oid": digest, "size": len(data), "pointerSize": 134}
                found.append(entry)
        return self._json(found)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urllib.parse.unquote(self.path.split("?")[0])
        if path.startswith(f"/api/datasets/{self.server.repository}"):
            return self._json(
                {"id": self.server.repository, "sha": COMMIT, "siblings": [], "tags": [], "private": False}
            )
        prefix = f"/datasets/{self.server.repository}/resolve/{COMMIT}/"
        if not path.startswith(prefix):
            return self._json({"error": "Repository not found"}, 404, "RepoNotFound")
        name = path.removeprefix(prefix)
        if name not in self.server.files:
            return self._json({"error": "Entry not found"}, 404, "EntryNotFound")
        return self._file(name)

    def _file(self, name: str) -> None:
        whole = data = self.server.files[name]
        if name in self.server.corrupt:
            data = data[:-1] + bytes([data[-1] ^ 1])
        start = 0
        if wanted := self.headers.get("Range"):
            start = int(wanted.removeprefix("bytes=").split("-")[0] or 0)
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(data) - start))
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{hashlib.sha256(whole).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "HEAD":
            return
        body = data[start:]
        if cut := self.server.cut.pop(name, 0):
            body = body[:cut]
            self.close_connection = True
        self.wfile.write(body)
        self.server.served[name] = self.server.served.get(name, 0) + len(body)
        if cut:
            self.wfile.flush()
            self.connection.close()


def _git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


@contextmanager
def serve(repository: str, files: dict[str, bytes]) -> Iterator[Hub]:
    hub = Hub(repository, files)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
