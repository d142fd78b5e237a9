"""Stopping attempts: cancel, graceful stop of the server, and what the slot does meanwhile."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest


def test_a_queued_job_is_cancelled_without_running(pool: Any) -> None:
    gate = pool.gate()
    running, queued = pool.submit("wait_for_gate", gate=str(gate.path)), pool.submit("succeed")
    pool.start()
    pool.running_pid(running)
    pool.cancel(queued)
    assert pool.job(queued).state == "cancelled"
    gate.open()
    pool.wait_for(running, "succeeded")
    after = pool.submit("succeed")
    pool.wait_for(after, "succeeded")
    assert (pool.job(queued).state, pool.job(queued).attempt) == ("cancelled", 0)


@pytest.mark.parametrize("kind", ["wait_for_gate", "steps"])
def test_a_running_job_is_cancelled_and_its_worker_replaced(pool: Any, kind: str, exists: Any) -> None:
    job_id = pool.submit(kind, gate=str(pool.gate().path))
    supervisor = pool.start()
    pid = pool.running_pid(job_id)
    pool.cancel(job_id)
    assert pool.job(job_id).state == "cancelling"
    supervisor.wake()
    job = pool.ended(job_id)
    assert (job.state, job.attempt, job.failures, job.result, job.error) == ("cancelled", 1, 0, None, None)
    assert not exists(pid)
    (attempt,) = pool.attempts(job_id)
    assert attempt.outcome == "cancelled"
    after = pool.submit("succeed")
    assert pool.ended(after).result["report"]["pid"] != pid


def test_a_cancel_that_another_process_asked_for_is_seen_by_polling(pool: Any) -> None:
    job_id = pool.submit("wait_for_gate", gate=str(pool.gate().path))
    pool.start()
    pool.running_pid(job_id)
    pool.cancel(job_id)  # and nobody calls wake
    assert pool.ended(job_id).state == "cancelled"


def test_a_job_that_ignores_sigterm_is_killed_with_its_children_after_the_grace(
    pool: Any, exists: Any, has_ended: Any, wait_until: Any
) -> None:
    note = pool.folder / "child"
    job_id = pool.submit("stubborn", child=str(note))
    pool.start(grace_seconds=0.3)
    pid = pool.running_pid(job_id)
    child = int(note.read_text())
    assert exists(child)
    pool.cancel(job_id)
    job = pool.ended(job_id)
    assert job.state == "cancelled"
    (attempt,) = pool.attempts(job_id)
    assert attempt.exit["signal"] == signal.SIGKILL
    assert not exists(pid)
    wait_until(lambda: has_ended(child), "the child is dead")


def test_the_slot_is_free_only_when_the_process_is_reaped(pool: Any) -> None:
    first = pool.submit("stubborn", child=str(pool.folder / "child"))
    pool.start(grace_seconds=0.2)
    pid = pool.running_pid(first)
    second = pool.submit("is_alive", pid=pid)
    pool.cancel(first)
    assert pool.ended(second).result["report"] == {"exists": False}
    (ended,), (began,) = pool.attempts(first), pool.attempts(second)
    assert began.started_at >= ended.finished_at


def test_a_result_that_comes_after_the_cancel_is_not_published(pool: Any) -> None:
    gate = pool.gate()
    job_id = pool.submit("deaf_then_succeed", gate=str(gate.path))
    pool.start(poll_seconds=3600.0, beat_seconds=3600.0, lease_seconds=7200.0)
    pool.running_pid(job_id)
    pool.cancel(job_id)  # the supervisor does not know, so it does not stop the attempt
    gate.open()
    job = pool.ended(job_id)
    assert (job.state, job.result) == ("cancelled", None)


def test_a_graceful_stop_gives_the_job_back_uncounted_and_the_next_start_runs_it(pool: Any, exists: Any) -> None:
    job_id = pool.submit("wait_once", gate=str(pool.gate().path))
    supervisor = pool.start()
    pid = pool.running_pid(job_id)
    supervisor.stop()
    job = pool.job(job_id)
    assert (job.state, job.attempt, job.failures) == ("queued", 1, 0)
    assert not exists(pid)
    pool.start()
    job = pool.ended(job_id)
    assert (job.state, job.attempt, job.failures) == ("succeeded", 2, 0)


def test_a_graceful_stop_kills_after_the_grace_and_still_counts_no_failure(pool: Any, exists: Any) -> None:
    job_id = pool.submit("stubborn", child=str(pool.folder / "child"))
    supervisor = pool.start(grace_seconds=0.2)
    pid = pool.running_pid(job_id)
    supervisor.stop()
    assert (pool.job(job_id).state, pool.job(job_id).failures) == ("queued", 0)
    assert not exists(pid)


def test_an_attempt_that_ends_within_the_grace_keeps_its_result(pool: Any, wait_until: Any) -> None:
    gate = pool.gate()
    job_id = pool.submit("deaf_then_succeed", gate=str(gate.path))
    supervisor = pool.start(grace_seconds=60.0)
    pool.running_pid(job_id)
    supervisor._stopping.set()
    supervisor.wake()
    wait_until(lambda: supervisor.status()[0]["state"] == "stopping", "the attempt was asked to stop")
    gate.open()
    supervisor.stop()
    assert (pool.job(job_id).state, pool.job(job_id).attempt) == ("succeeded", 1)


def test_a_sigterm_from_outside_is_a_failure_of_the_surroundings(pool: Any) -> None:
    job_id = pool.submit("wait_once", gate=str(pool.gate().path))
    pool.start()
    os.kill(pool.running_pid(job_id), signal.SIGTERM)
    job = pool.ended(job_id)
    assert (job.state, job.attempt, job.failures) == ("succeeded", 2, 1)
