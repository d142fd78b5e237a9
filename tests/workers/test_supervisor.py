"""Running jobs: success, and every kind of failure with its consequence for the job and for the worker process."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from artifacts.errors import RequestInvalid, StateConflict
from storage import servers

MIB = 1024**2


def test_a_job_succeeds_and_leaves_its_record(pool: Any) -> None:
    job_id = pool.submit("succeed")
    pool.start()
    job = pool.ended(job_id)
    assert (job.state, job.attempt, job.failures, job.fraction) == ("succeeded", 1, 0, 1.0)
    assert job.result["adapters"] == []
    assert job.result["images"] == []
    report = job.result["report"]
    (attempt,) = pool.attempts(job_id)
    assert attempt.pid == report["pid"]
    assert (attempt.outcome, attempt.slot, attempt.server_id) == ("succeeded", "cpu:0", "srv_test")
    told = [event.get("state") or event["message"] for event in pool.events(job_id)]
    assert told == ["queued", "running", "half way", "succeeded"]


def test_the_attempt_is_alone_in_its_session_and_leaves_no_files(pool: Any, wait_until: Any) -> None:
    job_id = pool.submit("succeed")
    pool.start()
    report = pool.ended(job_id).result["report"]
    assert report["session"] == report["pid"]
    assert (report["device"], report["visible_devices"]) == ("cpu", "")
    work = pool.folder / "work"
    assert Path(report["scratch"]).is_relative_to(work)
    wait_until(
        lambda: not [path for path in work.rglob("*") if path.name != "logs" and path.is_file()], "no log is left"
    )
    assert not Path(report["scratch"]).exists()


def test_a_worker_serves_one_attempt_after_another(pool: Any) -> None:
    ids = [pool.submit(kind) for kind in ("succeed", "user_error", "succeed")]
    pool.start()
    first, _, third = [pool.ended(job_id) for job_id in ids]
    assert first.result["report"]["pid"] == third.result["report"]["pid"]


def test_each_slot_runs_one_attempt_at_a_time(pool: Any, wait_until: Any) -> None:
    gates = [pool.gate(name) for name in "abc"]
    ids = [pool.submit("wait_for_gate", gate=str(gate.path)) for gate in gates]
    supervisor = pool.start(devices="cpu:2")
    pids = {pool.running_pid(job_id) for job_id in ids[:2]}
    assert len(pids) == 2
    assert {(slot["job_id"], slot["attempt"], slot["state"]) for slot in supervisor.status()} == {
        (job_id, 1, "running") for job_id in ids[:2]
    }
    assert pool.job(ids[2]).state == "queued"
    gates[1].open()
    pool.wait_for(ids[1], "succeeded")
    assert pool.running_pid(ids[2]) in pids
    assert pool.job(ids[0]).state == "running"
    gates[0].open()
    gates[2].open()
    for job_id in ids:
        assert pool.ended(job_id).state == "succeeded"


def test_a_users_error_is_told_and_never_retried(pool: Any) -> None:
    job_id = pool.submit("user_error")
    pool.start()
    job = pool.ended(job_id)
    assert (job.state, job.attempt, job.failures) == ("failed", 1, 0)
    assert job.error["code"] == "invalid_request"
    assert job.error["detail"] == "weight is -1"
    assert job.error["hint"] == "Use another weight."
    assert job.error["errors"] == [{"pointer": "/weight", "message": "negative"}]
    assert job.error["exit"]["code"] is None
    assert "log" not in job.error


def test_a_bug_is_an_internal_error_with_the_last_lines_of_the_log(pool: Any) -> None:
    job_id = pool.submit("bug")
    pool.start()
    job = pool.ended(job_id)
    assert (job.state, job.attempt) == ("failed", 1)
    assert job.error["code"] == "internal_error"
    assert job.error["detail"] == "An unexpected KeyError ended the attempt: 'absent'"
    log = job.error["log"]
    assert len(log) == 200
    assert "written past Python?" in log
    assert "line 299" in log
    assert "line 0" not in log
    assert any(line.startswith("Traceback") for line in log)


def test_a_worker_killed_by_a_signal_is_replaced_and_the_job_retried(pool: Any) -> None:
    job_id = pool.submit("crash", times=1)
    pool.start()
    job = pool.ended(job_id)
    assert (job.state, job.attempt, job.failures) == ("succeeded", 2, 1)
    first, second = pool.attempts(job_id)
    assert (first.outcome, second.outcome) == ("lost", "succeeded")
    assert (first.exit["code"], first.exit["signal"]) == (None, signal.SIGKILL)
    assert first.exit["peak_memory"] > 1 * MIB
    assert first.pid != second.pid
    (requeued,) = [event for event in pool.events(job_id) if event.get("reason")]
    assert requeued["reason"]["code"] == "worker_crashed"
    assert "about to crash" in requeued["reason"]["log"]


def test_retries_end_after_three(pool: Any) -> None:
    job_id = pool.submit("crash", times=99, signal=int(signal.SIGSEGV))
    pool.start()
    job = pool.ended(job_id)
    assert (job.state, job.attempt, job.failures) == ("failed", 4, 4)
    assert job.error["code"] == "worker_crashed"
    assert "SIGSEGV" in job.error["detail"]
    assert job.error["exit"]["signal"] == signal.SIGSEGV
    assert len({attempt.pid for attempt in pool.attempts(job_id)}) == 4


def test_an_exit_in_the_middle_of_a_job_keeps_its_code(pool: Any) -> None:
    job_id = pool.submit("exits", code=17)
    pool.start()
    job = pool.ended(job_id)
    assert job.state == "failed"
    assert (job.error["exit"]["code"], job.error["exit"]["signal"]) == (17, None)
    assert "17" in job.error["detail"]


@pytest.mark.parametrize(("cause", "code"), [("disk", "disk_full"), ("blobs", "blob_store_unavailable")])
def test_a_failure_of_the_surroundings_is_retried(pool: Any, cause: str, code: str) -> None:
    job_id = pool.submit("infrastructure", cause=cause)
    pool.start()
    job = pool.ended(job_id)
    assert (job.state, job.attempt, job.failures) == ("succeeded", 2, 1)
    (requeued,) = [event for event in pool.events(job_id) if event.get("reason")]
    assert requeued["reason"]["code"] == code


def test_device_memory_is_retried_once_with_the_hint_in_a_new_process(pool: Any) -> None:
    job_id = pool.submit("device_memory")
    pool.start()
    job = pool.ended(job_id)
    assert (job.state, job.attempt) == ("succeeded", 2)
    assert job.result["report"]["reduce_memory"] is True
    first, second = pool.attempts(job_id)
    assert first.pid != second.pid


def test_device_memory_that_runs_out_again_fails_the_job(pool: Any) -> None:
    job_id = pool.submit("device_memory", always=True)
    pool.start()
    job = pool.ended(job_id)
    assert (job.state, job.attempt, job.error["code"]) == ("failed", 2, "cuda_out_of_memory")


def test_peak_memory_is_that_of_the_attempt(pool: Any) -> None:
    small, big, after, crashing = (
        pool.submit("big_memory", bytes=size * MIB, then=then)
        for size, then in ((1, "fail"), (150, "fail"), (1, "fail"), (300, "crash"))
    )
    pool.start()
    peaks = [pool.ended(job_id).error["exit"]["peak_memory"] for job_id in (small, big, after, crashing)]
    assert len({pool.attempts(job_id)[0].pid for job_id in (small, big, after)}) == 1
    assert peaks[1] - peaks[0] > 100 * MIB
    assert peaks[2] - peaks[0] < 50 * MIB
    assert peaks[3] - peaks[0] > 250 * MIB


def test_a_time_out_ends_the_attempt_and_is_not_retried(pool: Any, exists: Any) -> None:
    job_id = pool.submit("wait_for_gate", resources={"timeout_seconds": 0.3}, gate=str(pool.gate().path))
    pool.start()
    pid = pool.running_pid(job_id)
    job = pool.ended(job_id)
    assert (job.state, job.attempt, job.error["code"]) == ("failed", 1, "job_timeout")
    assert not exists(pid)


def test_a_kind_that_this_version_does_not_know_fails(pool: Any) -> None:
    job_id = pool.submit("nonsense")
    pool.start()
    assert pool.ended(job_id).error["code"] == "unknown_kind"


def test_wake_finds_new_work_at_once(pool: Any, wait_until: Any) -> None:
    supervisor = pool.start(poll_seconds=3600.0)
    wait_until(lambda: supervisor.status()[0]["state"] == "idle", "the worker is ready")
    job_id = pool.submit("succeed")
    supervisor.wake()
    assert pool.ended(job_id).state == "succeeded"


def test_the_server_shows_its_slots(pool: Any, wait_until: Any) -> None:
    job_id = pool.submit("wait_for_gate", gate=str(pool.gate().path))
    pool.start()
    pid = pool.running_pid(job_id)

    def shown() -> Any:
        with pool.database.read() as session:
            rows = servers.list_servers(session, 30)
        return [slot for row in rows for slot in row.slots if slot["job_id"] == job_id]

    (slot,) = wait_until(shown, "the beat shows the job")
    assert (slot["name"], slot["device"], slot["pid"], slot["attempt"]) == ("cpu:0", "cpu", pid, 1)


def test_a_bug_in_a_round_is_logged_and_does_not_end_the_pool(pool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    supervisor = pool.supervisor()
    failures = iter([True, True, False])
    work_waits = supervisor._ledger.work_waits

    def broken() -> bool:
        if next(failures, False):
            raise ZeroDivisionError("a bug")
        return work_waits()

    monkeypatch.setattr(supervisor._ledger, "work_waits", broken)
    job_id = pool.submit("succeed")
    with capture_logs() as logs:
        supervisor.start()
        assert pool.ended(job_id).state == "succeeded"
    assert [entry["event"] for entry in logs].count("supervisor_round_failed") == 2


@pytest.mark.parametrize("nothing_can_be_written", [False, True])
def test_an_end_that_can_not_be_written_keeps_no_slot(
    pool: Any, monkeypatch: pytest.MonkeyPatch, nothing_can_be_written: bool
) -> None:
    supervisor = pool.supervisor(lease_seconds=3.0)
    settle, fail, broken = supervisor._ledger.settle, supervisor._ledger.fail, pool.submit("user_error")

    def only_others(write: Any) -> Any:
        def written(of: Any, *rest: Any, **options: Any) -> Any:
            if (getattr(of, "key", of)) == (broken, 1):
                raise ZeroDivisionError("a bug")
            return write(of, *rest, **options)

        return written

    monkeypatch.setattr(supervisor._ledger, "settle", only_others(settle))
    if nothing_can_be_written:
        monkeypatch.setattr(supervisor._ledger, "fail", only_others(fail))
    other = pool.submit("succeed")
    with capture_logs() as logs:
        supervisor.start()
        assert pool.ended(other).state == "succeeded"
        job = pool.ended(broken)
    assert [entry["event"] for entry in logs].count("attempt_end_not_written") == 1
    if nothing_can_be_written:  # its lease ended: it ran again
        assert (job.attempt, job.failures, job.error["code"]) == (2, 1, "invalid_request")
    else:
        assert (job.attempt, job.error["code"]) == (1, "internal_error")
        assert "ZeroDivisionError" in job.error["detail"]


def test_only_one_supervisor_serves_under_an_id(pool: Any) -> None:
    first = pool.start()
    with pytest.raises(StateConflict, match="srv_test"):
        pool.supervisor().start()
    first.stop()
    pool.start()


def test_a_supervisor_starts_once(pool: Any) -> None:
    supervisor = pool.start()
    with pytest.raises(StateConflict):
        supervisor.start()
    supervisor.stop()
    assert not supervisor.alive


def test_impossible_devices_are_refused_before_anything_starts(pool: Any) -> None:
    with pytest.raises(RequestInvalid):
        pool.supervisor(devices="cuda:77")
