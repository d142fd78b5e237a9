"""A hub and file servers on loopback, which break off, redirect and count as a test wants it."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class FileServer:
    """Serves `files` by path. Keeps (path, headers) of every GET.

    `redirects` are path → URL; `statuses` are used up for the next requests; `breaks` are byte counts after which the
    connection is cut, used up one by one.
    """

    host: str = "127.0.0.1"
    files: dict[str, bytes] = field(default_factory=dict)
    redirects: dict[str, str] = field(default_factory=dict)
    statuses: list[int] = field(default_factory=list)
    breaks: list[int] = field(default_factory=list)
    etags: bool = True
    headers: dict[str, str] = field(default_factory=dict)
    got: list[tuple[str, dict[str, str]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        owner = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                owner.got.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
                owner.answer(self)

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
                return

        self.server = http.server.ThreadingHTTPServer((self.host, 0), Handler)
        self.server.daemon_threads = False  # closing waits for every answer
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.server.server_address[1]}"

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(request.path).path)
        status = self.statuses.pop(0) if self.statuses else 200
        if status != 200 or (path not in self.redirects and path not in self.files):
            return self.send(request, 404 if status == 200 else status, {}, b"")
        if path in self.redirects:
            return self.send(request, 302, {"location": self.redirects[path]}, b"")
        data, headers = self.files[path], dict(self.headers)
        if self.etags:
            headers["etag"] = f'"{hashlib.sha256(data).hexdigest()[:16]}"'
        begin = request.headers.get("range", "")
        if begin and request.headers.get("if-range") == headers.get("etag"):
            start = int(begin.removeprefix("bytes=").removesuffix("-"))
            headers["content-range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            return self.send(request, 206, headers, data[start:])
        return self.send(request, 200, headers, data)

    def send(
        self, request: http.server.BaseHTTPRequestHandler, status: int, headers: dict[str, str], data: bytes
    ) -> None:
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, value)
        request.send_header("content-length", str(len(data)))
        request.end_headers()
        cut = self.breaks.pop(0) if self.breaks and data else len(data)
        try:
            request.wfile.write(data[:cut])
        except (BrokenPipeError, ConnectionResetError):
            return
        request.close_connection = True

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join(30)


def add_repository(hub: FileServer, repo: str, files: dict[str, bytes], revision: str = "main") -> None:
    """The repository as the API of a hub tells of it, and its files at the commit."""
    siblings = [
        {"rfilename": name, "size": len(data), "lfs": {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}}
        for name, data in files.items()
    ]
    hub.files[f"/api/models/{repo}/revision/{revision}"] = json.dumps({"sha": COMMIT, "siblings": siblings}).encode()
    for name, data in files.items():
        hub.files[f"/{repo}/resolve/{COMMIT}/{name}"] = data
