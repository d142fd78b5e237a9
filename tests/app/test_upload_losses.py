"""Uploads in pieces where a disk is full, bytes are lost, or others have the same ones: nothing is spoilt."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from patience import wait_for
from upload_pieces import Pieces, archive

from app import adapter_intake, uploads
from storage.blobs import key_of


@pytest.mark.parametrize("batches", [0, 1, 2])
def test_a_disk_that_fills_up_in_the_middle_of_a_batch_spoils_nothing(
    server: Any,
    adapter_files: Any,
    small_segments: None,
    monkeypatch: pytest.MonkeyPatch,
    batches: int,
) -> None:
    """Whole batches go well, then half a batch gets onto the disk, then nothing."""
    room = batches * 100 + 50

    def write_some(descriptor: int, data: memoryview) -> int:
        nonlocal room
        if not room:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = os.write(descriptor, data[:room])
        room -= written
        return written

    def chunks() -> Iterator[bytes]:
        for at in range(0, batches * 100, 100):
            yield pieces.content[at : at + 100]
            wait_for(lambda end=at + 100: [Path(path).stat().st_size for path in server.staged()][-1:] == [end])
        yield pieces.content[batches * 100 : (batches + 1) * 100]

    pieces = Pieces(server.client, archive(adapter_files()))
    pieces.begin()
    with monkeypatch.context() as patch:
        patch.setattr(uploads, "write_some", write_some)
        full = pieces.send(0, 0, content=chunks())
    assert (full.status_code, full.json()["code"]) == (507, "disk_full")
    assert (pieces.offset, server.blob_count(), server.staged()) == (0, 0, [])
    assert pieces.send(0, len(pieces.content), complete=True).status_code == 201
    assert server.blob_count() == 2


@pytest.mark.parametrize("sent", ["before", "after"])
def test_an_upload_that_is_given_up_takes_nothing_from_another_of_the_same_file(
    server: Any, adapter_files: Any, monkeypatch: pytest.MonkeyPatch, sent: str
) -> None:
    """Its one piece is the file: it goes while `POST /adapters` has stored the file and not published it yet."""
    parts = adapter_files().parts()
    content = next(data for _, (name, data) in parts if name.endswith(".safetensors"))
    pieces = Pieces(server.client, content)
    assert pieces.begin(file_name="adapter_model.safetensors").status_code == 201
    prepare = adapter_intake.prepare

    def prepare_then_give_up(*arguments: Any) -> Any:
        prepared = prepare(*arguments)
        with httpx.Client(base_url=server.url, trust_env=False) as other:
            if sent == "after":
                assert pieces.send(0, len(content), client=other).status_code == 204
            assert other.delete(pieces.path).status_code == 204
        return prepared

    monkeypatch.setattr(adapter_intake, "prepare", prepare_then_give_up)
    if sent == "before":
        assert pieces.send(0, len(content)).status_code == 204
    made = server.upload(parts)
    assert made.status_code == 201, made.text
    assert all(server.services.blobs.exists(file["sha256"]) for file in made.json()["files"])
    assert server.client.get(f"/adapters/{made.json()['id']}/download").status_code == 200


@pytest.mark.parametrize("how", ["missing", "corrupt"])
def test_an_upload_whose_stored_bytes_are_lost_fails(server: Any, adapter_files: Any, how: str) -> None:
    pieces = Pieces(server.client, archive(adapter_files()))
    pieces.begin()
    pieces.send(0, len(pieces.content))
    (digest,) = server.services.blobs.iter_digests()
    path = server.services.blobs.staging_dir.parent / key_of(digest)
    path.unlink()
    if how == "corrupt":
        path.write_bytes(bytes(len(pieces.content)))
    lost = pieces.send(len(pieces.content), len(pieces.content), complete=True)
    assert (lost.status_code, lost.json()["code"]) == (500, f"blob_{how}")
    assert "lost" in lost.json()["detail"]
    shown = pieces.show()
    assert (shown["state"], shown["error"]["code"]) == ("failed", f"blob_{how}")
    assert "lost" in shown["error"]["detail"]
    assert pieces.send(len(pieces.content), len(pieces.content), complete=True).status_code == 409
    assert server.blob_count() == 0
    pieces.begin()
    assert pieces.send(0, len(pieces.content), complete=True).status_code == 201
