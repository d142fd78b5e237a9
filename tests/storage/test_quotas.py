from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from artifacts.errors import NotFound, QuotaExceeded, RequestInvalid
from artifacts.manifest import AdapterManifest
from storage import adapters, jobs, keys, quotas
from storage.database import Database, now
from storage.keys import KeyLimits
from storage.quotas import KeyUse
from storage.tables import ApiKeyRow, JobRow
from storage.transitions import change_state

Make = Callable[..., AdapterManifest]


def create(database: Database, limits: KeyLimits | None = None) -> str:
    with database.write() as session:
        return keys.create_key(session, "ci", ["write"], limits=limits)[0].id


def key(database: Database, key_id: str) -> ApiKeyRow:
    with database.read() as session:
        return session.get_one(ApiKeyRow, key_id)


def add(database: Database, manifest: AdapterManifest, key_id: str | None) -> str:
    with database.write() as session:
        return adapters.add_adapter(session, manifest, name="a", created_by=key_id)[0].id


def test_limits_are_set_one_by_one_and_taken_away(database: Database) -> None:
    key_id = create(database, KeyLimits(max_queued=5, max_bytes=100))
    with database.write() as session:
        keys.set_limits(session, key_id, {"max_running": 2, "max_bytes": None})
    row = key(database, key_id)
    assert (row.max_queued, row.max_running, row.max_bytes, row.stored_bytes) == (5, 2, None, 0)
    with database.write() as session:
        keys.set_limits(session, key_id, {})
    assert key(database, key_id).max_queued == 5


@pytest.mark.parametrize(
    "limits",
    [{"max_queued": -1}, {"max_running": 0}, {"max_running": 2**31}, {"max_bytes": -1}, {"max_bytes": 2**63}],
)
def test_limits_that_make_no_sense(database: Database, limits: dict[str, int]) -> None:
    with pytest.raises(RequestInvalid) as raised:
        create(database, KeyLimits(**limits))
    assert raised.value.errors[0].pointer == f"/{next(iter(limits))}"
    key_id = create(database)
    with pytest.raises(RequestInvalid), database.write() as session:
        keys.set_limits(session, key_id, limits)
    with pytest.raises(NotFound), database.write() as session:
        keys.set_limits(session, "key_0", {"max_queued": 1})


def test_adapters_are_counted_for_who_made_them(database: Database, make_manifest: Make) -> None:
    first, second = create(database), create(database)
    manifest = make_manifest("a")
    adapter = add(database, manifest, first)
    assert add(database, manifest, second) == adapter
    assert (key(database, first).stored_bytes, key(database, second).stored_bytes) == (manifest.size, 0)
    add(database, make_manifest("b"), None)
    with database.write() as session:
        adapters.delete_adapter(session, adapter)
    assert key(database, first).stored_bytes == 0
    with pytest.raises(NotFound), database.write() as session:
        adapters.delete_adapter(session, adapter)
    assert key(database, first).stored_bytes == 0


def test_what_does_not_fit_leaves_nothing(database: Database, make_manifest: Make) -> None:
    size = make_manifest("a").size
    key_id = create(database, KeyLimits(max_bytes=2 * size - 1))
    add(database, make_manifest("a"), key_id)
    with pytest.raises(QuotaExceeded) as raised:
        add(database, make_manifest("b"), key_id)
    assert raised.value.retry_after is not None
    assert f"{size - 1} are free" in raised.value.detail
    assert key(database, key_id).stored_bytes == size
    with database.read() as session:
        assert len(adapters.list_adapters(session).items) == 1
    with database.write() as session:
        keys.set_limits(session, key_id, {"max_bytes": 2 * size})
    add(database, make_manifest("b"), key_id)
    with database.write() as session:
        keys.set_limits(session, key_id, {"max_bytes": 1})
    with pytest.raises(QuotaExceeded, match="0 are free"):
        add(database, make_manifest("c"), key_id)


def test_uploads_at_once_do_not_pass_the_limit_together(database: Database, make_manifest: Make) -> None:
    size = make_manifest("0").size
    key_id = create(database, KeyLimits(max_bytes=3 * size))
    start = threading.Barrier(6)

    def work(number: int) -> bool:
        start.wait(20)
        try:
            add(database, make_manifest(str(number)), key_id)
        except QuotaExceeded:
            return False
        return True

    with ThreadPoolExecutor(6) as pool:
        fitted = [pool.submit(work, number) for number in range(6)]
        assert sum(item.result(60) for item in fitted) == 3
    assert key(database, key_id).stored_bytes == 3 * size


def test_deletes_at_once_give_back_once(database: Database, make_manifest: Make) -> None:
    key_id = create(database)
    adapter = add(database, make_manifest("a"), key_id)
    add(database, make_manifest("b"), key_id)
    start = threading.Barrier(4)

    def work() -> bool:
        start.wait(20)
        try:
            with database.write() as session:
                adapters.delete_adapter(session, adapter)
        except NotFound:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert sum(item.result(60) for item in [pool.submit(work) for _ in range(4)]) == 1
    assert key(database, key_id).stored_bytes == make_manifest("b").size


def test_a_job_that_its_key_could_never_run_is_refused(database: Database) -> None:
    key_id = create(database, KeyLimits(max_running=2))
    with database.write() as session:
        jobs.create_job(session, "train", {}, created_by=key_id, resources={"devices": 2})
    with pytest.raises(RequestInvalid) as raised, database.write() as session:
        jobs.create_job(session, "train", {}, created_by=key_id, resources={"devices": 3})
    assert raised.value.errors[0].pointer == "/resources/devices"
    with database.read() as session:
        assert quotas.key_uses(session)[key_id].queued == 1


def test_uses_are_the_counters_of_the_queue(database: Database) -> None:
    key_id = create(database)

    def start_one(job: JobRow) -> None:
        with database.write() as session:
            row = session.get_one(JobRow, job.id)
            change_state(session, row, "running", now(session))

    with database.write() as session:
        made = [
            jobs.create_job(session, "train", {}, created_by=key_id, resources={"devices": devices})
            for devices in (1, 1, 4)
        ]
        jobs.create_job(session, "merge", {})
    start_one(made[0])
    start_one(made[2])
    with database.read() as session:
        assert quotas.key_uses(session) == {
            key_id: KeyUse(queued=1, running=2, slots=5),
            "anonymous": KeyUse(queued=1, running=0, slots=0),
        }


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    limit=st.one_of(st.none(), st.integers(0, 60)),
    steps=st.lists(st.tuples(st.sampled_from(["charge", "release"]), st.integers(0, 30)), max_size=12),
)
def test_the_count_is_the_sum_of_what_was_accepted(
    database: Database, limit: int | None, steps: list[tuple[str, int]]
) -> None:
    key_id = create(database, KeyLimits(max_bytes=limit))
    held: list[int] = []
    for step, size in steps:
        fits = limit is None or sum(held) + size <= limit
        with database.write() as session:
            if step == "release":
                quotas.release_bytes(session, key_id, held.pop() if held else 0)
            elif fits:
                quotas.charge_bytes(session, key_id, size)
                held.append(size)
            else:
                with pytest.raises(QuotaExceeded):
                    quotas.charge_bytes(session, key_id, size)
    assert key(database, key_id).stored_bytes == sum(held)
