"""Jobs: list, show, cancel, retry, and the stream of their events."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from app import events


@pytest.fixture
def job(server: Any, two_adapters: list[str]) -> str:
    response = server.client.post("/merge", json={"adapters": [{"id": key} for key in two_adapters]})
    assert response.status_code == 202, response.text
    identifier: str = response.json()["id"]
    return identifier


def test_list_filters_and_pages(server: Any, two_adapters: list[str]) -> None:
    ids = [server.client.post("/merge", json={"adapters": [{"id": key}]}).json()["id"] for key in two_adapters * 2]
    page = server.client.get("/jobs", params={"limit": 3}).json()
    assert [item["id"] for item in page["items"]] == ids[:0:-1]
    assert not any("position" in item or item["waiting"] or item["eta_seconds"] for item in page["items"])
    assert server.client.get(f"/jobs/{ids[-1]}").json()["position"] == 4
    rest = server.client.get("/jobs", params={"limit": 3, "cursor": page["next"]}).json()
    assert [item["id"] for item in rest["items"]] == ids[:1]
    assert rest["next"] is None
    assert server.client.get("/jobs", params={"state": "running"}).json()["items"] == []
    assert server.client.get("/jobs", params={"kind": "train"}).json()["items"] == []
    wrong = server.client.get("/jobs", params={"state": "lost"})
    assert (wrong.status_code, wrong.json()["errors"][0]["pointer"]) == (422, "/query/state")


@pytest.mark.parametrize("method", ["get", "post"])
def test_unknown_and_malformed_ids(server: Any, method: str) -> None:
    suffix = "" if method == "get" else "/cancel"
    unknown = server.client.request(method, f"/jobs/job_{'0' * 32}{suffix}")
    assert (unknown.status_code, unknown.json()["code"]) == (404, "not_found")
    malformed = server.client.request(method, f"/jobs/7{suffix}")
    assert (malformed.status_code, malformed.json()["errors"][0]["pointer"]) == (422, "/path/job_id")


def test_cancel_a_queued_job(server: Any, job: str) -> None:
    cancelled = server.client.post(f"/jobs/{job}/cancel")
    assert (cancelled.status_code, cancelled.json()["state"]) == (200, "cancelled")
    assert cancelled.json()["cancel_requested"] is True
    again = server.client.post(f"/jobs/{job}/cancel")
    assert (again.status_code, again.json()["code"]) == (409, "state_conflict")


def test_cancel_a_running_job_is_visible(server: Any, job: str, fake_pool: Any) -> None:
    fake_pool(server).claim()
    assert server.client.post(f"/jobs/{job}/cancel").json()["state"] == "cancelling"


def test_retry_makes_a_new_job(server: Any, job: str, fake_pool: Any) -> None:
    early = server.client.post(f"/jobs/{job}/retry")
    assert (early.status_code, early.json()["code"]) == (409, "state_conflict")
    pool = fake_pool(server)
    pool.fail(pool.claim())
    failed = server.client.get(f"/jobs/{job}").json()
    assert failed["error"] == {
        "code": "file_broken", "detail": "it broke", "hint": None, "exit": {"code": 1, "signal": None},
        "errors": [], "log": None,
    }  # fmt: skip
    headers = {"Idempotency-Key": "again"}
    retried = server.client.post(f"/jobs/{job}/retry", headers=headers)
    assert retried.status_code == 202
    assert retried.json()["id"] != job
    assert retried.json()["params"] == failed["params"]
    assert retried.headers["location"] == f"/jobs/{retried.json()['id']}"
    assert server.client.post(f"/jobs/{job}/retry", headers=headers).json()["id"] == retried.json()["id"]
    assert server.rows()["jobs"] == 2


Event = dict[str, Any]


def parse_events(lines: Iterator[str]) -> Iterator[Event]:
    """The events of a stream; a comment comes as {"comment": …}."""
    event: Event = {}
    for line in lines:
        if line == "":
            if event:
                yield event
            event = {}
        elif line.startswith(":"):
            event["comment"] = line[1:].strip()
        else:
            name, _, value = line.partition(": ")
            event[name] = json.loads(value) if name == "data" else value


def test_events_follow_the_job_to_its_end(server: Any, job: str, fake_pool: Any) -> None:
    pool = fake_pool(server)
    with server.client.stream("GET", f"/jobs/{job}/events") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        assert stream.headers["cache-control"] == "no-cache"
        found = parse_events(stream.iter_lines())
        first = next(found)
        assert (first["id"], first["event"], first["data"]["state"]) == ("1", "state", "queued")
        claimed = pool.claim()
        assert next(found)["data"]["state"] == "running"
        pool.progress(claimed, 0.5, "half")
        progress = next(found)
        assert (progress["event"], progress["data"]["fraction"]) == ("progress", 0.5)
        pool.succeed(claimed)
        rest = list(found)
    assert rest[-1]["data"]["state"] == "succeeded"
    assert [int(item["id"]) for item in rest] == list(range(4, 4 + len(rest)))


def test_events_resume_behind_the_last_one(server: Any, job: str, fake_pool: Any) -> None:
    pool = fake_pool(server)
    pool.succeed(pool.claim())
    url = f"/jobs/{job}/events"
    whole = list(parse_events(iter(server.client.get(url).text.split("\n"))))
    assert [item["data"]["state"] for item in whole] == ["queued", "running", "succeeded"]
    resumed = server.client.get(url, headers={"Last-Event-ID": "2"})
    assert list(parse_events(iter(resumed.text.split("\n")))) == whole[2:]
    seen_all = server.client.get(url, headers={"Last-Event-ID": "3"})
    assert (seen_all.status_code, seen_all.content) == (204, b"")
    wrong = server.client.get(url, headers={"Last-Event-ID": "x"})
    assert (wrong.status_code, wrong.json()["errors"][0]["pointer"]) == (422, "/header/Last-Event-ID")


def test_a_quiet_stream_is_kept_alive(server: Any, job: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "KEEPALIVE_SECONDS", 0.05)
    monkeypatch.setattr(events, "POLL_SECONDS", 0.02)
    with server.client.stream("GET", f"/jobs/{job}/events") as stream:
        found = parse_events(stream.iter_lines())
        assert next(found)["event"] == "state"
        assert "comment" in next(found)
        with httpx.Client(base_url=server.url, trust_env=False) as other:
            other.post(f"/jobs/{job}/cancel")
        ended = [item for item in found if "data" in item]
    assert [item["data"]["state"] for item in ended] == ["cancelled"]


def test_a_stream_ends_when_the_database_goes(server: Any, job: str) -> None:
    path = server.services.database.path
    ended = threading.Event()
    seen: list[Event] = []

    def follow() -> None:
        with (
            httpx.Client(base_url=server.url, timeout=30, trust_env=False) as client,
            client.stream("GET", f"/jobs/{job}/events") as stream,
        ):
            for event in parse_events(stream.iter_lines()):
                seen.append(event)
                path.rename(path.with_suffix(".away"))
        ended.set()

    thread = threading.Thread(target=follow)
    thread.start()
    assert ended.wait(30)
    thread.join()
    path.with_suffix(".away").rename(path)
    assert [event["id"] for event in seen] == ["1"]
