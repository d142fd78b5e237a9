"""What the tests of schedules share: bodies of requests, a schedule, and a look at what it has fired."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import update

from storage import database as clock
from storage.tables import ScheduleRow

DAILY = {"cron": "30 2 * * *", "timezone": "Europe/Berlin"}
EVENT = {"event": "base_model.deprecated"}


def body(ids: list[str], **changes: Any) -> dict[str, Any]:
    job = {"kind": "merge", "params": {"adapters": [{"id": key} for key in ids], "method": "cat"}}
    return {"trigger": DAILY, "job": job, **changes}


@pytest.fixture
def schedule(server: Any, two_adapters: list[str]) -> dict[str, Any]:
    response = server.client.post("/schedules", json=body(two_adapters, name="nightly"))
    assert response.status_code == 201, response.text
    made: dict[str, Any] = response.json()
    return made


def url(schedule: dict[str, Any], suffix: str = "") -> str:
    return f"/schedules/{schedule['id']}{suffix}"


def make_due(server: Any, schedule: dict[str, Any], ago: timedelta = timedelta(seconds=1)) -> None:
    """Let its time have come a moment ago."""
    with server.services.database.write() as session:
        moment = clock.now(session) - ago
        session.execute(update(ScheduleRow).where(ScheduleRow.id == schedule["id"]).values(next_fire_at=moment))


def firings(server: Any, schedule: dict[str, Any]) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = server.client.get(url(schedule, "/firings")).json()["items"]
    return items
