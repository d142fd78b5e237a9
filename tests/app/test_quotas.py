from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import select

from app.problems import problem, problem_of
from artifacts.errors import BlobStoreUnavailable, QueueFull, QuotaExceeded, RequestInvalid
from storage import keys
from storage.keys import KeyLimits
from storage.tables import ApiKeyRow

Owner = tuple[str, dict[str, str]]


@pytest.fixture
def guarded(serve: Any) -> Any:
    return serve(api_keys=True)


@pytest.fixture
def owner(guarded: Any) -> Callable[..., Owner]:
    """Makes keys with limits; gives (id, headers)."""

    def make(**limits: int) -> Owner:
        with guarded.services.database.write() as session:
            row, secret = keys.create_key(session, "k", ["admin"], limits=KeyLimits(**limits))
        return row.id, {"Authorization": f"Bearer {secret}"}

    return make


def stored(server: Any, key_id: str) -> int:
    with server.services.database.read() as session:
        return int(session.get_one(ApiKeyRow, key_id).stored_bytes)


def upload(server: Any, headers: dict[str, str], files: Any) -> Any:
    return server.upload(files.parts(), headers=headers)


def test_stored_bytes_follow_uploads_and_deletes(guarded: Any, owner: Any, adapter_files: Any) -> None:
    key, headers = owner()
    first = upload(guarded, headers, adapter_files(seed=1))
    assert first.status_code == 201
    size = first.json()["size"]
    assert stored(guarded, key) == size
    again = upload(guarded, headers, adapter_files(seed=1))
    assert again.status_code == 200
    assert stored(guarded, key) == size, "the same content is stored once"
    assert upload(guarded, headers, adapter_files(seed=2)).status_code == 201
    assert stored(guarded, key) > size
    other_key, other = owner()
    assert guarded.client.delete(first.headers["location"], headers=other).status_code == 204
    assert stored(guarded, other_key) == 0, "given back to the one who had it counted"
    assert stored(guarded, key) == size
    assert guarded.client.delete(first.headers["location"], headers=headers).status_code == 404
    assert stored(guarded, key) == size


def test_an_upload_that_does_not_fit_is_refused(guarded: Any, owner: Any, adapter_files: Any) -> None:
    _, free = owner()
    size = upload(guarded, free, adapter_files(seed=1)).json()["size"]
    key, headers = owner(max_bytes=2 * size - 1)
    assert upload(guarded, headers, adapter_files(seed=2)).status_code == 201
    refused = upload(guarded, headers, adapter_files(seed=3))
    assert refused.status_code == 429
    assert refused.json()["code"] == "quota_exceeded"
    assert str(size - 1) in refused.json()["detail"]
    assert int(refused.headers["retry-after"]) >= 1
    assert stored(guarded, key) == size
    assert guarded.staged() == []


def test_a_place_that_was_given_back_is_used_again(guarded: Any, owner: Any, adapter_files: Any) -> None:
    _, free = owner()
    size = upload(guarded, free, adapter_files(seed=1)).json()["size"]
    _, headers = owner(max_bytes=size)
    first = upload(guarded, headers, adapter_files(seed=2))
    assert upload(guarded, headers, adapter_files(seed=3)).status_code == 429
    assert guarded.client.delete(first.headers["location"], headers=headers).status_code == 204
    assert upload(guarded, headers, adapter_files(seed=3)).status_code == 201


def test_what_another_has_stored_costs_nothing(guarded: Any, owner: Any, adapter_files: Any) -> None:
    _, free = owner()
    assert upload(guarded, free, adapter_files(seed=1)).status_code == 201
    key, headers = owner(max_bytes=0)
    assert upload(guarded, headers, adapter_files(seed=1)).status_code == 200
    assert stored(guarded, key) == 0


def test_a_key_may_have_so_many_jobs_waiting(guarded: Any, owner: Any, adapter_files: Any) -> None:
    _, headers = owner(max_queued=2)
    _, other = owner()
    adapter = upload(guarded, headers, adapter_files(seed=1)).json()["id"]
    body = {"adapters": [{"id": adapter}], "method": "cat"}
    jobs = [guarded.client.post("/merge", json=body, headers=headers) for _ in range(3)]
    assert [item.status_code for item in jobs] == [202, 202, 429]
    assert jobs[2].json()["code"] == "quota_exceeded"
    assert int(jobs[2].headers["retry-after"]) >= 1
    assert guarded.client.post("/merge", json=body, headers=other).status_code == 202
    assert guarded.client.post(f"/jobs/{jobs[0].json()['id']}/cancel", headers=headers).status_code == 200
    assert guarded.client.post("/merge", json=body, headers=headers).status_code == 202


def test_a_full_queue_says_when_to_come_back(serve: Any, adapter_files: Any) -> None:
    server = serve(max_queued_jobs=1)
    adapter = server.upload(adapter_files().parts()).json()["id"]
    body = {"adapters": [{"id": adapter}], "method": "cat"}
    assert server.client.post("/merge", json=body).status_code == 202
    refused = server.client.post("/merge", json=body)
    assert (refused.status_code, refused.json()["code"]) == (429, "queue_full")
    assert int(refused.headers["retry-after"]) >= 1


@pytest.mark.parametrize(
    ("error", "seconds"),
    [
        (QueueFull("full", retry_after=7), "7"),
        (QuotaExceeded("much", retry_after=0), "1"),
        (QuotaExceeded("much"), "60"),
        (QueueFull("full"), "10"),
        (BlobStoreUnavailable("away"), "5"),
        (RequestInvalid("no"), None),
    ],
)
def test_retry_after_is_a_header(error: Any, seconds: str | None) -> None:
    assert problem_of({"type": "http"}, error).headers.get("retry-after") == seconds


def test_a_header_of_the_caller_stays() -> None:
    answer = problem(
        {"type": "http"}, status=503, code="x", title="x", detail="x", headers={"Retry-After": "3"}, retry_after=9
    )
    assert answer.headers["retry-after"] == "3"


def test_keys_have_no_limits_unless_given(guarded: Any, owner: Any) -> None:
    key, _ = owner()
    with guarded.services.database.read() as session:
        row = session.scalars(select(ApiKeyRow).where(ApiKeyRow.id == key)).one()
    assert (row.max_queued, row.max_running, row.max_bytes, row.stored_bytes) == (None, None, None, 0)
