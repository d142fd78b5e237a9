"""Several claimers at once, as threads of one process and as processes, on both databases."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from multiprocessing.queues import SimpleQueue

import pytest
from sqlalchemy import select

from artifacts.errors import AttemptCancelled, AttemptStale, StateConflict
from storage import claims, jobs
from storage.database import Database
from storage.tables import JobAttemptRow, JobEventRow, JobRow

JOBS = 120
CLAIMERS = 4


def fill(database: Database, number: int = JOBS) -> list[str]:
    with database.write() as session:
        return [jobs.create_job(session, "merge", {"n": n}).id for n in range(number)]


def claim_all(database: Database, name: str) -> list[str]:
    """Claim until nothing is left, and finish each job."""
    mine: list[str] = []
    while True:
        with database.write() as session:
            claimed = claims.claim_next(session, server_id=name, boot_id=name, slot="cpu:0", lease_seconds=600)
        if claimed is None:
            return mine
        with database.write() as session:
            claims.finish_succeeded(session, claimed.job_id, claimed.attempt, {"by": name})
        mine.append(claimed.job_id)


def _claim_in_process(url: str, name: str, answers: SimpleQueue[list[str]]) -> None:
    database = Database(url)
    answers.put(claim_all(database, name))
    database.dispose()


def assert_each_was_run_once(database: Database, made: list[str], taken: list[list[str]]) -> None:
    counts = Counter(job_id for mine in taken for job_id in mine)
    assert counts == Counter(made)
    with database.read() as session:
        rows = session.scalars(select(JobRow)).all()
        attempts = session.scalars(select(JobAttemptRow)).all()
        events = session.execute(
            select(JobEventRow.job_id, JobEventRow.sequence).order_by(JobEventRow.job_id, JobEventRow.sequence)
        ).all()
    owner = {job_id: f"claimer-{number}" for number, mine in enumerate(taken) for job_id in mine}
    assert {row.id: (row.state, row.attempt, row.result) for row in rows} == {
        job_id: ("succeeded", 1, {"by": owner[job_id]}) for job_id in made
    }
    assert len(attempts) == len(made)
    sequences: dict[str, list[int]] = {}
    for job_id, sequence in events:
        sequences.setdefault(job_id, []).append(sequence)
    assert all(numbers == [1, 2, 3] for numbers in sequences.values())


def test_threads_claim_each_job_once(database: Database) -> None:
    made = fill(database)
    taken: list[list[str]] = [[] for _ in range(CLAIMERS)]

    def work(number: int) -> None:
        taken[number] = claim_all(database, f"claimer-{number}")

    run_threads([lambda number=number: work(number) for number in range(CLAIMERS)])
    assert_each_was_run_once(database, made, taken)


def test_processes_claim_each_job_once(database: Database, processes: ForkServerContext) -> None:
    made = fill(database)
    url = database.url.render_as_string(hide_password=False)
    queues = [processes.SimpleQueue() for _ in range(CLAIMERS)]
    children = [
        processes.Process(target=_claim_in_process, args=(url, f"claimer-{number}", queue))
        for number, queue in enumerate(queues)
    ]
    for child in children:
        child.start()
    taken = [queue.get() for queue in queues]
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * CLAIMERS
    assert_each_was_run_once(database, made, taken)


def test_many_take_a_job_back_and_one_does(database: Database) -> None:
    """Leases that expire are taken back once, however many servers look."""
    fill(database, 20)
    with database.write() as session:
        for _ in range(20):
            claims.claim_next(session, server_id="dead", boot_id="b", slot="c", lease_seconds=-1)
    taken: list[int] = []

    def work() -> None:
        with database.write() as session:
            taken.append(claims.expire_leases(session))

    run_threads([work] * CLAIMERS)
    assert sum(taken) == 20
    with database.read() as session:
        assert {(row.state, row.failures) for row in session.scalars(select(JobRow))} == {("queued", 1)}


@pytest.mark.parametrize("round_", range(5))
def test_cancel_and_success_at_once_have_one_winner(database: Database, round_: int) -> None:
    (job_id,) = fill(database, 1)
    with database.write() as session:
        claims.claim_next(session, server_id="s", boot_id="b", slot="c", lease_seconds=60)
    outcomes: dict[str, str] = {}
    gate = threading.Barrier(2)

    def cancel() -> None:
        gate.wait()
        try:
            with database.write() as session:
                outcomes["cancel"] = jobs.request_cancel(session, job_id).state
        except StateConflict:
            outcomes["cancel"] = "too late"

    def publish() -> None:
        gate.wait()
        try:
            with database.write() as session:
                claims.fence(session, job_id, 1)
                claims.finish_succeeded(session, job_id, 1, {"adapters": ["adp_1"]})
            outcomes["publish"] = "succeeded"
        except AttemptCancelled:
            outcomes["publish"] = "told to stop"

    run_threads([cancel, publish])
    with database.read() as session:
        job = jobs.get_job(session, job_id)
    if outcomes["publish"] == "succeeded":
        assert (outcomes["cancel"], job.state, job.result) == ("too late", "succeeded", {"adapters": ["adp_1"]})
    else:
        assert (outcomes["cancel"], job.state, job.result) == ("cancelling", "cancelling", None)


def test_an_old_and_a_new_attempt_publish_at_once_and_the_new_one_wins(database: Database) -> None:
    (job_id,) = fill(database, 1)
    with database.write() as session:
        claims.claim_next(session, server_id="old", boot_id="b", slot="c", lease_seconds=-1)
        claims.expire_leases(session)
        claims.claim_next(session, server_id="new", boot_id="b", slot="c", lease_seconds=60)
    outcomes: dict[int, str] = {}
    gate = threading.Barrier(2)

    def publish(attempt: int) -> None:
        gate.wait()
        try:
            with database.write() as session:
                claims.finish_succeeded(session, job_id, attempt, {"by": attempt})
            outcomes[attempt] = "published"
        except AttemptStale:
            outcomes[attempt] = "stale"

    run_threads([lambda: publish(1), lambda: publish(2)])
    assert outcomes == {1: "stale", 2: "published"}
    with database.read() as session:
        assert jobs.get_job(session, job_id).result == {"by": 2}


def test_events_written_at_once_are_numbered_without_gaps(database: Database) -> None:
    """Progress, renewals and a cancel of one job at the same time; a reader never sees a gap."""
    (job_id,) = fill(database, 1)
    with database.write() as session:
        claims.claim_next(session, server_id="s", boot_id="b", slot="c", lease_seconds=60)
    done = threading.Event()
    gaps: list[list[int]] = []

    def progress() -> None:
        for step in range(25):
            try:
                with database.write() as session:
                    claims.record_progress(session, job_id, 1, fraction=step / 25, message="m")
            except AttemptCancelled:
                return

    def renew() -> None:
        for _ in range(10):
            with database.write() as session:
                claims.renew(session, [(job_id, 1)], 60)

    def cancel() -> None:
        with database.write() as session:
            jobs.request_cancel(session, job_id)

    def read() -> None:
        while not done.is_set():
            with database.read() as session:
                seen = [event.sequence for event in jobs.events_after(session, job_id, 0)]
            if seen != list(range(1, len(seen) + 1)):
                gaps.append(seen)

    reader = threading.Thread(target=read)
    reader.start()
    run_threads([progress, progress, renew, cancel])
    done.set()
    reader.join()
    assert gaps == []
    with database.read() as session:
        job, events = jobs.get_job(session, job_id), jobs.events_after(session, job_id, 0)
    assert [event.sequence for event in events] == list(range(1, job.last_event + 1))
    assert job.state == "cancelling"


def run_threads(functions: list[Callable[[], None]]) -> None:
    """Run all at once; the first error of any is raised."""
    errors: list[BaseException] = []

    def guarded(function: Callable[[], None]) -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
