from __future__ import annotations

import pytest
from sqlalchemy import select

from artifacts.errors import NotFound, QueueFull, RequestInvalid, StateConflict
from storage import claims, jobs, outlook
from storage.database import Database
from storage.ids import is_id
from storage.jobs import JobFilter
from storage.tables import JobEventRow, JobRow


def create(database: Database, kind: str = "merge", **options: object) -> JobRow:
    with database.write() as session:
        return jobs.create_job(session, kind, {"n": 1}, **options)  # type: ignore[arg-type]


def claim(database: Database) -> claims.Claim:
    with database.write() as session:
        claimed = claims.claim_next(session, server_id="srv", boot_id="boot", slot="cpu:0", lease_seconds=60)
    assert claimed is not None
    return claimed


def test_a_new_job_is_queued_with_its_first_event(database: Database) -> None:
    job = create(database, resources={"gpus": 1}, priority=3, request_id="req-1")
    with database.read() as session:
        row = jobs.get_job(session, job.id)
        events = jobs.events_after(session, job.id, 0)
    assert is_id(row.id, "job")
    assert (row.state, row.attempt, row.params, row.resources, row.priority) == ("queued", 0, {"n": 1}, {"gpus": 1}, 3)
    assert (row.request_id, row.result, row.error, row.started_at, row.finished_at) == ("req-1", None, None, None, None)
    assert [(event.sequence, event.type, event.data["state"]) for event in events] == [(1, "state", "queued")]


def test_the_job_and_its_first_event_are_one_transaction(database: Database) -> None:
    with pytest.raises(RuntimeError), database.write() as session:
        jobs.create_job(session, "merge", {})
        raise RuntimeError("the request failed afterwards")
    with database.read() as session:
        assert session.scalars(select(JobRow)).all() == []
        assert session.scalars(select(JobEventRow)).all() == []


def test_a_full_queue_takes_no_more(database: Database) -> None:
    first = create(database, max_queued=2)
    create(database, max_queued=2)
    with pytest.raises(QueueFull, match="2 jobs are waiting"):
        create(database, max_queued=2)
    with database.write() as session:
        jobs.request_cancel(session, first.id)
    create(database, max_queued=2)


@pytest.mark.parametrize("job_id", ["job_none", "", "a\x00b", "\ud800", "x" * 5000])
def test_an_unknown_job_is_not_found(database: Database, job_id: str) -> None:
    with database.write() as session:
        for call in (jobs.get_job, jobs.request_cancel, jobs.retry_job):
            with pytest.raises(NotFound):
                call(session, job_id)
        assert jobs.events_after(session, job_id, 0) == []


def test_lists_are_newest_first_and_filtered(database: Database) -> None:
    merges = [create(database).id for _ in range(3)]
    train = create(database, "train").id
    with database.write() as session:
        jobs.request_cancel(session, merges[1])
    with database.read() as session:
        assert [job.id for job in jobs.list_jobs(session).items] == [train, *reversed(merges)]
        assert [job.id for job in jobs.list_jobs(session, JobFilter(kind="train")).items] == [train]
        found = jobs.list_jobs(session, JobFilter(kind="merge", state="queued")).items
        assert [job.id for job in found] == [merges[2], merges[0]]
        with pytest.raises(RequestInvalid, match="must be one of queued, running"):
            jobs.list_jobs(session, JobFilter(state="lost"))
        with pytest.raises(RequestInvalid):
            jobs.list_jobs(session, JobFilter(kind="a\x00"))


def test_a_queued_job_is_cancelled_at_once_and_never_claimed(database: Database) -> None:
    job = create(database)
    with database.write() as session:
        row = jobs.request_cancel(session, job.id)
    assert (row.state, row.cancel_requested) == ("cancelled", True)
    assert row.finished_at is not None
    with database.write() as session:
        assert claims.claim_next(session, server_id="s", boot_id="b", slot="c", lease_seconds=1) is None
        with pytest.raises(StateConflict, match="has ended as cancelled"):
            jobs.request_cancel(session, job.id)


def test_a_running_job_is_cancelling_until_its_process_is_gone(database: Database) -> None:
    job = create(database)
    claim(database)
    for _ in range(2):  # asking again changes nothing
        with database.write() as session:
            assert jobs.request_cancel(session, job.id).state == "cancelling"
    with database.read() as session:
        states = [event.data["state"] for event in jobs.events_after(session, job.id, 0)]
    assert states == ["queued", "running", "cancelling"]


def test_a_failed_job_is_retried_as_a_new_one(database: Database) -> None:
    job = create(database, priority=2, resources={"gpus": 0})
    claimed = claim(database)
    with database.write() as session, pytest.raises(StateConflict, match="is running"):
        jobs.retry_job(session, job.id)
    with database.write() as session:
        claims.finish_failed(session, job.id, claimed.attempt, {"code": "x", "detail": "y"})
    with database.write() as session:
        again = jobs.retry_job(session, job.id, request_id="req-2")
    assert again.id != job.id
    assert (again.retry_of, again.kind, again.params, again.priority) == (job.id, "merge", {"n": 1}, 2)
    assert (again.state, again.attempt, again.failures, again.request_id) == ("queued", 0, 0, "req-2")
    with database.write() as session, pytest.raises(StateConflict, match="is queued"):
        jobs.retry_job(session, again.id)


def test_a_succeeded_job_is_not_retried(database: Database) -> None:
    job = create(database)
    with database.write() as session:
        claims.finish_succeeded(session, job.id, claim_inside(session), {"adapters": []})
    with database.write() as session, pytest.raises(StateConflict):
        jobs.retry_job(session, job.id)


def claim_inside(session: object) -> int:
    claimed = claims.claim_next(session, server_id="s", boot_id="b", slot="c", lease_seconds=60)  # type: ignore[arg-type]
    assert claimed is not None
    return claimed.attempt


def test_events_come_after_a_sequence_number_and_up_to_a_limit(database: Database) -> None:
    job = create(database)
    claimed = claim(database)
    for step in range(5):
        with database.write() as session:
            claims.record_progress(session, job.id, claimed.attempt, fraction=step / 5, message="m", step=step, total=5)
    with database.read() as session:
        assert [event.sequence for event in jobs.events_after(session, job.id, 4)] == [5, 6, 7]
        assert [event.sequence for event in jobs.events_after(session, job.id, 0, limit=3)] == [1, 2, 3]
        assert jobs.events_after(session, job.id, 10**30) == []
        assert len(jobs.events_after(session, job.id, -1)) == 7
        event = jobs.events_after(session, job.id, 6)[0]
    assert event.type == "progress"
    assert event.data == {"fraction": 0.8, "step": 4, "total": 5, "message": "m", "attempt": 1}


def test_positions_follow_priority_then_age(database: Database) -> None:
    first, second = create(database), create(database)
    urgent = create(database, priority=5)
    with database.read() as session:
        assert [outlook.position_of(session, row) for row in (urgent, first, second)] == [1, 2, 3]
    assert claim(database).job_id == urgent.id
    with database.read() as session:
        assert outlook.position_of(session, jobs.get_job(session, urgent.id)) is None
        assert outlook.position_of(session, first) == 1
