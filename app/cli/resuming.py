"""Uploads of one file that go on where they were interrupted, found by its digest: nothing is noted on this machine."""

from __future__ import annotations

import hashlib
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from app.cli.client import CHUNK_BYTES, RECONNECT_SECONDS, RECONNECTS, Client, ProblemError

APPEND_BYTES = 64 << 20
"""Bytes of one append: what a broken connection may have to send again is less, since the service keeps what came."""
_MEDIA_TYPE = "application/partial-upload"
_FIELDS = ("name", "base_model", "description", "tags")


def packed(files: Sequence[Path], folder: Path, name: str) -> Path:
    """One file to send: the only one, or an archive of all that has the same bytes every time."""
    if len(files) == 1:
        return files[0]
    target = folder / f"{name}.tar"
    with tarfile.open(target, "w", format=tarfile.PAX_FORMAT) as tar:
        for file in files:
            entry = tarfile.TarInfo(file.name)
            entry.size = file.stat().st_size
            with file.open("rb") as stream:
                tar.addfile(entry, stream)
    return target


def upload_in_pieces(
    client: Client, path: Path, form: Mapping[str, Any], advance: Callable[[int], None]
) -> tuple[dict[str, Any], bool]:
    """Send one file; an upload of it that was begun earlier, with the same fields, is gone on with.

    Returns what was made of it, and whether it is new; `advance` gets the bytes that are stored.

    Raises:
        ProblemError: a refusal, or the connection broke `RECONNECTS` times without a byte between.
    """
    digest = _digest(path)
    length = path.stat().st_size
    place = _begun(client, digest, length, form) or _begin(client, path, digest, length, form)
    told = broken = 0
    while True:
        try:
            offset = _offset(client, place)
            if offset > told:
                advance(offset - told)
                told, broken = offset, 0
            stop = min(offset + APPEND_BYTES, length)
            headers = {
                "Content-Type": _MEDIA_TYPE,
                "Upload-Offset": str(offset),
                "Upload-Complete": f"?{stop == length:d}",
            }
            answer = client.send("PATCH", place, content=_bytes(path, offset, stop), headers=headers)
            if stop == length:
                advance(length - told)
                found: dict[str, Any] = answer.json()
                return found, answer.status_code == 201
        except ProblemError as error:
            if error.problem.get("code") not in ("unreachable", "upload_offset_mismatch"):
                raise
            broken += 1
            if broken > RECONNECTS:
                raise
            time.sleep(RECONNECT_SECONDS * broken)


def _begun(client: Client, digest: str, length: int, form: Mapping[str, Any]) -> str | None:
    """The newest open upload of the same file with the same fields."""
    for item in client.get("/uploads", sha256=digest, state="open")["items"]:
        same = all((item[field] or None) == (form.get(field) or None) for field in _FIELDS)
        if same and item["length"] == length:
            return f"/uploads/{item['id']}"
    return None


def _begin(client: Client, path: Path, digest: str, length: int, form: Mapping[str, Any]) -> str:
    body = {"length": length, "sha256": digest, "file_name": path.name, **form}
    return f"/uploads/{client.post('/uploads', body)['id']}"


def _offset(client: Client, place: str) -> int:
    return int(client.send("HEAD", place).headers["upload-offset"])


def _bytes(path: Path, start: int, stop: int) -> Iterator[bytes]:
    with path.open("rb") as stream:
        stream.seek(start)
        left = stop - start
        while left and (data := stream.read(min(CHUNK_BYTES, left))):
            yield data
            left -= len(data)


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
