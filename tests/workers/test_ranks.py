"""Jobs on several devices: real ranks of torch.distributed (gloo), in the process group of their worker."""

from __future__ import annotations

from typing import Any

import psutil
import pytest

pytestmark = pytest.mark.timeout(120)

KINDS = {
    name: f"rank_kinds:{name}"
    for name in ("all_reduce", "one_rank_is_refused", "leader_is_refused", "one_rank_dies", "ranks_wait")
} | {"succeed": "pool_kinds:succeed"}


@pytest.fixture
def ranks_pool(pool: Any, torch_provider: Any) -> Any:
    pool.provider = torch_provider
    return pool


def test_two_ranks_reduce_and_the_slots_serve_single_jobs_again(ranks_pool: Any, exists: Any, wait_until: Any) -> None:
    first = ranks_pool.submit("succeed")
    job_id = ranks_pool.submit("all_reduce", resources={"devices": 2})
    last = [ranks_pool.submit("succeed") for _ in range(2)]
    supervisor = ranks_pool.start(devices="cpu:2", kinds=KINDS)
    job = ranks_pool.ended(job_id)
    assert job.state == "succeeded", job.error
    report = job.result["report"]
    assert report["sum"] == 3.0
    assert (report["world_size"], report["backend"]) == (2, "gloo")
    leader, other = report["pids"]
    assert leader != other
    assert report["groups"] == [leader, leader]  # one signal to the group ends both
    attempt = ranks_pool.attempts(job_id)[0]
    assert (attempt.slot, attempt.pid) == ("cpu:0 +1", leader)
    assert [ranks_pool.ended(item).state for item in (first, *last)] == ["succeeded"] * 3
    wait_until(lambda: not exists(leader) and not exists(other), "both ranks are gone")
    wait_until(lambda: all(slot["state"] == "idle" for slot in supervisor.status()), "both slots are idle")


def test_only_rank_0_tells_progress_and_publishes(ranks_pool: Any) -> None:
    job_id = ranks_pool.submit("all_reduce", resources={"devices": 2})
    ranks_pool.start(devices="cpu:2", kinds=KINDS)
    assert ranks_pool.ended(job_id).state == "succeeded"
    told = [event["message"] for event in ranks_pool.events(job_id) if event["type"] == "progress"]
    assert told == ["rank 0 tells"]


def test_what_another_rank_refuses_is_the_error_of_the_job(ranks_pool: Any) -> None:
    job_id = ranks_pool.submit("one_rank_is_refused", resources={"devices": 2})
    ranks_pool.start(devices="cpu:2", kinds=KINDS)
    job = ranks_pool.ended(job_id)
    assert (job.state, job.attempt) == ("failed", 1)
    assert job.error["code"] == "invalid_request"
    assert job.error["detail"] == "rank 1 does not like this"


def test_what_rank_0_refuses_is_the_error_of_the_job(ranks_pool: Any) -> None:
    job_id = ranks_pool.submit("leader_is_refused", resources={"devices": 2})
    ranks_pool.start(devices="cpu:2", kinds=KINDS)
    job = ranks_pool.ended(job_id)
    assert (job.state, job.attempt, job.error["detail"]) == ("failed", 1, "rank 0 does not like this")


def test_a_rank_that_is_killed_has_the_job_run_again(ranks_pool: Any) -> None:
    job_id = ranks_pool.submit("one_rank_dies", resources={"devices": 2})
    ranks_pool.start(devices="cpu:2", kinds=KINDS)
    job = ranks_pool.ended(job_id)
    assert (job.state, job.attempt, job.failures) == ("succeeded", 2, 1)
    requeued = [event for event in ranks_pool.events(job_id) if event.get("reason")]
    assert requeued[0]["reason"]["code"] == "worker_crashed"
    assert "SIGKILL" in requeued[0]["reason"]["detail"]


def test_a_cancel_ends_all_ranks(ranks_pool: Any, exists: Any, wait_until: Any) -> None:
    job_id = ranks_pool.submit("ranks_wait", resources={"devices": 2})
    ranks_pool.start(devices="cpu:2", kinds=KINDS)
    message = wait_until(lambda: ranks_pool.job(job_id).message, "the ranks tell their processes")
    pids = [int(word) for word in message.split()[2:]]
    assert len(pids) == 2
    ranks_pool.cancel(job_id)
    assert ranks_pool.ended(job_id).state == "cancelled"
    assert not any(exists(pid) for pid in pids)


def test_a_killed_leader_takes_its_ranks_along(ranks_pool: Any, exists: Any, wait_until: Any) -> None:
    job_id = ranks_pool.submit("ranks_wait", resources={"devices": 2})
    ranks_pool.start(devices="cpu:2", kinds=KINDS)
    message = wait_until(lambda: ranks_pool.job(job_id).message, "the ranks tell their processes")
    leader, other = (int(word) for word in message.split()[2:])
    psutil.Process(leader).kill()
    wait_until(lambda: ranks_pool.job(job_id).attempt == 2, "the job runs again")
    wait_until(lambda: not exists(other), "the other rank is gone")
    ranks_pool.cancel(job_id)
    assert ranks_pool.ended(job_id).state == "cancelled"
