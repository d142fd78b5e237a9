"""Several slots under one attempt, with workers that do only what the test says: no process, no clock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from storage.claims import Claim
from workers.attempt import AttemptSpec, Outcome
from workers.lane import Lane
from workers.provider import Slot, WorkerStartError
from workers.settlement import Stop

CLAIM = Claim("job_1", 1, "kind", {}, {}, devices=2)
SPEC: Any = AttemptSpec("job_1", 1, "kind", {}, "cpu:0", "cpu", "", "", "", "", (), "m:f", devices=2)
SLOTS = (Slot("cpu:0", "cpu"), Slot("cpu:1", "cpu"))


class FakeWorker:
    def __init__(self, slots: Sequence[Slot]) -> None:
        self.slots = tuple(slots)
        self.pid: int | None = 0
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
        return {"code": None, "signal": None if self.living else 9, "peak_memory": None}

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
        return SLOTS

    def start(self, slots: Sequence[Slot], notify: Callable[[], None]) -> FakeWorker:
        if self.refuse:
            raise WorkerStartError("no room")
        self.started.append(FakeWorker(slots))
        self.started[-1].pid = 4710 + len(self.started)
        return self.started[-1]

    def close(self) -> None:
        raise AssertionError("a lane closes no provider")


@pytest.fixture
def provider() -> FakeProvider:
    return FakeProvider()


@pytest.fixture
def lanes(provider: FakeProvider) -> list[Lane]:
    lanes = [Lane(slot, provider, lambda: None, 30.0) for slot in SLOTS]
    for lane in lanes:
        lane.ensure_worker(0.0)
        lane.ensure_worker(0.0)
        assert lane.idle
    lanes[0].assign(CLAIM, SPEC, now=0.0, lease_ends=1000.0, deadline=None, partners=lanes[1:])
    return lanes


def turn(lanes: Sequence[Lane], now: float = 1.0) -> None:
    """What the supervisor does in each round."""
    for lane in lanes:
        lane.step(now)
    for lane in lanes:
        lane.ensure_worker(now)


def test_the_shared_process_starts_only_when_all_single_ones_are_gone(
    lanes: list[Lane], provider: FakeProvider
) -> None:
    first, second = provider.started
    assert (first.calls, second.calls) == (["kill"], ["kill"])
    first.living = False
    turn(lanes)
    assert len(provider.started) == 2
    second.living = False
    turn(lanes)
    shared = provider.started[2]
    assert shared.slots == SLOTS
    assert lanes[0].running is not None
    assert lanes[0].running.new_pid is None
    turn(lanes)
    assert shared.calls == ["submit"]
    assert lanes[0].running.new_pid == 4713
    assert [lane.status()["state"] for lane in lanes] == ["running", "running"]
    assert {lane.status()["job_id"] for lane in lanes} == {"job_1"}
    assert not any(lane.idle or lane.finished for lane in lanes)
    assert len(provider.started) == 3  # the lent slot gets no process of its own


def begin(lanes: list[Lane], provider: FakeProvider) -> FakeWorker:
    for worker in provider.started:
        worker.living = False
    turn(lanes)
    turn(lanes)
    return provider.started[-1]


def test_the_slots_are_free_only_after_the_shared_process_is_gone(lanes: list[Lane], provider: FakeProvider) -> None:
    shared = begin(lanes, provider)
    shared.outcome = Outcome("succeeded")
    turn(lanes)
    assert shared.calls == ["submit", "kill"]
    assert not lanes[0].finished
    shared.living = False
    assert lanes[0].finished
    assert lanes[0].outcome == Outcome("succeeded")
    lanes[0].clear()
    assert not any(lane.idle for lane in lanes)
    turn(lanes)
    turn(lanes)
    assert [worker.slots for worker in provider.started[3:]] == [SLOTS[:1], SLOTS[1:]]
    assert all(lane.idle for lane in lanes)


def test_a_shared_process_that_dies_frees_the_slots(lanes: list[Lane], provider: FakeProvider) -> None:
    shared = begin(lanes, provider)
    shared.living = False
    assert lanes[0].finished
    assert lanes[0].outcome is None
    assert lanes[0].exit["signal"] == 9
    lanes[0].clear()
    turn(lanes)
    turn(lanes)
    assert all(lane.idle for lane in lanes)


def test_a_cancel_before_it_began_frees_the_slots(lanes: list[Lane], provider: FakeProvider) -> None:
    lanes[0].stop(Stop.CANCEL, 1.0)
    for worker in provider.started:
        worker.living = False
    turn(lanes)
    assert lanes[0].finished
    assert len(provider.started) == 2
    lanes[0].clear()
    turn(lanes)
    turn(lanes)
    assert all(lane.idle for lane in lanes)


def test_a_shared_process_that_can_not_start_ends_the_attempt(lanes: list[Lane], provider: FakeProvider) -> None:
    for worker in provider.started:
        worker.living = False
    provider.refuse = True
    turn(lanes)
    assert lanes[0].finished
    assert lanes[0].start_problem == "no room"
    lanes[0].clear()
    provider.refuse = False
    turn(lanes, 100.0)
    turn(lanes, 100.0)
    assert all(lane.idle for lane in lanes)
    assert lanes[0].start_problem is None


def test_a_lane_that_lends_or_is_lent_is_not_removed(lanes: list[Lane], provider: FakeProvider) -> None:
    shared = begin(lanes, provider)
    assert not any(lane.removable for lane in lanes)
    shared.living = False
    lanes[0].clear()
    assert not lanes[1].removable
    for lane in lanes:
        lane.retired = True
    turn(lanes)
    assert all(lane.removable for lane in lanes)
