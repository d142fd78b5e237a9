"""Schedules over HTTP: what is accepted and refused, versions, triggers and looking ahead."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta
from typing import Any

from patience import wait_for
from schedule_calls import DAILY, EVENT, body, firings, make_due, url

DEADLINE = 90.0
UNKNOWN = "adp_" + "f" * 32


def test_a_schedule_is_made_and_shown(server: Any, two_adapters: list[str]) -> None:
    response = server.client.post("/schedules", json=body(two_adapters, name="nightly", overlap="queue"))
    assert response.status_code == 201, response.text
    made = response.json()
    assert (response.headers["location"], response.headers["etag"]) == (f"/schedules/{made['id']}", '"1"')
    assert (made["name"], made["trigger"], made["overlap"], made["misfire"]) == ("nightly", DAILY, "queue", "run-once")
    assert made["job"] == {
        "kind": "merge",
        "params": {
            "adapters": [{"id": key, "weight": 1.0} for key in two_adapters],
            "method": "cat",
            "parameters": {},
            "name": None,
            "output": "adapter",
            "base_model": None,
            "dtype": "auto",
            "force": False,
            "target_engine": None,
            "convert": False,
            "evaluation": None,
        },
        "resources": {},
    }
    assert (made["enabled"], made["version"], made["created_by"]) == (True, 1, None)
    next_fire_at = datetime.fromisoformat(made["next_fire_at"])
    assert next_fire_at > datetime.fromisoformat(made["created_at"])
    assert (next_fire_at.minute, next_fire_at.second) == (30, 0)
    shown = server.client.get(response.headers["location"])
    assert (shown.json(), shown.headers["etag"]) == (made, '"1"')
    assert server.client.get("/schedules").json() == {"items": [made], "next": None}


def test_an_event_schedule(server: Any, two_adapters: list[str]) -> None:
    model = server.client.post("/models", json={"hub_id": "acme/tiny"}).json()["id"]
    trigger = {**EVENT, "subject": model}
    made = server.client.post("/schedules", json=body(two_adapters, trigger=trigger)).json()
    assert (made["trigger"], made["next_fire_at"]) == (trigger, None)
    assert made["name"] == "merge: base_model.deprecated"
    upcoming = server.client.get(url(made, "/upcoming")).json()
    assert (upcoming["items"], upcoming["timezone"]) == ([], None)
    assert upcoming["words"] == f"Whenever base_model.deprecated happens to {model}"


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no trigger": ({"trigger": {}}, "/trigger"),
    "both kinds of trigger": ({"trigger": {**DAILY, **EVENT}}, "/trigger"),
    "subject of a cron": ({"trigger": {**DAILY, "subject": "mdl_" + "0" * 32}}, "/trigger"),
    "time zone of an event": ({"trigger": {**EVENT, "timezone": "UTC"}}, "/trigger"),
    "six fields": ({"trigger": {"cron": "0 0 * * * *"}}, "/trigger/cron"),
    "a day that never comes": ({"trigger": {"cron": "0 0 30 2 *"}}, "/trigger/cron"),
    "never fires": ({"trigger": {"cron": "0 0 */31 * MON#2"}}, "/trigger/cron"),
    "unknown zone": ({"trigger": {"cron": "0 0 * * *", "timezone": "../../etc/passwd"}}, "/trigger/timezone"),
    "unknown event": ({"trigger": {"event": "base_model.born"}}, "/trigger/event"),
    "unknown model": ({"trigger": {**EVENT, "subject": "mdl_" + "0" * 32}}, "/trigger/subject"),
    "unknown kind": ({"job": {"kind": "bake", "params": {}}}, "/job/kind"),
    "no adapters": ({"job": {"kind": "merge", "params": {"adapters": []}}}, "/job/params/adapters"),
    "unknown adapter": (
        {"job": {"kind": "merge", "params": {"adapters": [{"id": UNKNOWN}]}}},
        "/job/params/adapters/0/id",
    ),
    "unknown parameter": (
        {"job": {"kind": "merge", "params": {"adapters": [{"id": UNKNOWN}], "method": "cat", "parameters": {"x": 1}}}},
        "/job/params/parameters/x",
    ),
    "unknown field of the job": ({"job": {"kind": "merge", "params": {"resources": {}}}}, "/job/params/resources"),
    "no device": ({"job": {"kind": "merge", "params": {}, "resources": {"devices": 0}}}, "/job/resources/devices"),
    "unknown policy": ({"overlap": "wait"}, "/overlap"),
    "enabled as text": ({"enabled": "yes"}, "/enabled"),
    "unknown field": ({"jitter": 5}, "/jitter"),
}


def test_what_can_not_be_scheduled(server: Any, two_adapters: list[str]) -> None:
    for name, (changes, pointer) in REFUSED.items():
        refused = server.client.post("/schedules", json=body(two_adapters, **changes), headers={"Idempotency-Key": "k"})
        assert refused.status_code == 422, name
        assert pointer in [item["pointer"] for item in refused.json()["errors"]], (name, refused.text)
    assert server.client.get("/schedules").json()["items"] == []
    assert server.rows()["idempotency_keys"] == 0


def test_more_devices_than_a_merge_can_use(server: Any, two_adapters: list[str]) -> None:
    job = {**body(two_adapters)["job"], "resources": {"devices": 2}}
    response = server.client.post("/schedules", json=body(two_adapters, job=job))
    assert response.status_code == 422, response.text
    assert [item["pointer"] for item in response.json()["errors"]] == ["/job/resources/devices"]
    merge = server.client.post("/merge", json={"adapters": [{"id": two_adapters[0]}], "resources": {"devices": 2}})
    assert merge.status_code == 422, merge.text
    assert [item["pointer"] for item in merge.json()["errors"]] == ["/resources/devices"]


def test_resources_of_a_merge_are_kept(server: Any, two_adapters: list[str]) -> None:
    from storage import jobs

    asked = {"devices": 1, "timeout_seconds": 30.5}
    made = server.client.post("/merge", json={"adapters": [{"id": two_adapters[0]}], "resources": asked})
    assert made.status_code == 202, made.text
    with server.services.database.read() as session:
        assert jobs.get_job(session, made.json()["id"]).resources == asked


def test_idempotency(server: Any, two_adapters: list[str]) -> None:
    headers = {"Idempotency-Key": "once"}
    first = server.client.post("/schedules", json=body(two_adapters), headers=headers)
    again = server.client.post("/schedules", json=body(two_adapters), headers=headers)
    assert (again.status_code, again.json(), again.headers["etag"]) == (201, first.json(), '"1"')
    assert again.headers["idempotency-replayed"] == "true"
    other = server.client.post("/schedules", json=body(two_adapters, name="x"), headers=headers)
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_key_reused")
    assert len(server.client.get("/schedules").json()["items"]) == 1


def test_patch(server: Any, schedule: dict[str, Any], two_adapters: list[str]) -> None:
    same = server.client.patch(url(schedule), json={})
    assert (same.status_code, same.json(), same.headers["etag"]) == (200, schedule, '"1"')
    paused = server.client.patch(url(schedule), json={"enabled": False, "misfire": "skip"})
    assert (paused.json()["enabled"], paused.json()["next_fire_at"]) == (False, None)
    assert (paused.json()["misfire"], paused.json()["version"], paused.headers["etag"]) == ("skip", 2, '"2"')
    assert server.client.get(url(schedule, "/upcoming")).json()["items"] == []
    changed = server.client.patch(
        url(schedule),
        json={"enabled": True, "trigger": {"cron": "0 * * * *"}, "job": body(two_adapters[:1])["job"], "name": None},
    ).json()
    assert (changed["name"], changed["trigger"]) == ("nightly", {"cron": "0 * * * *", "timezone": "UTC"})
    assert len(changed["job"]["params"]["adapters"]) == 1
    assert changed["next_fire_at"].endswith(":00:00Z")
    assert changed["created_at"] == schedule["created_at"] < changed["updated_at"]
    for wrong in ({"job": {"kind": "merge", "params": {}}}, {"trigger": {}}, {"enabled": 1}, {"id": "x"}, {"name": ""}):
        assert server.client.patch(url(schedule), json=wrong).status_code == 422
    assert server.client.get(url(schedule)).json() == changed


def test_a_change_of_another_version(server: Any, schedule: dict[str, Any]) -> None:
    for header in ('"2"', 'W/"1"', '"x"', "1", '"1', '"01"', ""):
        for method in ("PATCH", "DELETE"):
            json = {"name": "x"} if method == "PATCH" else None
            response = server.client.request(method, url(schedule), json=json, headers={"If-Match": header})
            assert (response.status_code, response.json()["code"]) == (412, "precondition_failed"), header
    assert server.client.get(url(schedule)).json() == schedule


def test_a_change_of_the_version_that_was_seen(server: Any, schedule: dict[str, Any]) -> None:
    for version, header in enumerate(('"1"', '"7", "2"', "*", 'W/"2", "4"'), start=2):
        changed = server.client.patch(url(schedule), json={"name": f"v{version}"}, headers={"If-Match": header})
        assert (changed.status_code, changed.headers["etag"]) == (200, f'"{version}"'), header


def test_delete(server: Any, schedule: dict[str, Any]) -> None:
    job = server.client.post(url(schedule, "/trigger")).json()
    deleted = server.client.delete(url(schedule), headers={"If-Match": '"1"'})
    assert (deleted.status_code, deleted.content) == (204, b"")
    for method, suffix in (
        ("GET", ""), ("PATCH", ""), ("DELETE", ""), ("POST", "/trigger"), ("GET", "/upcoming"), ("GET", "/firings"),
    ):  # fmt: skip
        json = {} if method == "PATCH" else None
        response = server.client.request(method, url(schedule, suffix), json=json)
        assert (response.status_code, response.json()["code"]) == (404, "not_found")
    assert server.client.get(f"/jobs/{job['id']}").json()["state"] == "queued"
    assert server.client.get("/schedules").json()["items"] == []
    assert server.client.get("/schedules/7").status_code == 422


def test_trigger(server: Any, schedule: dict[str, Any], fake_pool: Any) -> None:
    response = server.client.post(url(schedule, "/trigger"), headers={"Idempotency-Key": "now"})
    assert response.status_code == 202, response.text
    job = response.json()
    assert response.headers["location"] == f"/jobs/{job['id']}"
    assert (job["kind"], job["params"]) == ("merge", schedule["job"]["params"])
    again = server.client.post(url(schedule, "/trigger"), headers={"Idempotency-Key": "now"})
    assert (again.status_code, again.json()["id"]) == (202, job["id"])
    busy = server.client.post(url(schedule, "/trigger"))
    assert (busy.status_code, busy.json()["code"]) == (409, "state_conflict")
    assert job["id"] in busy.json()["detail"]
    (entry,) = firings(server, schedule)
    assert (entry["outcome"], entry["job_id"], entry["detail"]) == ("job", job["id"], "triggered by a request")
    pool = fake_pool(server)
    pool.succeed(pool.claim())
    assert server.client.post(url(schedule, "/trigger")).status_code == 202


def test_a_trigger_can_wait_for_the_end(server: Any, schedule: dict[str, Any], fake_pool: Any) -> None:
    pool = fake_pool(server)
    answers: list[Any] = []
    caller = threading.Thread(
        target=lambda: answers.append(server.client.post(url(schedule, "/trigger"), headers={"Prefer": "wait=15"}))
    )
    caller.start()
    wait_for(lambda: server.rows()["jobs"])
    pool.succeed(pool.claim())
    caller.join(DEADLINE)
    assert (answers[0].status_code, answers[0].json()["state"]) == (200, "succeeded")


def test_a_trigger_replaces_what_is_unfinished(server: Any, two_adapters: list[str]) -> None:
    made = server.client.post("/schedules", json=body(two_adapters, overlap="replace", enabled=False)).json()
    first, second = (server.client.post(url(made, "/trigger")).json()["id"] for _ in range(2))
    states = [server.client.get(f"/jobs/{key}").json()["state"] for key in (first, second)]
    assert states == ["cancelled", "queued"]


def test_what_can_no_longer_be_done_is_refused_by_trigger_and_retry(
    server: Any, schedule: dict[str, Any], two_adapters: list[str]
) -> None:
    job = server.client.post(url(schedule, "/trigger")).json()["id"]
    server.client.post(f"/jobs/{job}/cancel")
    server.client.delete(f"/adapters/{two_adapters[1]}")
    before = server.rows()["jobs"]
    for call in (url(schedule, "/trigger"), f"/jobs/{job}/retry"):
        refused = server.client.post(call)
        assert refused.status_code == 422, refused.text
        assert refused.json()["errors"][0]["pointer"] == "/params/adapters/1/id"
    assert server.rows()["jobs"] == before
    assert len(firings(server, schedule)) == 1


def test_a_full_queue(serve: Any, adapter_files: Any) -> None:
    server = serve(max_queued_jobs=1)
    adapter = server.upload(adapter_files().parts()).json()["id"]
    made = server.client.post("/schedules", json=body([adapter], overlap="queue")).json()
    assert server.client.post(url(made, "/trigger")).status_code == 202
    full = server.client.post(url(made, "/trigger"))
    assert (full.status_code, full.json()["code"]) == (429, "queue_full")
    assert int(full.headers["retry-after"]) > 0
    make_due(server, made)
    entry = wait_for(lambda: firings(server, made)[:-1])[0]
    assert (entry["outcome"], entry["job_id"]) == ("refused", None)
    assert entry["detail"].startswith("queue_full: ")
    assert datetime.fromisoformat(server.client.get(url(made)).json()["next_fire_at"]) > datetime.now(UTC)


def test_upcoming(server: Any, schedule: dict[str, Any]) -> None:
    found = server.client.get(url(schedule, "/upcoming"), params={"n": 3}).json()
    assert (found["words"], found["timezone"], found["enabled"]) == ("At 02:30 every day", "Europe/Berlin", True)
    assert len(found["items"]) == 3
    assert found["items"][0]["at"] == schedule["next_fire_at"]
    times = [datetime.fromisoformat(item["at"]) for item in found["items"]]
    assert times == sorted(times)
    for item, moment in zip(found["items"], times, strict=True):
        local = datetime.fromisoformat(item["local"])
        assert local == moment
        assert local.utcoffset() in {timedelta(hours=1), timedelta(hours=2)}
        assert item["at"].endswith("Z")
    assert len(server.client.get(url(schedule, "/upcoming")).json()["items"]) == 5
    for wrong in (0, 101, "x"):
        assert server.client.get(url(schedule, "/upcoming"), params={"n": wrong}).status_code == 422
