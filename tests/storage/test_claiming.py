"""Which job is next, and on which slots: fairness, limits, several devices, warm slots, clocks that jump."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import delete, func, select, update
from sqlalchemy.orm import Session

from artifacts.errors import QueueFull, QuotaExceeded
from storage import claiming, claims, jobs, keys, outlook, queues
from storage.claims import Claim, Claims, SlotOffer
from storage.database import Database, now
from storage.tables import ApiKeyRow, Base, JobQueueRow, JobRow

ERROR = {"code": "x", "detail": "y"}


def slots(*names: str, host: str = "", warm: Sequence[str] = ()) -> list[SlotOffer]:
    return [SlotOffer(name, host, frozenset(warm)) for name in names]


def claim(database: Database, offers: Sequence[SlotOffer], server: str = "srv", **options: Any) -> Claims:
    with database.write() as session:
        return claims.claim_many(session, server_id=server, boot_id="boot", slots=offers, lease_seconds=60.0, **options)


def submit(database: Database, owner: str | None = None, **options: Any) -> str:
    with database.write() as session:
        return jobs.create_job(session, "merge", {}, created_by=owner, **options).id


def make_key(database: Database, name: str, **limits: int) -> str:
    with database.write() as session:
        row, _ = keys.create_key(session, name, ["jobs"])
        for column, value in limits.items():
            setattr(row, column, value)
        return row.id


def age(database: Database, job_id: str, seconds: float) -> None:
    """Let the job have waited that long."""
    with database.write() as session:
        job = jobs.get_job(session, job_id)
        job.created_at = job.available_at = now(session) - timedelta(seconds=seconds)


def end(database: Database, found: Claim) -> None:
    with database.write() as session:
        claims.finish_succeeded(session, found.job_id, found.attempt, {"adapters": [], "images": [], "report": {}})


def counted(session: Session) -> dict[tuple[str, int], tuple[int, int]]:
    """The counters as they are, without those that are all zero."""
    return {
        (row.owner, row.devices): (row.queued, row.running)
        for row in session.scalars(select(JobQueueRow))
        if row.queued or row.running
    }


def recounted(session: Session) -> dict[tuple[str, int], tuple[int, int]]:
    """The counters as they should be."""
    found: Counter[tuple[str, int, str]] = Counter()
    for owner, devices, state, number in session.execute(
        select(JobRow.owner, JobRow.devices, JobRow.state, func.count()).group_by(
            JobRow.owner, JobRow.devices, JobRow.state
        )
    ):
        if state in ("queued", "running", "cancelling"):
            found[owner, devices, "queued" if state == "queued" else "running"] += number
    keys_ = {(owner, devices) for owner, devices, _ in found}
    return {(o, d): (found[o, d, "queued"], found[o, d, "running"]) for o, d in keys_}


def test_many_slots_get_many_jobs_in_one_transaction(database: Database) -> None:
    made = [submit(database) for _ in range(3)]
    found = claim(database, slots("a", "b", "c", "d")).claims
    assert [item.job_id for item in found] == made
    assert sorted(item.slots for item in found) == [("a",), ("b",), ("c",)]
    assert claim(database, slots("d")).claims == ()


def test_owners_take_turns_whatever_the_number_of_their_jobs(database: Database) -> None:
    greedy, modest, late = (make_key(database, name) for name in ("greedy", "modest", "late"))
    for owner in [greedy] * 20 + [modest] * 4 + [late] * 4:
        submit(database, owner)
    order = []
    for _ in range(12):
        (found,) = claim(database, slots("a")).claims
        with database.read() as session:
            order.append(jobs.get_job(session, found.job_id).owner)
        end(database, found)
    assert Counter(order[:3]) == Counter(order[3:6]) == Counter([greedy, modest, late])
    assert Counter(order) == {greedy: 4, modest: 4, late: 4}


def test_who_holds_the_fewest_devices_is_next(database: Database) -> None:
    first, second = make_key(database, "first"), make_key(database, "second")
    for _ in range(5):
        submit(database, first)
    assert len(claim(database, slots("a", "b", "c")).claims) == 3
    for _ in range(3):
        submit(database, second)
    found = claim(database, slots("d", "e", "f")).claims
    with database.read() as session:
        assert [jobs.get_job(session, item.job_id).owner for item in found] == [second] * 3


def test_a_key_never_holds_more_devices_than_it_may(database: Database) -> None:
    limited, free = make_key(database, "limited", max_running=2), make_key(database, "free")
    first, *_ = [submit(database, limited) for _ in range(4)]
    submit(database, free)
    found = claim(database, slots("a", "b", "c", "d", "e")).claims
    with database.read() as session:
        owners = Counter(jobs.get_job(session, item.job_id).owner for item in found)
    assert owners == {limited: 2, free: 1}
    assert claim(database, slots("d", "e")).claims == ()
    ended = next(item for item in found if item.job_id == first)
    end(database, ended)
    assert len(claim(database, slots("d", "e")).claims) == 1


def test_too_many_waiting_jobs_are_refused_with_the_time_to_come_back(database: Database) -> None:
    limited = make_key(database, "limited", max_queued=2)
    submit(database, limited)
    submit(database, limited)
    with pytest.raises(QuotaExceeded, match="2 jobs of the API key 'limited' are waiting") as caught:
        submit(database, limited)
    assert caught.value.retry_after == jobs.RETRY_SECONDS
    with pytest.raises(QueueFull) as full:
        submit(database, max_queued=2)
    assert full.value.retry_after == jobs.RETRY_SECONDS
    with database.read() as session:
        assert counted(session) == recounted(session) == {(limited, 1): (2, 0)}


def test_a_job_for_two_devices_gets_two_slots_of_one_host(database: Database) -> None:
    job_id = submit(database, resources={"devices": 2})
    assert claim(database, slots("a", host="x") + slots("b", host="y"), capacity={"x": 2, "y": 2}).claims == ()
    (found,) = claim(database, slots("a", host="x") + slots("b", "c", host="y")).claims
    assert (found.job_id, found.devices, found.slots) == (job_id, 2, ("b", "c"))
    with database.read() as session:
        assert jobs.get_job(session, job_id).slot == "b +1"
        assert counted(session) == {("anonymous", 2): (0, 1)}


def test_small_jobs_pass_a_large_one_only_for_a_while(database: Database) -> None:
    large = submit(database, resources={"devices": 2})
    small = [submit(database) for _ in range(3)]
    both = {"": 2}
    assert [item.job_id for item in claim(database, slots("a"), capacity=both).claims] == small[:1]
    age(database, large, claiming.PATIENCE_SECONDS + 1)
    waiting = claim(database, slots("b"), capacity=both)
    assert (waiting.claims, waiting.hold) == ((), large)
    again = claim(database, slots("b"), capacity=both, hold=large)
    assert (again.claims, again.hold) == ((), large)
    served = claim(database, slots("a", "b"), capacity=both, hold=large)
    assert [item.job_id for item in served.claims] == [large]
    assert served.hold is None


def test_one_server_alone_keeps_slots_free_and_any_server_may_run_it(database: Database) -> None:
    large = submit(database, resources={"devices": 2})
    small = [submit(database) for _ in range(2)]
    age(database, large, claiming.PATIENCE_SECONDS + 1)
    assert claim(database, slots("a"), "first", capacity={"": 2}).hold == large
    other = claim(database, slots("a"), "second", capacity={"": 2})
    assert (other.hold, [item.job_id for item in other.claims]) == (None, small[:1])
    found = claim(database, slots("a", "b"), "third", capacity={"": 2})
    assert [item.job_id for item in found.claims] == [large]
    after = claim(database, slots("a"), "first", capacity={"": 2}, hold=large)
    assert [item.job_id for item in after.claims] == small[1:]


def test_a_job_that_no_server_could_hold_blocks_nobody(database: Database) -> None:
    large = submit(database, resources={"devices": 8})
    small = submit(database)
    age(database, large, 3600)
    found = claim(database, slots("a"), capacity={"": 2})
    assert ([item.job_id for item in found.claims], found.hold) == ([small], None)


def test_a_job_goes_to_a_slot_that_has_its_base_model(database: Database) -> None:
    submit(database, affinity="mdl_1")
    offers = slots("a", warm=["mdl_2"]) + slots("b", warm=["mdl_1"]) + slots("c")
    assert claim(database, offers).claims[0].slots == ("b",)


def test_a_cold_job_leaves_the_warm_slots_alone(database: Database) -> None:
    submit(database, affinity="mdl_9")
    assert claim(database, slots("a", warm=["mdl_2"]) + slots("b")).claims[0].slots == ("b",)


def test_a_warm_job_may_pass_but_never_for_long(database: Database) -> None:
    cold = submit(database, affinity="mdl_2")
    warm = submit(database, affinity="mdl_1")
    last = submit(database, affinity="mdl_1")
    offer = slots("a", warm=["mdl_1"])
    (found,) = claim(database, offer).claims
    assert found.job_id == warm
    end(database, found)
    age(database, cold, claiming.WARM_PATIENCE_SECONDS + 1)
    (found,) = claim(database, offer).claims
    assert found.job_id == cold
    end(database, found)
    assert claim(database, offer).claims[0].job_id == last


def test_a_job_that_was_due_before_the_clock_went_back_does_not_wait_for_it(database: Database) -> None:
    job_id = submit(database)
    with database.write() as session:
        session.execute(update(JobRow).values(available_at=now(session) + timedelta(hours=5)))
    assert claim(database, slots("a")).claims[0].job_id == job_id


def test_a_lease_from_before_the_clock_went_back_ends(database: Database) -> None:
    job_id = submit(database)
    claim(database, slots("a"))
    with database.write() as session:
        session.execute(update(JobRow).values(lease_expires_at=now(session) + timedelta(hours=5)))
    with database.write() as session:
        assert claims.expire_leases(session) == 1
        assert jobs.get_job(session, job_id).state == "queued"


def test_a_job_that_kills_its_server_again_and_again_fails(database: Database) -> None:
    job_id = submit(database)
    for boot in range(claims.MAX_RESTARTS + 1):
        assert claim(database, slots("a")).claims[0].attempt == boot + 1
        with database.write() as session:
            assert claims.release_previous_boots(session, "srv", f"boot {boot}") == 1
    with database.read() as session:
        job = jobs.get_job(session, job_id)
        assert (job.state, job.failures) == ("failed", 0)
        assert job.error is not None
        assert job.error["code"] == "server_killed"
        assert counted(session) == {}


def test_servers_that_stop_in_order_are_not_held_against_a_job(database: Database) -> None:
    job_id = submit(database)
    for _ in range(claims.MAX_RESTARTS + 2):
        assert claim(database, slots("a")).claims[0].job_id == job_id
        with database.write() as session:
            claims.release_previous_boots(session, "srv", "", graceful=True)
    with database.read() as session:
        assert jobs.get_job(session, job_id).state == "queued"


def test_positions_follow_the_turns(database: Database) -> None:
    first, second = make_key(database, "first"), make_key(database, "second")
    mine = [submit(database, first) for _ in range(3)]
    submit(database, second)
    with database.read() as session:
        positions = [outlook.position_of(session, jobs.get_job(session, job_id)) for job_id in mine]
    assert positions == [2, 3, 4]


ACTIONS = ["submit", "submit_two", "claim", "finish", "fail", "requeue", "cancel", "release", "expire", "retry"]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 5)), max_size=25))
def test_the_counters_are_always_what_a_count_would_give(database: Database, steps: list[tuple[str, int]]) -> None:
    with database.write() as session:
        for table in reversed(Base.metadata.sorted_tables):
            session.execute(delete(table))
        session.add_all(
            ApiKeyRow(id=f"key_{n}", name=str(n), prefix=str(n), sha256="0", scopes=[], created_at=now(session))
            for n in range(2)
        )
    for action, number in steps:
        with database.write() as session:
            _ACT[action](session, number)
        with database.read() as session:
            assert counted(session) == recounted(session)
            assert queues.waiting_in_all(session) == sum(queued for queued, _ in counted(session).values())
            running = {job.id: job.devices for job in session.scalars(select(JobRow).where(JobRow.state == "running"))}
            held = sum(queues.running_devices_of(session, owner) for owner in ("key_0", "key_1"))
            cancelling = session.scalars(select(JobRow).where(JobRow.state == "cancelling"))
            assert held == sum(running.values()) + sum(job.devices for job in cancelling)


def _pick(session: Session, number: int, *states: str) -> JobRow | None:
    found = session.scalars(select(JobRow).where(JobRow.state.in_(states)).order_by(JobRow.id)).all()
    return found[number % len(found)] if found else None


def _settle(write: Callable[[Session, JobRow], object], *states: str) -> Callable[[Session, int], None]:
    def act(session: Session, number: int) -> None:
        job = _pick(session, number, *states)
        if job is not None:
            write(session, job)

    return act


def _submit(devices: int) -> Callable[[Session, int], None]:
    def act(session: Session, number: int) -> None:
        jobs.create_job(session, "merge", {}, created_by=f"key_{number % 2}", resources={"devices": devices})

    return act


def _claim(session: Session, number: int) -> None:
    offers = slots(*[f"s{index}" for index in range(1 + number)])
    claims.claim_many(session, server_id="srv", boot_id="boot", slots=offers, lease_seconds=-1.0)


_ACT: dict[str, Callable[[Session, int], None]] = {
    "submit": _submit(1),
    "submit_two": _submit(2),
    "claim": _claim,
    "finish": _settle(
        lambda session, job: claims.finish_succeeded(
            session, job.id, job.attempt, {"adapters": [], "images": [], "report": {}}
        ),
        "running",
    ),
    "fail": _settle(lambda session, job: claims.finish_failed(session, job.id, job.attempt, ERROR), "running"),
    "requeue": _settle(
        lambda session, job: claims.requeue(session, job.id, job.attempt, delay_seconds=0, error=ERROR, exit=None),
        "running",
        "cancelling",
    ),
    "cancel": _settle(lambda session, job: jobs.request_cancel(session, job.id), "queued", "running"),
    "release": lambda session, number: claims.release_previous_boots(session, "srv", f"other {number}") and None,
    "expire": lambda session, _: claims.expire_leases(session) and None,
    "retry": _settle(
        lambda session, job: jobs.retry_job(session, job.id, created_by=job.created_by), "failed", "cancelled"
    ),
}
