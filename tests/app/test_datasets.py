"""Datasets over HTTP."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
from typing import Any

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from app import dataset_intake
from storage import datasets, jobs, keys
from storage.keys import KeyLimits
from storage.sweep import remove_unused
from storage.tables import ApiKeyRow, DatasetRow
from train.rows import inspect

ROWS = [{"text": f"text {number}", "label": number % 2} for number in range(50)]
JSONL = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)


def send(server: Any, content: bytes, file_name: str = "data.jsonl", **fields: str) -> httpx.Response:
    response: httpx.Response = server.client.post("/datasets", files={"file": (file_name, content)}, data=fields)
    return response


def nothing_left(server: Any) -> bool:
    with server.services.database.read() as session:
        return session.query(DatasetRow).count() == 0 and server.staged() == [] and server.blob_count() == 0


def test_an_upload_is_validated_and_described(server: Any) -> None:
    response = send(server, JSONL, "reviews.jsonl")
    assert response.status_code == 201, response.text
    body = response.json()
    assert response.headers["location"] == f"/datasets/{body['id']}"
    assert (body["name"], body["format"], body["rows"], body["size"]) == ("reviews", "jsonl", 50, len(JSONL))
    assert body["sha256"] == hashlib.sha256(JSONL).hexdigest()
    assert [(column["name"], column["type"], column["nulls"]) for column in body["columns"]] == [
        ("text", "string", 0),
        ("label", "integer", 0),
    ]
    assert {(task["task"], task["form"]): task["reason"] for task in body["tasks"]} == {
        ("causal-lm", "chat"): "there is no column `messages`",
        ("causal-lm", "prompt-completion"): "there is no column `prompt` and no column `completion`",
        ("causal-lm", "text"): None,
        ("sequence-classification", "text-label"): None,
        ("token-classification", "tokens-tags"): "there is no column `tokens` and no column `tags`",
        ("transcript-classification", "sequence-label"): "there is no column `sequence`",
    }
    assert server.client.get(response.headers["location"]).json() == body
    assert server.staged() == []
    assert server.blob_count() == 1


def test_the_same_file_again_is_200_with_the_first_id(server: Any) -> None:
    first = send(server, JSONL, "a.jsonl").json()
    again = send(server, JSONL, "b.jsonl")
    assert again.status_code == 200
    assert again.json() == first


def test_csv_and_parquet_hold_the_same_rows(server: Any) -> None:
    table = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), table)
    text = b"text,label\r\n" + b"".join(f"{row['text']},{row['label']}\r\n".encode() for row in ROWS)
    packed = gzip.compress(JSONL)
    kinds = {"data.parquet": ("parquet", table.getvalue()), "data.csv": ("csv", text), "d.jsonl.gz": ("jsonl", packed)}
    for name, (kind, content) in kinds.items():
        response = send(server, content, name)
        assert response.status_code == 201, response.text
        assert (response.json()["format"], response.json()["rows"]) == (kind, 50)
        page = server.client.get(f"{response.headers['location']}/rows", params={"offset": 48}).json()
        as_text = [{key: str(value) for key, value in row.items()} for row in ROWS[48:]]
        expected = as_text if kind == "csv" else ROWS[48:]
        assert page == {
            "items": [{"row": 49, "values": expected[0]}, {"row": 50, "values": expected[1]}],
            "total": 50,
            "next": None,
        }


def test_large_and_packed_files_are_validated_in_a_process_of_their_own(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    apart: list[str] = []

    def note(path: Any, kind: Any, limits: Any) -> Any:
        apart.append(kind)
        return inspect(path, kind, limits)

    monkeypatch.setattr(dataset_intake, "inspect_apart", note)
    table = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), table)
    large = b'{"text": "%s"}\n' % (b"x" * 1000) * 1100
    for content in (JSONL, large, gzip.compress(JSONL), table.getvalue()):
        assert send(server, content).status_code == 201
    assert apart == ["jsonl", "jsonl", "parquet"]


def test_rows_are_pages(server: Any) -> None:
    location = send(server, JSONL).headers["location"]
    seen, offset = [], 0
    while offset is not None:
        page = server.client.get(f"{location}/rows", params={"offset": offset, "limit": 17}).json()
        seen += page["items"]
        offset = page["next"]
    assert [item["values"] for item in seen] == ROWS
    assert [item["row"] for item in seen] == list(range(1, 51))
    assert server.client.get(f"{location}/rows", params={"offset": 50}).json()["items"] == []


def test_long_rows_make_short_pages(server: Any) -> None:
    content = b"".join(b'{"text": "%s"}\n' % (bytes([97 + number]) * 900_000) for number in range(8))
    location = send(server, content).headers["location"]
    page = server.client.get(f"{location}/rows").json()
    assert (len(page["items"]), page["next"]) == (4, 4)
    rest = server.client.get(f"{location}/rows", params={"offset": 4}).json()
    assert (len(rest["items"]), rest["next"]) == (4, None)


def test_bad_rows_are_named_and_nothing_is_kept(server: Any) -> None:
    lines = JSONL.splitlines()
    for number in range(10, 40):
        lines[number] = b"{"
    response = send(server, b"\n".join(lines))
    assert response.status_code == 422
    problem = response.json()
    assert problem["code"] == "file_broken"
    assert problem["detail"].startswith("30 of 50 rows are not valid; row 11: line 11: is not JSON")
    assert [item["pointer"] for item in problem["errors"]] == [f"row {number}" for number in range(11, 31)]
    assert nothing_left(server)


@pytest.mark.parametrize(
    ("content", "name", "fields", "code", "pointer"),
    [
        (b"", "data.jsonl", {}, "file_broken", None),
        (b"\n", "data.jsonl", {}, "file_broken", None),
        (b"a,b\n1,2\n", "data.txt", {}, "invalid_request", "/format"),
        (b"a,b\n1,2\n", "data.csv", {"format": "tsv"}, "invalid_request", "/format"),
        (b"PAR1junk", "data.jsonl", {"format": "jsonl"}, "invalid_request", "/format"),
        (b"PAR1junk", "data", {}, "file_broken", None),
        (b"a,a\n1,2\n", "data.csv", {}, "file_broken", "header"),
        (b'{"a": "\xe9"}\n', "data.jsonl", {}, "file_broken", "row 1"),
        (b'{"a": 1}\n', "data.jsonl", {"name": "x" * 201}, "invalid_request", "/name"),
        (b'{"a": 1}\n', "data.jsonl", {"other": "x"}, "invalid_request", "/other"),
    ],
)
def test_refusals(
    server: Any, content: bytes, name: str, fields: dict[str, str], code: str, pointer: str | None
) -> None:
    response = send(server, content, name, **fields)
    assert response.status_code == 422, response.text
    assert response.json()["code"] == code
    if pointer is not None:
        assert response.json()["errors"][0]["pointer"] == pointer
    assert nothing_left(server)


def test_one_file_is_wanted(server: Any) -> None:
    none = server.client.post("/datasets", files={"name": (None, b"x")})
    two = server.client.post("/datasets", files=[("file", ("a.jsonl", JSONL)), ("file", ("b.jsonl", JSONL))])
    for response in (none, two):
        assert response.status_code == 422
        assert response.json()["errors"][0]["pointer"] == "/file"
    assert server.client.post("/datasets", json={}).status_code == 415
    assert nothing_left(server)


def test_a_file_over_the_limit_is_413_packed_or_not(serve: Any) -> None:
    small = serve(max_upload_bytes=10_000)
    packed = gzip.compress(JSONL * 100)
    assert len(packed) < 10_000
    for content in (packed, JSONL * 1000):
        response = send(small, content, "data.jsonl.gz")
        assert response.status_code == 413
        assert response.json()["code"] == "too_large"
    assert nothing_left(small)


def test_lists_and_filters(server: Any) -> None:
    for number in range(3):
        send(server, JSONL + b'{"text": "%d"}\n' % number, f"Set {number}.jsonl")
    send(server, b"a,b\n1,2\n", "table.csv")
    names = [item["name"] for item in server.client.get("/datasets").json()["items"]]
    assert names == ["table", "Set 2", "Set 1", "Set 0"]
    page = server.client.get("/datasets", params={"name": "set", "limit": 2}).json()
    assert [item["name"] for item in page["items"]] == ["Set 2", "Set 1"]
    rest = server.client.get("/datasets", params={"name": "set", "limit": 2, "cursor": page["next"]}).json()
    assert [item["name"] for item in rest["items"]] == ["Set 0"]
    assert len(server.client.get("/datasets", params={"format": "csv"}).json()["items"]) == 1
    digest = hashlib.sha256(b"a,b\n1,2\n").hexdigest()
    assert len(server.client.get("/datasets", params={"sha256": digest}).json()["items"]) == 1
    assert server.client.get("/datasets", params={"format": "xml"}).status_code == 422


def test_downloads_are_the_bytes_that_were_sent(server: Any) -> None:
    packed = gzip.compress(JSONL)
    sent = {
        "a b.jsonl": (JSONL, "application/jsonl", "a-b.jsonl"),
        "a b.jsonl.gz": (packed, "application/gzip", "a-b.jsonl.gz"),
        "c.csv": (b"a,b\n1,2\n", "text/csv; charset=utf-8", "c.csv"),
    }
    for name, (content, media_type, file_name) in sent.items():
        location = send(server, content, name).headers["location"]
        whole = server.client.get(f"{location}/download", headers={"Accept-Encoding": "identity"})
        assert whole.content == content
        assert whole.headers["content-type"] == media_type
        assert whole.headers["content-disposition"] == f'attachment; filename="{file_name}"'
        assert whole.headers["etag"] == f'"{hashlib.sha256(content).hexdigest()}"'
        part = server.client.get(f"{location}/download", headers={"Range": "bytes=2-4"})
        assert (part.status_code, part.content) == (206, content[2:5])
        head = server.client.head(f"{location}/download")
        assert (head.status_code, head.headers["content-length"]) == (200, str(len(content)))
        seen = server.client.get(f"{location}/download", headers={"If-None-Match": whole.headers["etag"]})
        assert seen.status_code == 304


def test_deleting(server: Any) -> None:
    location = send(server, JSONL).headers["location"]
    with server.services.database.write() as session:
        job = jobs.create_job(session, "train", {"dataset": location.rpartition("/")[2]})
    refused = server.client.delete(location)
    assert (refused.status_code, refused.json()["code"]) == (409, "state_conflict")
    assert job.id in refused.json()["detail"]
    assert server.client.post(f"/jobs/{job.id}/cancel").status_code == 200
    assert server.client.delete(location).status_code == 204
    for path in (location, f"{location}/rows", f"{location}/download"):
        assert server.client.get(path).status_code == 404
    assert server.client.delete(location).status_code == 404
    assert send(server, JSONL).status_code == 201


def test_the_same_key_gives_the_first_answer(server: Any) -> None:
    options = {"files": {"file": ("a.jsonl", JSONL)}, "headers": {"Idempotency-Key": "k1"}}
    first = server.client.post("/datasets", **options)
    server.client.delete(first.headers["location"])
    again = server.client.post("/datasets", **options)
    assert (again.status_code, again.json()) == (201, first.json())
    assert again.headers["idempotency-replayed"] == "true"
    other = {**options, "files": {"file": ("a.jsonl", JSONL + JSONL)}}
    assert server.client.post("/datasets", **other).json()["code"] == "idempotency_key_reused"


def test_bytes_count_for_the_key_and_reading_takes_a_scope(serve: Any) -> None:
    guarded = serve(api_keys=True)
    with guarded.services.database.write() as session:
        row, secret = keys.create_key(session, "k", ["write"], limits=KeyLimits(max_bytes=len(JSONL) + 10))
        key = row.id
    headers = {"Authorization": f"Bearer {secret}"}
    made = guarded.client.post("/datasets", files={"file": ("a.jsonl", JSONL)}, headers=headers)
    assert made.status_code == 201, made.text
    more = guarded.client.post("/datasets", files={"file": ("b.jsonl", JSONL + b"\n")}, headers=headers)
    assert (more.status_code, more.json()["code"]) == (429, "quota_exceeded")
    assert guarded.client.delete(made.headers["location"], headers=headers).status_code == 204
    with guarded.services.database.read() as session:
        assert session.get_one(ApiKeyRow, key).stored_bytes == 0
    assert guarded.client.get("/datasets").status_code == 401
    assert guarded.client.post("/datasets", files={"file": ("a.jsonl", JSONL)}).status_code == 401


def test_uploads_are_counted(server: Any) -> None:
    send(server, JSONL)
    send(server, JSONL)
    send(server, b"{")
    text = server.client.get("/metrics").text
    for outcome in ("created", "known", "file_broken"):
        assert f'rankwise_uploads_total{{outcome="{outcome}"}} 1.0' in text


def test_nothing_keeps_the_bytes_of_a_dataset_that_uploads_have_finished_with(server: Any) -> None:
    """A job that drops its dataset removes the bytes at once."""
    ids = [send(server, JSONL).json()["id"] for _ in range(2)]
    services = server.services
    with services.database.write() as session:
        (digest,) = datasets.remove_dataset(session, ids[0])
    assert ids[0] == ids[1]
    assert remove_unused(services.database, services.blobs, digest)
    assert nothing_left(server)
