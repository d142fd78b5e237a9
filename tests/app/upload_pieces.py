"""Uploads in pieces as a client makes them, for the tests of more than one file."""

from __future__ import annotations

import hashlib
import io
import tarfile
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from app import upload_segments

PARTIAL = {"Content-Type": "application/partial-upload"}


def archive(files: Any) -> bytes:
    """A tar of the two files of an adapter."""
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w") as tar:
        for _, (name, data) in files.parts():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return target.getvalue()


@dataclass
class Pieces:
    """One upload of `content` to a server."""

    client: httpx.Client
    content: bytes
    path: str = ""
    headers: dict[str, str] | None = None

    def begin(self, **changes: Any) -> httpx.Response:
        digest = hashlib.sha256(self.content).hexdigest()
        body = {"length": len(self.content), "sha256": digest, "file_name": "mine.tar", **changes}
        answer = self.client.post("/uploads", json=body, headers=self.headers)
        self.path = answer.headers.get("location", "")
        return answer

    def send(self, start: int, stop: int, complete: bool = False, **options: Any) -> httpx.Response:
        headers = {**PARTIAL, "Upload-Offset": str(start), "Upload-Complete": f"?{complete:d}", **(self.headers or {})}
        content = options.pop("content", self.content[start:stop])
        client = options.pop("client", self.client)
        return client.patch(self.path, content=content, headers=headers | options)

    @property
    def offset(self) -> int:
        answer = self.client.head(self.path, headers=self.headers)
        assert answer.status_code == 204
        return int(answer.headers["upload-offset"])

    def show(self) -> dict[str, Any]:
        found: dict[str, Any] = self.client.get(self.path, headers=self.headers).json()
        return found


@pytest.fixture
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload_segments, "SEGMENT_BYTES", 300)
    monkeypatch.setattr(upload_segments, "BATCH_BYTES", 100)
