"""The stream of events goes on after the server was killed: its numbers are those of the database, not of a process."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.server_process import ServerProcess
from storage import claims
from storage.database import Database


def events(lines: Iterator[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, data) of each event."""
    found: dict[str, str] = {}
    for line in lines:
        if line:
            name, _, value = line.partition(": ")
            found[name] = value
        elif found:
            yield int(found["id"]), json.loads(found["data"])
            found = {}


def start(tmp_path: Path) -> ServerProcess:
    return ServerProcess(tmp_path / "data", {"POOL": "off"}, tmp_path / "server.log")


def test_a_follower_resumes_at_the_next_server(tmp_path: Path, adapter_files: Any) -> None:
    seen: list[tuple[int, dict[str, Any]]] = []
    with start(tmp_path) as first, httpx.Client(base_url=first.url, timeout=30, trust_env=False) as client:
        ids = [client.post("/adapters", files=adapter_files(seed=seed).parts()).json()["id"] for seed in (1, 2)]
        job_id = client.post("/merge", json={"adapters": [{"id": key} for key in ids]}).json()["id"]
        database = Database(f"sqlite:///{tmp_path / 'data' / 'rankwise.db'}")
        with database.write() as session:
            claim = claims.claim_next(session, server_id="srv", boot_id="boot", slot="cpu:0", lease_seconds=600)
        assert claim is not None
        with client.stream("GET", f"/jobs/{job_id}/events") as stream:
            found = events(stream.iter_lines())
            seen += [next(found), next(found)]
            assert first._process is not None
            os.kill(first._process.pid, signal.SIGKILL)
            with pytest.raises(httpx.RemoteProtocolError):
                seen += list(found)
    assert [data["state"] for _, data in seen] == ["queued", "running"]
    # Written while no server of the API is up, by a pool elsewhere.
    with database.write() as session:
        claims.record_progress(session, job_id, claim.attempt, fraction=0.5, message="half")
    with start(tmp_path) as second, httpx.Client(base_url=second.url, timeout=30, trust_env=False) as client:
        with client.stream("GET", f"/jobs/{job_id}/events", headers={"Last-Event-ID": str(seen[-1][0])}) as stream:
            found = events(stream.iter_lines())
            seen.append(next(found))
            with database.write() as session:
                result = {"adapters": [], "images": [], "report": {}}
                claims.finish_succeeded(session, job_id, claim.attempt, result)
            seen += list(found)
        whole = list(events(iter(client.get(f"/jobs/{job_id}/events").text.split("\n"))))
    database.dispose()
    assert seen == whole
    assert [number for number, _ in seen] == [1, 2, 3, 4]
    assert (seen[2][1]["message"], seen[3][1]["state"]) == ("half", "succeeded")
