"""Uploads in pieces: any cut gives the same adapter, what came is kept, and what is wrong is told."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from patience import wait_for
from safetensors.numpy import save
from sqlalchemy import event, update
from upload_pieces import PARTIAL, Pieces, archive

from app import upload_segments
from app.chores import chores
from app.server_process import ServerProcess
from artifacts.errors import BlobStoreUnavailable
from storage import database as clock
from storage import keys, quotas
from storage import uploads as stored_uploads
from storage.keys import KeyLimits
from storage.tables import ApiKeyRow, UploadRow
from workers.clockwork import Chore


def test_pieces_become_the_adapter_that_one_body_would(server: Any, adapter_files: Any, small_segments: None) -> None:
    files = adapter_files(seed=3)
    pieces = Pieces(server.client, archive(files))
    length = len(pieces.content)
    begun = pieces.begin(name="in pieces", tags=["a", "b"], description="line")
    assert begun.status_code == 201, begun.text
    assert begun.json()["state"] == "open"
    assert (begun.headers["upload-offset"], begun.headers["upload-complete"]) == ("0", "?0")
    assert "max-size=" in begun.headers["upload-limit"]
    first = pieces.send(0, 1000)
    assert (first.status_code, first.headers["upload-offset"]) == (204, "1000")
    assert pieces.offset == 1000
    head = server.client.head(pieces.path)
    assert (head.headers["upload-length"], head.headers["cache-control"]) == (str(length), "no-store")
    assert pieces.send(1000, 1001, **{"Content-Type": "application/octet-stream"}).status_code == 204
    last = pieces.send(1001, length, complete=True)
    assert last.status_code == 201, last.text
    adapter = last.json()
    assert (adapter["name"], adapter["tags"], adapter["description"]) == ("in pieces", ["a", "b"], "line")
    assert last.headers["location"] == f"/adapters/{adapter['id']}"
    again = pieces.send(length, length, complete=True)
    assert (again.status_code, again.json()["id"]) == (200, adapter["id"]), "an answer that was lost is given again"
    shown = pieces.show()
    assert (shown["state"], shown["adapter"], shown["offset"]) == ("done", adapter["id"], length)
    assert server.client.head(pieces.path).headers["upload-complete"] == "?1"
    assert pieces.send(length, length).status_code == 409
    whole = server.upload(files.parts())
    assert (whole.status_code, whole.json()["id"]) == (200, adapter["id"])
    assert server.blob_count() == 2, "the segments are gone"
    assert server.staged() == []


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 10**6),
    cuts=st.lists(st.tuples(st.integers(0, 10_240), st.booleans(), st.integers(0, 10_240)), max_size=6),
)
def test_any_cut_gives_the_same_file(
    server: Any, adapter_files: Any, small_segments: None, seed: int, cuts: list[tuple[int, bool, int]]
) -> None:
    content = archive(adapter_files(seed=seed))
    assert len(content) == 10_240
    pieces = Pieces(server.client, content)
    assert pieces.begin().status_code == 201
    at = 0
    for stop, streamed, wrong in [*sorted(cuts), (len(content), True, 0)]:
        middle = (at + stop) // 2
        options = {"content": iter([content[at:middle], content[middle:stop]])} if streamed else {}
        answer = pieces.send(at, stop, **options)
        assert (answer.status_code, answer.headers["upload-offset"]) == (204, str(stop))
        if wrong != stop:
            refused = pieces.send(wrong, len(content))
            assert (refused.status_code, refused.json()["code"]) == (409, "upload_offset_mismatch")
            assert refused.headers["upload-offset"] == str(stop)
        assert pieces.offset == stop
        at = stop
    done = pieces.send(at, at, complete=True)
    assert done.status_code in (200, 201), done.text
    with server.services.database.read() as session:
        assert stored_uploads.segments_of(session, pieces.path.rpartition("/")[2]) == []


def test_what_came_before_the_connection_broke_is_kept(
    server: Any,
    adapter_files: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(upload_segments, "BATCH_BYTES", 100)
    pieces = Pieces(server.client, archive(adapter_files()))
    pieces.begin()
    head = (
        f"PATCH {pieces.path} HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nUpload-Offset: 0\r\n"
        f"Content-Type: {PARTIAL['Content-Type']}\r\nContent-Length: {len(pieces.content)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head.encode() + pieces.content[:777])
        wait_for(lambda: any(Path(path).is_file() and Path(path).stat().st_size == 777 for path in server.staged()))
        assert pieces.offset == 0, "it is not a whole segment"
    wait_for(lambda: pieces.offset == 777)
    assert pieces.send(777, len(pieces.content), complete=True).status_code == 201
    assert server.staged() == []


def test_of_two_appends_at_one_place_one_counts(server: Any, adapter_files: Any) -> None:
    pieces = Pieces(server.client, archive(adapter_files()))
    pieces.begin()
    reached, may_go_on = threading.Event(), threading.Event()

    def slow() -> Iterator[bytes]:
        yield pieces.content[:500]
        reached.set()
        assert may_go_on.wait(20)
        yield pieces.content[500:900]

    answers: list[httpx.Response] = []

    def send() -> None:
        with httpx.Client(base_url=server.url, trust_env=False) as other:
            answers.append(pieces.send(0, 900, content=slow(), client=other))

    thread = threading.Thread(target=send)
    thread.start()
    assert reached.wait(20)
    assert pieces.send(0, 600).status_code == 204
    may_go_on.set()
    thread.join()
    assert (answers[0].status_code, answers[0].json()["code"]) == (409, "upload_offset_mismatch")
    assert pieces.offset == 600
    assert server.blob_count() == 1, "what did not count is gone"
    assert pieces.send(600, len(pieces.content), complete=True).status_code == 201


def test_another_server_goes_on(serve: Any, adapter_files: Any, small_segments: None) -> None:
    first = serve()
    settings = first.services.settings
    second = serve(database_url=settings.database_url, blob_url=settings.blob_url)
    pieces = Pieces(first.client, archive(adapter_files()))
    pieces.begin()
    assert pieces.send(0, 1500).status_code == 204
    pieces.client = second.client
    assert pieces.offset == 1500
    assert pieces.send(1500, 2000).status_code == 204
    pieces.client = first.client
    assert pieces.send(2000, len(pieces.content)).status_code == 204
    pieces.client = second.client
    assert pieces.send(len(pieces.content), len(pieces.content), complete=True).status_code == 201


@pytest.mark.parametrize(
    ("changes", "status", "pointer"),
    [
        ({"length": 0}, 422, "/length"),
        ({"length": 10**12}, 413, "/length"),
        ({"length": "7"}, 422, "/length"),
        ({"sha256": "0" * 63}, 422, "/sha256"),
        ({"file_name": ""}, 422, "/file_name"),
        ({"file_name": "a\nb"}, 422, "/file_name"),
        ({"tags": [""]}, 422, "/tags/0"),
        ({"colour": 1}, 422, "/colour"),
    ],
)
def test_announcements_that_are_refused(
    untouched_server: Any, changes: dict[str, Any], status: int, pointer: str
) -> None:
    answer = Pieces(untouched_server.client, b"x").begin(**changes)
    assert answer.status_code == status
    assert pointer in [item["pointer"] for item in answer.json()["errors"]]


def test_appends_that_are_refused(server: Any, adapter_files: Any) -> None:
    pieces = Pieces(server.client, archive(adapter_files()))
    length = len(pieces.content)
    pieces.begin()
    client, path = pieces.client, pieces.path
    offset = {"Upload-Offset": "0"}
    missing = client.patch(path, content=b"x", headers=PARTIAL)
    assert (missing.status_code, missing.json()["errors"][0]["pointer"]) == (422, "/header/Upload-Offset")
    assert client.patch(path, content=b"x", headers=PARTIAL | {"Upload-Offset": "-1"}).status_code == 422
    assert client.patch(path, content=b"x", headers=PARTIAL | offset | {"Upload-Complete": "yes"}).status_code == 422
    assert client.patch(path, json={}, headers=offset).status_code == 415
    assert client.patch(f"/uploads/upl_{'0' * 32}", content=b"x", headers=PARTIAL | offset).status_code == 404
    assert pieces.offset == 0
    early = pieces.send(0, 10, complete=True)
    assert (early.status_code, early.json()["errors"][0]["pointer"]) == (400, "/header/Upload-Complete")
    assert pieces.offset == 10, "its bytes are kept"
    more = pieces.send(10, length, content=pieces.content[10:] + b"more")
    assert (more.status_code, more.json()["code"]) == (413, "too_large")
    assert pieces.offset == length
    assert pieces.send(length, length, complete=True).status_code == 201


def test_a_file_that_is_not_what_was_announced(server: Any, adapter_files: Any) -> None:
    content = archive(adapter_files())
    other = Pieces(server.client, content)
    other.begin(sha256="0" * 64)
    answer = other.send(0, len(content), complete=True)
    assert (answer.status_code, answer.json()["code"]) == (422, "file_broken")
    assert answer.json()["errors"][0]["pointer"] == "/sha256"
    assert (other.show()["state"], other.show()["error"]["code"]) == ("failed", "file_broken")
    again = other.send(len(content), len(content), complete=True)
    assert (again.status_code, again.json()["code"]) == (409, "state_conflict")
    pickle = Pieces(server.client, b"\x80\x02}q\x00." + bytes(40))
    pickle.begin(file_name="adapter_model.bin")
    assert pickle.send(0, 46, complete=True).status_code == 415
    assert pickle.show()["error"]["code"] == "pickle_refused"
    assert server.blob_count() == 0
    assert server.rows()["adapters"] == 0
    assert server.staged() == []


@pytest.fixture
def key_of(serve: Any) -> Callable[..., tuple[Any, str, dict[str, str]]]:
    server = serve(api_keys=True)

    def make(*scopes: str, **limits: int) -> tuple[Any, str, dict[str, str]]:
        with server.services.database.write() as session:
            row, secret = keys.create_key(session, "k", list(scopes), limits=KeyLimits(**limits))
        return server, row.id, {"Authorization": f"Bearer {secret}"}

    return make


def counted(server: Any, key: str) -> int:
    with server.services.database.read() as session:
        return int(session.get_one(ApiKeyRow, key).stored_bytes)


def test_uploads_belong_to_their_key_and_count_against_it(key_of: Any, adapter_files: Any) -> None:
    content = archive(adapter_files())
    server, key, headers = key_of("read", "write", max_bytes=len(content) + 100)
    pieces = Pieces(server.client, content, headers=headers)
    pieces.begin()
    assert counted(server, key) == len(content)
    second = Pieces(server.client, content, headers=headers).begin()
    assert (second.status_code, second.json()["code"]) == (429, "quota_exceeded")
    _, _, foreign = key_of("read", "write")
    stranger = Pieces(server.client, content, pieces.path, foreign)
    assert stranger.send(0, 10).status_code == 404
    assert server.client.get(pieces.path, headers=foreign).status_code == 404
    assert server.client.delete(pieces.path, headers=foreign).status_code == 404
    assert server.client.get("/uploads", headers=foreign).json()["items"] == []
    found = server.client.get("/uploads", headers=headers, params={"sha256": hashlib.sha256(content).hexdigest()})
    assert [item["id"] for item in found.json()["items"]] == [pieces.path.rpartition("/")[2]]
    _, admin, above = key_of("admin")
    made = Pieces(server.client, content, pieces.path, above).send(0, len(content), complete=True)
    assert made.status_code == 201
    assert counted(server, admin) == 0
    assert counted(server, key) == made.json()["size"]
    _, reader, reading = key_of("read")
    assert Pieces(server.client, content, headers=reading).begin().status_code == 403
    assert counted(server, reader) == 0


def expiry(server: Any) -> Chore:
    """The chore that forgets uploads."""
    services = server.services
    return {chore.name: chore for chore in chores(services.settings, services.database, services.blobs)}["uploads"]


@pytest.mark.parametrize("how", ["cancelled", "failed", "expired"])
def test_what_is_given_up_counts_no_longer_and_leaves_nothing(key_of: Any, adapter_files: Any, how: str) -> None:
    content = archive(adapter_files())
    server, key, headers = key_of("read", "write")
    pieces = Pieces(server.client, content, headers=headers)
    pieces.begin(**({"sha256": "0" * 64} if how == "failed" else {}))
    pieces.send(0, 2000)
    assert (counted(server, key), server.blob_count()) == (len(content), 1)
    if how == "cancelled":
        assert server.client.delete(pieces.path, headers=headers).status_code == 204
    elif how == "failed":
        assert pieces.send(2000, len(content), complete=True).status_code == 422
    else:
        with server.services.database.write() as session:
            session.execute(update(UploadRow).values(expires_at=clock.now(session) - timedelta(seconds=1)))
        assert pieces.send(2000, 2010).status_code == 404
        expiry(server).run()
    assert (counted(server, key), server.blob_count()) == (0, 0)
    status = server.client.head(pieces.path, headers=headers).status_code
    assert status == (204 if how == "failed" else 404)


@pytest.mark.parametrize("away", [False, True])
def test_a_blob_that_can_not_be_removed_spoils_no_others(
    server: Any, monkeypatch: pytest.MonkeyPatch, away: bool
) -> None:
    """It is left to the sweep and reported; a store that is away is not asked for every one."""
    for number in range(7):
        pieces = Pieces(server.client, bytes([number]) * 2000)
        pieces.begin()
        pieces.send(0, 1000)
    with server.services.database.write() as session:
        session.execute(update(UploadRow).values(expires_at=clock.now(session) - timedelta(seconds=1)))
    delete, asked = server.services.blobs.delete, []

    def fail(sha256: str) -> None:
        asked.append(sha256)
        if away or len(asked) == 1:
            raise BlobStoreUnavailable(f"no answer for {sha256}")
        delete(sha256)

    monkeypatch.setattr(server.services.blobs, "delete", fail)
    with pytest.raises(BlobStoreUnavailable, match="no answer"):
        expiry(server).run()
    assert server.client.get("/uploads").json()["items"] == []
    assert (len(asked), server.blob_count()) == ((5, 7) if away else (7, 1))


def test_a_completion_locks_blobs_before_the_key(key_of: Any, adapter_files: Any) -> None:
    """As every other transaction that stores something: in the other order, two could wait for each other."""
    content = archive(adapter_files())
    server, _, headers = key_of("read", "write")
    pieces = Pieces(server.client, content, headers=headers)
    pieces.begin()
    pieces.send(0, len(content))
    noted: list[tuple[Any, str]] = []

    def note(connection: Any, _cursor: Any, statement: str, *_others: Any) -> None:
        noted.append((connection, statement))

    event.listen(server.services.database.engine, "before_cursor_execute", note)
    assert pieces.send(len(content), len(content), complete=True).status_code == 201
    event.remove(server.services.database.engine, "before_cursor_execute", note)
    (inside,) = [connection for connection, statement in noted if statement.startswith("INSERT INTO adapters ")]
    words = [statement.split() for connection, statement in noted if connection is inside]
    locks = [row[1] if row[0] == "UPDATE" else row[2] for row in words if row[0] in ("UPDATE", "INSERT")]
    assert locks.index("blobs") < locks.index("api_keys")


def test_a_completion_that_found_no_room_is_asked_again(key_of: Any, adapter_files: Any) -> None:
    content = archive(adapter_files())
    server, key, headers = key_of("read", "write", max_bytes=len(content))
    pieces = Pieces(server.client, content, headers=headers)
    pieces.begin()
    pieces.send(0, len(content))
    with server.services.database.write() as session:  # what another upload of the key took meanwhile
        session.execute(update(ApiKeyRow).where(ApiKeyRow.id == key).values(max_bytes=10))
    full = pieces.send(len(content), len(content), complete=True)
    assert (full.status_code, full.json()["code"]) == (429, "quota_exceeded")
    assert (pieces.show()["state"], counted(server, key)) == ("open", len(content))
    with server.services.database.write() as session:
        session.execute(update(ApiKeyRow).where(ApiKeyRow.id == key).values(max_bytes=None))
        quotas.charge_bytes(session, key, 0)
    assert pieces.send(len(content), len(content), complete=True).status_code == 201


def test_too_many_are_refused(server: Any, adapter_files: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_uploads, "MAX_OPEN", 2)
    monkeypatch.setattr(stored_uploads, "MAX_SEGMENTS", 3)
    pieces = Pieces(server.client, archive(adapter_files()))
    assert [pieces.begin().status_code for _ in range(3)] == [201, 201, 429]
    pieces.path = server.client.get("/uploads").json()["items"][0]["id"]
    pieces.path = f"/uploads/{pieces.path}"
    assert [pieces.send(at, at + 1).status_code for at in range(4)] == [204, 204, 204, 409]
    assert server.client.delete(pieces.path).status_code == 204
    assert pieces.begin().status_code == 201


@pytest.mark.slow
def test_a_killed_server_keeps_what_it_has_acknowledged(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((64, 80_000), dtype=np.float32)
    tensors = {"base_model.model.x.q_proj.lora_A.weight": values, "base_model.model.x.q_proj.lora_B.weight": values.T}
    config = '{"peft_type": "LORA", "r": 64, "lora_alpha": 64, "target_modules": ["q_proj"]}'
    content = save(tensors, {"lora_adapter_metadata": config})
    environment, log = {"POOL": "off"}, tmp_path / "server.log"
    with (
        ServerProcess(tmp_path / "data", environment, log) as first,
        httpx.Client(base_url=first.url, trust_env=False) as client,
    ):
        pieces = Pieces(client, content)
        assert pieces.begin(file_name="big.safetensors").status_code == 201
        sent = upload_segments.SEGMENT_BYTES + 3_000_000
        address = urllib.parse.urlsplit(first.url)
        head = (
            f"PATCH {pieces.path} HTTP/1.1\r\nHost: {address.netloc}\r\nUpload-Offset: 0\r\n"
            f"Content-Type: {PARTIAL['Content-Type']}\r\nContent-Length: {len(content)}\r\n\r\n"
        )
        with socket.create_connection((address.hostname, address.port)) as connection:
            connection.sendall(head.encode() + content[:sent])
            wait_for(lambda: pieces.offset > 0)
            acknowledged = pieces.offset
            os.kill(first.pid, signal.SIGKILL)
            first.wait()
    with (
        ServerProcess(tmp_path / "data", environment, log) as second,
        httpx.Client(base_url=second.url, trust_env=False, timeout=120) as client,
    ):
        pieces.client = client
        assert pieces.offset == acknowledged >= upload_segments.SEGMENT_BYTES
        done = pieces.send(acknowledged, len(content), complete=True)
        assert done.status_code == 201, done.text
        assert done.json()["files"][0]["sha256"] == hashlib.sha256(content).hexdigest()
