"""A slot over time, with a worker that does only what the test says: no process, no clock."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from storage.claims import Claim
from workers.attempt import AttemptSpec, Outcome
from workers.lane import FIRST_RESTART_SECONDS, Lane
from workers.provider import Slot, WorkerStartError
from workers.settlement import Stop

GRACE = 30.0
LEASE_ENDS = 1000.0
CLAIM = Claim("job_1", 1, "kind", {}, {})
SPEC: Any = AttemptSpec("job_1", 1, "kind", {}, "cpu:0", "cpu", "", "", "", "", (), "m:f")


class FakeWorker:
    def __init__(self) -> None:
        self.pid: int | None = 4711
        self.host = "host"
        self.warm: tuple[str, ...] = ()
        self.ready = True
        self.living = True
        self.outcome: Outcome | None = None
        self.calls: list[str] = []

    def submit(self, spec: AttemptSpec) -> None:
        self.calls.append("submit")

    def poll(self) -> Outcome | None:
        return self.outcome

    def alive(self) -> bool:
        return self.living

    def exit(self) -> dict[str, Any]:
        return {"code": None, "signal": None, "peak_memory": None}

    def terminate(self) -> None:
        self.calls.append("terminate")

    def kill(self) -> None:
        self.calls.append("kill")

    def log_tail(self, lines: int = 200) -> list[str]:
        return []

    def discard(self) -> None:
        self.calls.append("discard")


class FakeProvider:
    def __init__(self) -> None:
        self.started: list[FakeWorker] = []
        self.refuse = False

    def slots(self) -> tuple[Slot, ...]:
        return (Slot("cpu:0", "cpu"),)

    def start(self, slots: Sequence[Slot], notify: Callable[[], None]) -> FakeWorker:
        if self.refuse:
            raise WorkerStartError("no")
        self.started.append(FakeWorker())
        return self.started[-1]

    def close(self) -> None:
        raise AssertionError("a lane closes no provider")


@pytest.fixture
def provider() -> FakeProvider:
    return FakeProvider()


@pytest.fixture
def lane(provider: FakeProvider) -> Lane:
    lane = Lane(Slot("cpu:0", "cpu"), provider, lambda: None, GRACE)
    lane.ensure_worker(0.0)
    lane.ensure_worker(0.0)
    assert len(provider.started) == 1
    return lane


@pytest.fixture
def worker(lane: Lane, provider: FakeProvider) -> FakeWorker:
    """The lane's worker, with an attempt."""
    assert lane.idle
    lane.assign(CLAIM, SPEC, now=0.0, lease_ends=LEASE_ENDS, deadline=None)
    return provider.started[0]


def test_the_slot_is_taken_from_assignment_until_its_end_is_written(lane: Lane, worker: FakeWorker) -> None:
    assert not lane.idle
    assert not lane.finished
    worker.outcome = Outcome("succeeded")
    assert lane.finished
    assert not lane.idle
    lane.clear()
    assert lane.idle
    assert worker.calls == ["submit", "discard"]


def test_a_stopped_attempts_slot_is_free_only_after_reaping(
    lane: Lane, worker: FakeWorker, provider: FakeProvider
) -> None:
    lane.stop(Stop.CANCEL, 10.0)
    assert worker.calls == ["submit", "terminate"]
    worker.outcome = Outcome("cancelled")
    lane.step(11.0)
    assert worker.calls == ["submit", "terminate", "kill"]
    assert not lane.finished
    lane.ensure_worker(11.0)
    assert len(provider.started) == 1
    worker.living = False
    assert lane.finished
    lane.clear()
    assert not lane.idle
    lane.ensure_worker(12.0)
    assert len(provider.started) == 2


def test_the_kill_comes_after_the_grace_and_once(lane: Lane, worker: FakeWorker) -> None:
    lane.stop(Stop.CANCEL, 10.0)
    assert lane.next_event() == 10.0 + GRACE
    lane.step(10.0 + GRACE - 0.001)
    assert "kill" not in worker.calls
    lane.step(10.0 + GRACE)
    lane.step(10.0 + GRACE + 1)
    assert worker.calls.count("kill") == 1
    assert lane.next_event() is None


