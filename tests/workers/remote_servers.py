"""A hub and file servers on loopback, which break off, redirect and count as a test wants it."""

from __future__ import annotations

import base64
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

            def do_HEAD(self) -> None:
                owner.answer(self)

            def do_POST(self) -> None:
                owner.receive(self, self.rfile.read(int(self.headers.get("content-length") or 0)))

            do_PUT = do_POST  # noqa: N815

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
        if request.command == "HEAD":
            return
        cut = self.breaks.pop(0) if self.breaks and data else len(data)
        try:
            request.wfile.write(data[:cut])
        except (BrokenPipeError, ConnectionResetError):
            return
        request.close_connection = True

    def receive(self, request: http.server.BaseHTTPRequestHandler, body: bytes) -> None:
        self.send(request, 405, {}, body[:0])

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


@dataclass
class FakeHub(FileServer):
    """What huggingface_hub asks of a hub to make a repository and commit files to it; `objects` are what it was sent
    by Git LFS, `commits` (repository, branch) → path → bytes."""

    token: str = "hf_s3cret"
    private: dict[str, bool] = field(default_factory=dict)
    branches: set[tuple[str, str]] = field(default_factory=set)
    objects: dict[str, bytes] = field(default_factory=dict)
    commits: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    paths: list[str] = field(default_factory=list)

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        repo = request.path.removeprefix("/api/models/")
        if self.refused(request):
            return
        if repo in self.private:
            self.json(request, {"id": repo, "modelId": repo, "private": self.private[repo], "siblings": []})
        else:
            super().answer(request)

    def receive(self, request: http.server.BaseHTTPRequestHandler, body: bytes) -> None:
        path = unquote(urlsplit(request.path).path)
        self.paths.append(path)
        if path.startswith("/upload/"):
            self.objects[path.removeprefix("/upload/")] = body
            return self.json(request, {})
        if self.refused(request):
            return None
        if path == "/api/repos/create":
            return self.create(request, json.loads(body))
        if path == "/api/validate-yaml":
            return self.json(request, {"errors": [], "warnings": []})
        if path.endswith(".git/info/lfs/objects/batch"):
            return self.batch(request, json.loads(body))
        repo, verb, branch = path.removeprefix("/api/models/").rsplit("/", 2)
        if verb == "preupload":
            modes = [
                {
                    "path": item["path"],
                    "uploadMode": "lfs" if item["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for item in json.loads(body)["files"]
            ]
            return self.json(request, {"files": modes})
        if verb == "branch":
            self.branches.add((repo, branch))
            return self.json(request, {})
        assert verb == "commit"
        self.commits[repo, branch] = dict(map(self.committed, [json.loads(line) for line in body.splitlines()][1:]))
        return self.json(
            request, {"success": True, "commitOid": COMMIT, "commitUrl": f"{self.url}/{repo}/commit/{COMMIT}"}
        )

    def refused(self, request: http.server.BaseHTTPRequestHandler) -> bool:
        status = self.statuses.pop(0) if self.statuses else 200
        if status == 200 and request.headers.get("authorization") != f"Bearer {self.token}":
            status = 401
        if status != 200:
            self.send(request, status, {}, b"")
        return status != 200

    def create(self, request: http.server.BaseHTTPRequestHandler, wanted: dict[str, Any]) -> None:
        repo = f"{wanted['organization']}/{wanted['name']}" if wanted.get("organization") else wanted["name"]
        status = 409 if repo in self.private else 200
        self.private.setdefault(repo, wanted.get("visibility") == "private")
        self.json(request, {"url": f"{self.url}/{repo}", "name": repo}, status)

    def batch(self, request: http.server.BaseHTTPRequestHandler, wanted: dict[str, Any]) -> None:
        found = [
            {**item, "actions": {"upload": {"href": f"{self.url}/upload/{item['oid']}"}}}
            if item["oid"] not in self.objects
            else item
            for item in wanted["objects"]
        ]
        self.json(request, {"transfer": "basic", "objects": found})

    def committed(self, line: dict[str, Any]) -> tuple[str, bytes]:
        value = line["value"]
        if line["key"] == "lfsFile":
            return value["path"], self.objects[value["oid"]]
        return value["path"], base64.b64decode(value["content"])

    def json(self, request: http.server.BaseHTTPRequestHandler, document: dict[str, Any], status: int = 200) -> None:
        self.send(request, status, {"content-type": "application/json"}, json.dumps(document).encode())
