"""`kill -9` of a worker process during a merge, at every moment that differs: one result, and nothing lost."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

from storage import adapters
from storage.blobs import BlobStore


def merged_adapters(pool: Any) -> list[Any]:
    with pool.database.read() as session:
        return [row for row in adapters.list_adapters(session).items if row.origin != "upload"]


def states(pool: Any, job_id: str) -> list[str]:
    return [event["state"] for event in pool.events(job_id) if event["type"] == "state"]


@pytest.fixture
def params(pool: Any, torch_provider: Any, add_adapter: Any) -> dict[str, Any]:
    pool.provider = torch_provider
    return {"adapters": [{"id": add_adapter(name, seed)} for seed, name in enumerate("abc")], "method": "lego"}


def test_a_worker_killed_in_the_middle_of_a_merge(pool: Any, params: dict[str, Any], exists: Any) -> None:
    job_id = pool.submit("gated_merge", gate=str(pool.gate().path), **params)
    pool.start()
    pid = pool.running_pid_at_gate(job_id)
    os.kill(pid, signal.SIGKILL)
    job = pool.ended(job_id)
    assert (job.state, job.attempt, job.failures, job.error) == ("succeeded", 2, 1, None)
    assert [row.id for row in merged_adapters(pool)] == job.result["adapters"]
    assert states(pool, job_id) == ["queued", "running", "queued", "running", "succeeded"]
    first, second = pool.attempts(job_id)
    assert (first.pid, first.exit["signal"]) == (pid, signal.SIGKILL)
    assert not exists(pid)
    assert second.pid != pid


@pytest.mark.parametrize(
    ("dies", "attempts"),
    [
        ("fetching", 2),
        ("merging", 2),
        ("storing blobs", 2),
        ("before the transaction", 2),
        ("inside the transaction", 2),
        ("after the transaction", 1),
    ],
)
def test_killed_at_a_moment_of_publishing(pool: Any, params: dict[str, Any], dies: str, attempts: int) -> None:
    job_id = pool.submit("mortal_merge", dies=dies, **params)
    after = pool.submit("succeed")
    pool.start()
    job = pool.ended(job_id)
    assert (job.state, job.attempt, job.failures) == ("succeeded", attempts, attempts - 1)
    (merged,) = merged_adapters(pool)
    assert job.result["adapters"] == [merged.id]
    assert states(pool, job_id).count("succeeded") == 1
    blobs = BlobStore(pool.settings().blob_url)
    assert all(blobs.exists(entry.sha256) for entry in merged.files)
    # The dead worker's slot is served again, and the job that succeeded is not run again for its worker's death.
    assert pool.ended(after).result["report"]["pid"] != pool.attempts(job_id)[0].pid
    assert pool.job(job_id).attempt == attempts


def test_a_worker_that_always_dies_does_not_hold_up_the_others(pool: Any, params: dict[str, Any]) -> None:
    doomed = pool.submit("crash", times=99)
    merge = pool.submit("gated_merge", gate=str(pool.gate().path), **params)
    pool.start(devices="cpu:2")
    pool.running_pid_at_gate(merge)
    assert pool.ended(doomed).state == "failed"
    assert pool.job(merge).attempt == 1
