"""Chores: their turns, wakes, faults, and the end."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from structlog.testing import capture_logs

from artifacts.errors import BlobStoreUnavailable, DatabaseUnavailable, DiskFull, RankwiseError
from workers import clockwork
from workers.clockwork import Chore, Clockwork

DEADLINE = 90.0
NEVER = 3600.0


class Turns:
    """A chore's function: counts its turns, and does what the test says for each."""

    def __init__(self, *faults: BaseException | None) -> None:
        self.count = 0
        self.faults = list(faults)
        self.threads: set[str] = set()
        self._changed = threading.Condition()

    def __call__(self) -> None:
        with self._changed:
            self.count += 1
            self.threads.add(threading.current_thread().name)
            self._changed.notify_all()
            fault = self.faults.pop(0) if self.faults else None
        if fault is not None:
            raise fault

    def wait_for(self, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self.count >= count, DEADLINE), f"{self.count} of {count} turns"


@pytest.fixture
def start() -> Iterator[Callable[..., Clockwork]]:
    """Starts clockworks and stops them after the test."""
    started: list[Clockwork] = []

    def begin(*chores: Chore) -> Clockwork:
        found = Clockwork(chores)
        found.start()
        started.append(found)
        return found

    yield begin
    for found in started:
        found.stop()


def names() -> set[str]:
    return {thread.name for thread in threading.enumerate()}


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.005)


def test_each_chore_has_turns_in_its_own_thread(start: Any) -> None:
    often, seldom = Turns(), Turns()
    start(Chore("often", 0.01, often), Chore("seldom", NEVER, seldom))
    often.wait_for(5)
    seldom.wait_for(1)
    assert seldom.count == 1
    assert (often.threads, seldom.threads) == ({"chore-often"}, {"chore-seldom"})


def test_a_chore_that_blocks_holds_up_no_other(start: Any) -> None:
    gate, other = threading.Event(), Turns()

    def block() -> None:
        assert gate.wait(DEADLINE)

    try:
        start(Chore("blocked", 0.01, block), Chore("other", 0.01, other))
        other.wait_for(3)
    finally:
        gate.set()


def test_a_delay_puts_off_the_first_turn_only(start: Any) -> None:
    late, quick = Turns(), Turns()
    started = time.monotonic()
    start(Chore("late", NEVER, late, delay_seconds=0.2), Chore("quick", 0.01, quick))
    late.wait_for(1)
    assert time.monotonic() - started >= 0.2


def test_a_wake_is_a_turn_now_and_is_never_lost(start: Any) -> None:
    entered, gate, turns = threading.Event(), threading.Event(), Turns()

    def run() -> None:
        turns()
        entered.set()
        assert gate.wait(DEADLINE)

    found = start(Chore("slow", NEVER, run))
    assert entered.wait(DEADLINE)
    found.wake("slow")  # in the middle of a turn
    gate.set()
    turns.wait_for(2)
    found.wake("slow")
    turns.wait_for(3)
    with pytest.raises(KeyError):
        found.wake("unknown")


def test_stop_ends_all_threads_at_once(start: Any) -> None:
    turns = Turns()
    found = start(Chore("one", NEVER, turns), Chore("two", NEVER, Turns(), delay_seconds=NEVER))
    turns.wait_for(1)
    began = time.monotonic()
    found.stop()
    assert time.monotonic() - began < clockwork.STOP_SECONDS / 2
    assert not {"chore-one", "chore-two"} & names()
    found.stop()


def test_stop_waits_for_the_turn_and_begins_none(start: Any) -> None:
    entered, gate, ended = threading.Event(), threading.Event(), threading.Event()

    def run() -> None:
        entered.set()
        assert gate.wait(DEADLINE)
        ended.set()

    found = start(Chore("slow", 0.01, run))
    assert entered.wait(DEADLINE)
    stopper = threading.Thread(target=found.stop)
    stopper.start()
    assert not ended.is_set()
    gate.set()
    stopper.join(DEADLINE)
    assert ended.is_set()
    assert "chore-slow" not in names()


def test_a_turn_that_hangs_is_left_behind(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clockwork, "STOP_SECONDS", 0.05)
    entered, gate = threading.Event(), threading.Event()

    def run() -> None:
        entered.set()
        assert gate.wait(DEADLINE)

    found = start(Chore("hanging", NEVER, run))
    assert entered.wait(DEADLINE)
    try:
        with capture_logs() as logs:
            found.stop()
        assert [(line["event"], line["chore"]) for line in logs] == [("chore_left_behind", "hanging")]
    finally:
        gate.set()
    wait_until(lambda: "chore-hanging" not in names())


def test_stop_without_start() -> None:
    Clockwork([Chore("never", 1.0, Turns())]).stop()


@pytest.mark.parametrize("error", [DatabaseUnavailable("gone"), BlobStoreUnavailable("gone"), DiskFull("full")])
def test_an_outage_is_told_once_and_tried_again_soon(start: Any, error: RankwiseError) -> None:
    turns = Turns(error, error, error)
    with capture_logs() as logs:
        start(Chore("hourly", 0.02, turns))
        turns.wait_for(5)
    told = [line for line in logs if line["event"].startswith("chore_")]
    assert [line["event"] for line in told] == ["chore_postponed", "chore_goes_on"]
    assert (told[0]["code"], told[0]["detail"], told[1]["failures"]) == (error.code, error.detail, 3)


def test_the_pauses_of_an_outage_grow(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clockwork, "FIRST_RETRY_SECONDS", 0.02)
    turns, times = Turns(*[DatabaseUnavailable("gone")] * 4), list[float]()

    def run() -> None:
        times.append(time.monotonic())
        turns()

    start(Chore("hourly", NEVER, run))
    turns.wait_for(5)
    pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert all(pause >= 0.02 * 2**number for number, pause in enumerate(pauses))


def test_any_other_fault_is_logged_with_its_traceback_and_the_chore_goes_on(start: Any) -> None:
    turns = Turns(ValueError("a bug"), None)
    with capture_logs() as logs:
        start(Chore("buggy", 0.01, turns))
        turns.wait_for(3)
    (line,) = [line for line in logs if line["event"] == "chore_failed"]
    assert (line["chore"], line["log_level"], line["exc_info"]) == ("buggy", "error", True)


def test_chores_that_can_not_be() -> None:
    with pytest.raises(ValueError, match="same name"):
        Clockwork([Chore("a", 1.0, Turns()), Chore("a", 2.0, Turns())])
    with pytest.raises(ValueError, match="positive"):
        Clockwork([Chore("a", 0.0, Turns())])