def test_the_first_reason_stays_and_does_not_renew_the_grace(lane: Lane, worker: FakeWorker) -> None:
    lane.stop(Stop.CANCEL, 10.0)
    lane.stop(Stop.DRAIN, 20.0)
    assert lane.running is not None
    assert lane.running.stop is Stop.CANCEL
    assert lane.running.kill_at == 10.0 + GRACE
    assert worker.calls.count("terminate") == 1


def test_an_attempt_that_lost_its_job_is_killed_at_once_even_while_stopping(lane: Lane, worker: FakeWorker) -> None:
    lane.stop(Stop.DRAIN, 10.0)
    lane.stop(Stop.LOST, 11.0)
    lane.step(11.0)
    assert worker.calls[-1] == "kill"
    assert lane.running is not None
    assert lane.running.stop is Stop.LOST


def test_the_end_of_the_lease_kills_at_once(lane: Lane, worker: FakeWorker) -> None:
    assert lane.next_event() == LEASE_ENDS
    lane.step(LEASE_ENDS - 0.001)
    assert worker.calls == ["submit"]
    lane.step(LEASE_ENDS)
    assert worker.calls == ["submit", "kill"]
    assert lane.running is not None
    assert lane.running.stop is Stop.EXPIRED


def test_a_deadline_stops_with_grace(lane: Lane, provider: FakeProvider) -> None:
    lane.assign(CLAIM, SPEC, now=0.0, lease_ends=LEASE_ENDS, deadline=50.0)
    assert lane.next_event() == 50.0
    lane.step(50.0)
    assert provider.started[0].calls == ["submit", "terminate"]
    assert lane.running is not None
    assert lane.running.stop is Stop.TIMEOUT


@pytest.mark.parametrize(
    "outcome", [Outcome("cancelled"), Outcome("stale"), Outcome("failed", {}, "out_of_memory")], ids=lambda o: o.state
)
def test_some_ends_replace_the_process_by_themselves(lane: Lane, worker: FakeWorker, outcome: Outcome) -> None:
    worker.outcome = outcome
    assert not lane.finished
    lane.step(1.0)
    assert worker.calls == ["submit", "kill"]
    worker.living = False
    assert lane.finished


@pytest.mark.parametrize(
    "outcome", [Outcome("succeeded"), Outcome("failed", {}), Outcome("failed", {}, "infrastructure")]
)
def test_other_ends_keep_it(lane: Lane, worker: FakeWorker, outcome: Outcome) -> None:
    worker.outcome = outcome
    lane.step(1.0)
    assert lane.finished
    assert worker.calls == ["submit"]


def test_a_crash_finishes_the_attempt_and_the_next_worker_comes_at_once(
    lane: Lane, worker: FakeWorker, provider: FakeProvider
) -> None:
    worker.living = worker.ready = False
    assert lane.finished
    lane.clear()
    lane.ensure_worker(5.0)
    assert len(provider.started) == 2


def test_attempts_that_crash_their_worker_do_not_delay_the_next_one(provider: FakeProvider) -> None:
    lane = Lane(Slot("cpu:0", "cpu"), provider, lambda: None, GRACE)
    for number in range(1, 6):
        lane.ensure_worker(7.0)
        assert len(provider.started) == number
        # Claimed in the very round in which the worker became ready, and crashed before the next one.
        lane.assign(CLAIM, SPEC, now=0.0, lease_ends=LEASE_ENDS, deadline=None)
        provider.started[-1].ready = provider.started[-1].living = False
        lane.clear()


def test_failing_starts_are_tried_ever_more_seldom(provider: FakeProvider) -> None:
    lane = Lane(Slot("cpu:0", "cpu"), provider, lambda: None, GRACE)
    provider.refuse = True
    times = [0.0]
    for _ in range(4):
        lane.ensure_worker(times[-1])
        event = lane.next_event()
        assert event is not None
        times.append(event)
    pauses = [after - before for before, after in itertools.pairwise(times)]
    assert pauses == [FIRST_RESTART_SECONDS * factor for factor in (1, 2, 4, 8)]


def test_workers_that_die_before_they_are_ready_count_as_failing_starts(provider: FakeProvider) -> None:
    lane = Lane(Slot("cpu:0", "cpu"), provider, lambda: None, GRACE)
    lane.ensure_worker(0.0)
    provider.started[0].ready = provider.started[0].living = False
    lane.ensure_worker(1.0)
    assert len(provider.started) == 1
    lane.ensure_worker(1.0 + FIRST_RESTART_SECONDS)
    assert len(provider.started) == 2
