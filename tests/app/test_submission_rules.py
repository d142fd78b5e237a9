"""Rules 1 and 10: a job is made whole or not at all, and what can not run is refused before it is one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import func, select

from app import capacity
from artifacts.errors import DatabaseUnavailable, RequestInvalid
from storage.tables import IdempotencyRow, JobEventRow, JobQueueRow, JobRow


def written(server: Any) -> dict[str, int]:
    """The number of rows of all that a submission writes."""
    with server.services.database.read() as session:
        return {
            table.__tablename__: session.scalar(select(func.count()).select_from(table)) or 0
            for table in (JobRow, JobEventRow, JobQueueRow, IdempotencyRow)
        }


def merge(ids: list[str], **changes: Any) -> dict[str, Any]:
    return {"adapters": [{"id": key} for key in ids], "method": "cat", **changes}


@pytest.mark.parametrize(
    "step",
    [
        "storage.jobs.append_event",
        "storage.jobs.count_change",
        "app.idempotency.idempotency.complete",
    ],
)
def test_a_job_its_first_event_and_its_key_are_one_transaction(
    server: Any, two_adapters: list[str], monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    before = written(server)
    headers = {"Idempotency-Key": "one"}

    def fail(*_: object, **__: object) -> None:
        raise DatabaseUnavailable("the connection is gone")

    with monkeypatch.context() as patch:
        patch.setattr(step, fail)
        assert server.client.post("/merge", json=merge(two_adapters), headers=headers).status_code == 503
    assert written(server) == before
    answers = [server.client.post("/merge", json=merge(two_adapters), headers=headers) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [202, 202]
    assert answers[0].json()["id"] == answers[1].json()["id"]
    assert written(server) == {"jobs": 1, "job_events": 1, "job_queues": 1, "idempotency_keys": 1}


@pytest.mark.parametrize(
    ("change", "pointer"),
    [
        (lambda body: body["adapters"].append({"id": "adp_" + "f" * 32}), "/adapters/2/id"),
        (lambda body: body.update(method="no such method"), "/method"),
        (lambda body: body.update(resources={"devices": 2}), "/resources/devices"),
        (lambda body: body.update(resources={"timeout_seconds": 0}), "/resources/timeout_seconds"),
    ],
)
def test_what_can_not_run_is_refused_and_leaves_nothing(
    server: Any, two_adapters: list[str], change: Callable[[dict[str, Any]], None], pointer: str
) -> None:
    body = merge(two_adapters)
    change(body)
    before = written(server)
    answer = server.client.post("/merge", json=body, headers={"Idempotency-Key": "one"})
    assert answer.status_code == 422, answer.text
    assert pointer in [error["pointer"] for error in answer.json()["errors"]]
    assert written(server) == before


def test_more_devices_than_any_host_has_are_refused(server: Any, fake_pool: Any) -> None:
    fake_pool(server)  # a server with one slot
    settings = server.services.settings
    with server.services.database.read() as session:
        capacity.check_devices(session, settings, "any kind", {"devices": 1})
        with pytest.raises(RequestInvalid, match="no host has 2 devices: here has 1"):
            capacity.check_devices(session, settings, "any kind", {"devices": 2})


def test_a_full_queue_says_when_to_come_back(serve: Any, adapter_files: Any) -> None:
    server = serve(max_queued_jobs=2)
    adapter = server.upload(adapter_files().parts()).json()["id"]
    answers = [server.client.post("/merge", json=merge([adapter])) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [202, 202, 429]
    assert int(answers[2].headers["retry-after"]) > 0
    assert server.rows()["jobs"] == 2
