"""Schedules that fire: once whatever happens, for their key, by a clock that may jump, and what stops them."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from patience import wait_for
from schedule_calls import EVENT, body, firings, make_due, url

from app.chores import chores
from app.scheduling import Scheduler
from artifacts.errors import DatabaseUnavailable
from storage import database as clock


def test_a_server_fires_what_is_due(server: Any, schedule: dict[str, Any]) -> None:
    make_due(server, schedule)
    (entry,) = wait_for(lambda: firings(server, schedule))
    assert (entry["outcome"], entry["detail"]) == ("job", None)
    job = server.client.get(f"/jobs/{entry['job_id']}").json()
    assert (job["kind"], job["params"]) == ("merge", schedule["job"]["params"])
    shown = server.client.get(url(schedule)).json()
    assert (shown["version"], shown["next_fire_at"]) == (1, schedule["next_fire_at"])
    assert 'rankwise_jobs_submitted_total{kind="merge"} 1.0' in server.client.get("/metrics").text


def test_a_firing_whose_adapters_are_gone_is_refused(
    server: Any, schedule: dict[str, Any], two_adapters: list[str]
) -> None:
    server.client.delete(f"/adapters/{two_adapters[0]}")
    make_due(server, schedule)
    (entry,) = wait_for(lambda: firings(server, schedule))
    assert (entry["outcome"], entry["job_id"]) == ("refused", None)
    assert two_adapters[0] in entry["detail"]


def test_a_deprecated_model_starts_what_waits_for_it(server: Any, two_adapters: list[str]) -> None:
    model = server.client.post("/models", json={"hub_id": "acme/tiny"}).json()["id"]
    made = server.client.post("/schedules", json=body(two_adapters, trigger={**EVENT, "subject": model})).json()
    assert server.client.post(f"/models/{model}/deprecate", json={}).status_code == 200
    (entry,) = wait_for(lambda: firings(server, made))
    assert (entry["outcome"], entry["occurrence"][:4]) == ("job", "evt_")


def test_schedules_belong_to_their_key(serve: Any, adapter_files: Any) -> None:
    from storage import keys

    server = serve(api_keys=True)
    with server.services.database.write() as session:
        maker, secret = keys.create_key(session, "maker", ["read", "write", "jobs"])
        _, reader = keys.create_key(session, "reader", ["read"])
    headers = {"Authorization": f"Bearer {secret}"}
    adapter = server.upload(adapter_files().parts(), headers=headers).json()["id"]
    made = server.client.post("/schedules", json=body([adapter]), headers=headers).json()
    assert made["created_by"] == maker.id
    make_due(server, made)
    job = wait_for(lambda: server.client.get("/jobs", headers=headers).json()["items"])[0]
    from storage import jobs

    with server.services.database.read() as session:
        row = jobs.get_job(session, job["id"])
    assert (row.owner, row.created_by, row.schedule_id) == (maker.id, maker.id, made["id"])
    only_read = {"Authorization": f"Bearer {reader}"}
    assert server.client.get(url(made), headers=only_read).status_code == 200
    for method, suffix in (("PATCH", ""), ("DELETE", ""), ("POST", "/trigger")):
        json = {} if method == "PATCH" else None
        assert server.client.request(method, url(made, suffix), json=json, headers=only_read).status_code == 403
    assert server.client.post("/schedules", json=body([adapter]), headers=only_read).status_code == 403


def test_two_servers_of_one_database_fire_once(serve: Any, adapter_files: Any) -> None:
    first = serve()
    adapter = first.upload(adapter_files().parts()).json()["id"]
    shared = {"database_url": first.services.settings.database_url, "blob_url": first.services.settings.blob_url}
    serve(**shared)
    made = [
        first.client.post("/schedules", json=body([adapter], overlap="queue", name=f"n{n}")).json() for n in range(12)
    ]
    for item in made:
        make_due(first, item)
    wait_for(lambda: all(firings(first, item) for item in made))
    assert [len(firings(first, item)) for item in made] == [1] * 12
    assert first.rows()["jobs"] == 12


@pytest.fixture
def scheduler(server: Any) -> Scheduler:
    """One that nobody runs but the test; the server's own is at rest."""
    server.services.clockwork.stop()
    return Scheduler(server.services.settings, server.services.database, lambda kind: None)


