from __future__ import annotations

import threading
from datetime import timedelta

import pytest
from sqlalchemy import select

from artifacts.errors import Conflict, IdempotencyInFlight, IdempotencyKeyReused, RequestInvalid
from storage import idempotency, jobs
from storage.database import Database, now
from storage.idempotency import StoredAnswer
from storage.tables import IdempotencyRow, JobRow

DIGEST, OTHER = "a" * 64, "b" * 64
ANSWER = StoredAnswer(202, {"Location": "/jobs/1"}, '{"id":"job_1"}')


def begin(database: Database, digest: str = DIGEST, owner: str = "anonymous", key: str = "k") -> StoredAnswer | None:
    with database.write() as session:
        return idempotency.begin(session, owner, key, digest)


def complete(database: Database) -> None:
    with database.write() as session:
        idempotency.complete(session, "anonymous", "k", ANSWER.status, ANSWER.headers, ANSWER.body)


def make_stale(database: Database, age: timedelta) -> None:
    with database.write() as session:
        for row in session.scalars(select(IdempotencyRow)):
            row.created_at = now(session) - age


def test_the_first_request_is_served_and_repetitions_get_its_answer(database: Database) -> None:
    assert begin(database) is None
    complete(database)
    assert begin(database) == ANSWER
    assert begin(database) == ANSWER


def test_another_body_under_the_key_is_refused_before_and_after_the_answer(database: Database) -> None:
    begin(database)
    with pytest.raises(IdempotencyKeyReused):
        begin(database, OTHER)
    complete(database)
    with pytest.raises(IdempotencyKeyReused):
        begin(database, OTHER)


def test_a_repetition_while_the_first_runs_is_turned_away(database: Database) -> None:
    begin(database)
    with pytest.raises(IdempotencyInFlight):
        begin(database)


def test_keys_belong_to_their_owner(database: Database) -> None:
    assert begin(database) is None
    assert begin(database, OTHER, owner="key_2") is None
    assert begin(database, OTHER, key="k2") is None


def test_a_first_request_that_died_is_given_up_after_ten_minutes(database: Database) -> None:
    begin(database)
    make_stale(database, timedelta(minutes=9))
    with pytest.raises(IdempotencyInFlight):
        begin(database)
    make_stale(database, timedelta(minutes=11))
    with pytest.raises(IdempotencyKeyReused):
        begin(database, OTHER)
    assert begin(database) is None
    with pytest.raises(IdempotencyInFlight):  # the new one has its ten minutes again
        begin(database)


def test_a_request_that_was_given_up_can_not_answer_after_the_one_that_took_over(database: Database) -> None:
    begin(database)
    make_stale(database, timedelta(minutes=11))
    begin(database)
    complete(database)
    with pytest.raises(Conflict), database.write() as session:
        jobs.create_job(session, "merge", {})
        idempotency.complete(session, "anonymous", "k", 202, {}, "late")
    with database.read() as session:
        assert session.scalars(select(JobRow)).all() == []
    assert begin(database) == ANSWER


def test_an_abandoned_key_is_free_but_an_answer_is_not_forgotten(database: Database) -> None:
    begin(database)
    with database.write() as session:
        idempotency.abandon(session, "anonymous", "k")
    assert begin(database, OTHER) is None
    with database.write() as session:
        idempotency.complete(session, "anonymous", "k", 200, {}, "x")
        idempotency.abandon(session, "anonymous", "k")
    assert begin(database, OTHER) == StoredAnswer(200, {}, "x")


def test_key_job_and_answer_are_one_transaction(database: Database) -> None:
    with pytest.raises(RuntimeError), database.write() as session:
        idempotency.begin(session, "anonymous", "k", DIGEST)
        jobs.create_job(session, "merge", {})
        raise RuntimeError("killed here")
    assert begin(database) is None


def test_requests_at_once_are_served_once(database: Database) -> None:
    gate = threading.Barrier(4)
    served: list[str] = []

    def work() -> None:
        gate.wait()
        try:
            with database.write() as session:
                answer = idempotency.begin(session, "anonymous", "k", DIGEST)
                if answer is None:
                    idempotency.complete(session, "anonymous", "k", 202, {}, jobs.create_job(session, "merge", {}).id)
            served.append("served" if answer is None else answer.body)
        except IdempotencyInFlight:
            served.append("in flight")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with database.read() as session:
        job = session.scalars(select(JobRow)).one()
    assert sorted(served) == sorted(["served", job.id, job.id, job.id])


def test_old_keys_are_forgotten(database: Database) -> None:
    begin(database)
    complete(database)
    make_stale(database, timedelta(days=8))
    begin(database, key="recent")
    with database.write() as session:
        assert idempotency.forget(session) == 1
    assert begin(database) is None


@pytest.mark.parametrize("key", ["x" * 256, "a\x00b"])
def test_keys_that_can_not_be_stored_are_refused(database: Database, key: str) -> None:
    with pytest.raises(RequestInvalid):
        begin(database, key=key)
