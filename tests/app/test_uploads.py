"""The streaming receiver by itself: bytes, digests, memory, idempotency, and what a killed server leaves."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import time
import zlib
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import pytest

from app import uploads
from app.multipart import MAX_PART_HEADERS, PartBegin, PartData, read_parts
from app.staging import sweep_staging
from app.uploads import Upload, receive_upload
from artifacts.errors import MalformedRequest, RequestInvalid

CONTENT_TYPE = "multipart/form-data; boundary=frontier"


async def stream(chunks: Iterable[bytes]) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


def pieces(body: bytes, size: int) -> list[bytes]:
    return [body[start : start + size] for start in range(0, len(body), size)]


def form(*parts: tuple[str, str | None, bytes]) -> bytes:
    body = b""
    for name, file_name, data in parts:
        disposition = f'form-data; name="{name}"' + (f'; filename="{file_name}"' if file_name is not None else "")
        body += f"--frontier\r\nContent-Disposition: {disposition}\r\n\r\n".encode() + data + b"\r\n"
    return body + b"--frontier--\r\n"


def receive(chunks: Iterable[bytes], staging: Path) -> tuple[dict[str, list[str]], list[tuple[str, bytes, str, int]]]:
    """The fields, and (name, bytes, SHA-256, CRC-32) of each file, read while they are there."""

    async def run() -> Upload:
        async with receive_upload(
            CONTENT_TYPE, stream(chunks), staging, text_fields=frozenset({"name", "tags"})
        ) as upload:
            contents.extend((file.name, file.path.read_bytes(), file.sha256, file.crc32) for file in upload.files)
        return upload

    contents: list[tuple[str, bytes, str, int]] = []
    upload = asyncio.run(run())
    assert not upload.folder.exists()
    return upload.fields, contents


@pytest.mark.parametrize("size", [1, 2, 7, 64, 1000, 10**6])
def test_any_cut_of_the_body_gives_the_same_bytes(tmp_path: Path, size: int) -> None:
    # Bytes that look like the boundary, whole and in part, must come through.
    tricky = b"\r\n--frontie\r\n--\r\n-\r--frontier\r\n\n" * 20 + b"\r"
    body = form(("tags", None, b"a"), ("file", "one.bin", tricky), ("tags", None, b"b"), ("file", "two.bin", b""))
    fields, files = receive(pieces(body, size), tmp_path)
    assert fields == {"tags": ["a", "b"]}
    assert files == [
        ("one.bin", tricky, hashlib.sha256(tricky).hexdigest(), zlib.crc32(tricky)),
        ("two.bin", b"", hashlib.sha256(b"").hexdigest(), 0),
    ]
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_several_batches(tmp_path: Path) -> None:
    data = random.Random(7).randbytes(3 * uploads.BATCH_BYTES + 12345)
    _, ((name, content, digest, crc32),) = receive(pieces(form(("file", "big", data)), 65536), tmp_path)
    assert (name, content == data) == ("big", True)
    assert (digest, crc32) == (hashlib.sha256(data).hexdigest(), zlib.crc32(data))


def test_at_most_two_batches_are_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tracemalloc

    monkeypatch.setattr(uploads, "write_some", lambda descriptor, data: len(data))

    def endless() -> Iterable[bytes]:
        yield b'--frontier\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        for _ in range(64 * 16):
            yield bytes(65536)
        yield b"\r\n--frontier--\r\n"

    tracemalloc.start()
    receive(endless(), tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # One batch is written while the next is collected and joined: 64 MB pass, 4 batches and what is read meanwhile
    # bound what is held.
    assert peak < 5 * uploads.BATCH_BYTES


def test_errors_leave_no_folder(tmp_path: Path) -> None:
    whole = form(("file", "a", b"x" * 100_000))
    with pytest.raises(MalformedRequest, match="closing boundary"):
        receive([whole[:50_000]], tmp_path)
    with pytest.raises(RequestInvalid, match="colour"):
        receive([form(("file", "a", b"x"), ("colour", None, b"red"))], tmp_path)
    with pytest.raises(RequestInvalid, match="at most"):
        receive([form(*[("file", str(number), b"") for number in range(uploads.MAX_FILES + 1)])], tmp_path)
    with pytest.raises(RequestInvalid, match="fields"):
        receive([form(*[("tags", None, b"") for _ in range(uploads.MAX_FIELDS + 1)])], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_cancelled_upload_leaves_no_folder(tmp_path: Path) -> None:
    async def run() -> None:
        reached = asyncio.Event()

        async def chunks() -> AsyncIterator[bytes]:
            yield form(("file", "a", b"x" * 100))[:90] + b"y" * uploads.BATCH_BYTES * 2
            reached.set()
            await asyncio.Event().wait()

        async def receive_for_ever() -> None:
            async with receive_upload(CONTENT_TYPE, chunks(), tmp_path, text_fields=frozenset()):
                raise AssertionError("the body never ends")

        task = asyncio.create_task(receive_for_ever())
        await reached.wait()
        assert list(tmp_path.iterdir()) != []
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert list(tmp_path.iterdir()) == []


def test_part_headers() -> None:
    async def events(body: bytes) -> list[Any]:
        return [event async for event in read_parts(CONTENT_TYPE, stream([body]))]

    body = (
        b"--frontier\r\ncontent-type: x/y\r\nCONTENT-DISPOSITION: form-data; name=file; "
        b"filename*=UTF-8''caf%C3%A9.bin\r\n\r\ndata\r\n--frontier--\r\n"
    )
    begin, data, _ = asyncio.run(events(body))
    assert isinstance(begin, PartBegin)
    assert isinstance(data, PartData)
    assert (begin.name, data.data) == ("file", b"data")
    too_many = b"--frontier\r\n" + b"X-A: b\r\n" * (MAX_PART_HEADERS + 1) + b"\r\n\r\n--frontier--\r\n"
    with pytest.raises(MalformedRequest, match="header count"):
        asyncio.run(events(too_many))


def test_idempotency_of_uploads_is_over_content_and_fields(server: Any, adapter_files: Any) -> None:
    headers = {"Idempotency-Key": "upload-1"}
    first = server.upload(adapter_files().parts(), {"name": "a"}, headers=headers)
    again = server.upload(adapter_files().parts(), {"name": "a"}, headers=headers)
    assert (first.status_code, again.status_code) == (201, 201)
    assert again.json() == first.json()
    assert again.headers["idempotency-replayed"] == "true"
    for parts, fields in ((adapter_files(seed=4).parts(), {"name": "a"}), (adapter_files().parts(), {"name": "b"})):
        other = server.upload(parts, fields, headers=headers)
        assert (other.status_code, other.json()["code"]) == (422, "idempotency_key_reused")
    assert server.rows()["adapters"] == 1
    assert server.staged() == []


def test_a_failed_upload_leaves_its_idempotency_key_free(server: Any, adapter_files: Any) -> None:
    headers = {"Idempotency-Key": "upload-1"}
    assert server.upload(adapter_files().parts()[:1], headers=headers).status_code == 422
    server.assert_nothing_left()
    assert server.upload(adapter_files().parts(), headers=headers).status_code == 201


def test_a_key_in_flight_is_a_conflict(server: Any, adapter_files: Any) -> None:
    from storage import idempotency

    first = server.upload(adapter_files().parts(), headers={"Idempotency-Key": "k"})
    with server.services.database.write() as session:
        from storage.tables import IdempotencyRow

        row = session.query(IdempotencyRow).one()
        digest, owner = row.request_digest, row.owner
        session.delete(row)
    with server.services.database.write() as session:
        assert idempotency.begin(session, owner, "k", digest) is None
    response = server.upload(adapter_files().parts(), headers={"Idempotency-Key": "k"})
    assert (response.status_code, response.json()["code"]) == (409, "idempotency_in_flight")
    assert response.headers["retry-after"] == "1"
    assert first.status_code == 201


def test_what_a_killed_server_left_goes_when_it_is_old(tmp_path: Path) -> None:
    old, young, other = tmp_path / "upl_old", tmp_path / "upl_young", tmp_path / "put-123"
    for folder in (old, young, other):
        folder.mkdir()
        (folder / "part-0000").write_bytes(b"x")
    long_ago = time.time() - 25 * 3600
    for path in (old / "part-0000", old, other, young):
        os.utime(path, (long_ago, long_ago))
    assert sweep_staging(tmp_path, max_age_hours=24) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["put-123", "upl_young"]