def test_a_clock_that_goes_back_is_noticed(
    server: Any, schedule: dict[str, Any], scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    present = datetime.now(UTC)
    shift = [timedelta(days=30)]
    real = clock.now
    monkeypatch.setattr(clock, "now", lambda session: real(session) + shift[0])
    scheduler.run()  # the clock is a month ahead: this fires once, for all the days in between
    assert sorted(entry["outcome"] for entry in firings(server, schedule)) == ["job", "missed"]
    ahead = datetime.fromisoformat(server.client.get(url(schedule)).json()["next_fire_at"])
    assert ahead > present + timedelta(days=29)
    shift[0] = timedelta(0)
    scheduler.run()
    assert server.client.get(url(schedule)).json()["next_fire_at"] == schedule["next_fire_at"]
    assert len(firings(server, schedule)) == 2


def test_one_bad_job_does_not_stop_the_others(
    server: Any, two_adapters: list[str], scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    from app import scheduling

    made = [server.client.post("/schedules", json=body(two_adapters)).json() for _ in range(2)]
    for number, item in enumerate(made):
        make_due(server, item, timedelta(seconds=10 - number))
    real = scheduling.check_submission
    calls: list[int] = []

    def check(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise ZeroDivisionError
        return real(*args)

    monkeypatch.setattr(scheduling, "check_submission", check)
    scheduler.run()
    outcomes = [(entry["outcome"], entry["detail"]) for item in made for entry in firings(server, item)]
    assert outcomes == [
        ("refused", "internal_error: the job could not be checked; the server's log says why"),
        ("job", None),
    ]


def test_a_server_that_stops_leaves_the_rest_due(server: Any, two_adapters: list[str], scheduler: Scheduler) -> None:
    made = [server.client.post("/schedules", json=body(two_adapters, overlap="queue")).json() for _ in range(3)]
    for item in made:
        make_due(server, item)
    scheduler._fired = lambda kind: scheduler.interrupt()
    scheduler.run()
    assert sum(len(firings(server, item)) for item in made) == 1
    Scheduler(server.services.settings, server.services.database, lambda kind: None).run()
    assert [len(firings(server, item)) for item in made] == [1, 1, 1]


def test_a_database_that_goes_away_keeps_what_is_due(
    server: Any, schedule: dict[str, Any], scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    from app import scheduling

    make_due(server, schedule)
    with monkeypatch.context() as patch:
        patch.setattr(scheduling, "check_submission", _unavailable)
        with pytest.raises(DatabaseUnavailable):
            scheduler.run()
    assert firings(server, schedule) == []
    scheduler.run()
    assert [entry["outcome"] for entry in firings(server, schedule)] == ["job"]


def _unavailable(*_: Any) -> Any:
    raise DatabaseUnavailable("gone")


def test_the_chores_of_a_server(server: Any) -> None:
    services = server.services
    found = {chore.name: chore for chore in chores(services.settings, services.database, services.blobs)}
    assert {"schedules", "sweep", "idempotency"} <= set(found)
    assert (found["schedules"].interval_seconds, found["sweep"].interval_seconds) == (1.0, 3600.0)
    for name in ("schedules", "sweep", "idempotency"):
        found[name].run()


def test_starting_and_stopping_run_and_end_the_chores(serve: Any) -> None:
    running = serve()
    names = {thread.name for thread in threading.enumerate()}
    assert {"chore-schedules", "chore-sweep", "chore-idempotency"} <= names
    assert running.services.clockwork is not None
    serve.stop()
    assert running.services.clockwork is None
    serve.running.clear()
