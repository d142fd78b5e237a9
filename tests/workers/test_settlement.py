"""Every combination of what the worker said, what the supervisor did and how the process ended."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from workers.attempt import Outcome
from workers.settlement import MAX_DELAY_SECONDS, Stop, back_off, settle

KILLED: dict[str, Any] = {"code": None, "signal": 9, "peak_memory": 1}
FAILED = Outcome("failed", {"code": "invalid_request", "detail": "no", "hint": None})
INFRASTRUCTURE = Outcome("failed", {"code": "disk_full", "detail": "no", "hint": None}, "infrastructure")
OUT_OF_MEMORY = Outcome("failed", {"code": "cuda_out_of_memory", "detail": "no", "hint": None}, "out_of_memory")
OUTCOMES = (None, Outcome("succeeded"), Outcome("stale"), Outcome("cancelled"), FAILED, INFRASTRUCTURE, OUT_OF_MEMORY)
STOPS = (None, *Stop)


def write(outcome: Outcome | None, stop: Stop | None = None, **resources: Any) -> str:
    return settle(outcome, stop, KILLED, resources={"timeout_seconds": 5} | resources).write


def test_a_lost_attempt_never_writes() -> None:
    assert {write(outcome, Stop.LOST) for outcome in OUTCOMES} == {"nothing"}


@pytest.mark.parametrize("state", ["succeeded", "stale"])
def test_what_is_published_or_stale_is_not_written_again(state: Any) -> None:
    assert {write(Outcome(state), stop) for stop in STOPS} == {"nothing"}


def test_a_cancelled_job_is_cancelled_and_never_failed() -> None:
    assert {write(outcome, Stop.CANCEL) for outcome in (None, Outcome("cancelled"), FAILED, INFRASTRUCTURE)} == {
        "cancel"
    }


@pytest.mark.parametrize("stop", [None, Stop.DRAIN, Stop.EXPIRED, Stop.TIMEOUT])
def test_a_users_error_fails_whatever_else_happened(stop: Stop | None) -> None:
    settlement = settle(FAILED, stop, KILLED, resources={"timeout_seconds": 5})
    assert (settlement.write, settlement.error) == ("fail", FAILED.error)


def test_the_surroundings_failures_are_retried() -> None:
    assert write(INFRASTRUCTURE) == "requeue"
    assert write(None) == "requeue"
    assert write(None, Stop.EXPIRED) == "requeue"


def test_device_memory_is_retried_once_with_the_hint() -> None:
    first = settle(OUT_OF_MEMORY, None, KILLED, resources={})
    assert (first.write, first.reduce_memory) == ("requeue", True)
    assert write(OUT_OF_MEMORY, reduce_memory=True) == "fail"


def test_a_drained_attempt_is_released_uncounted() -> None:
    assert {write(outcome, Stop.DRAIN) for outcome in (None, Outcome("cancelled"))} == {"release"}


def test_a_time_out_fails() -> None:
    settlement = settle(Outcome("cancelled"), Stop.TIMEOUT, KILLED, resources={"timeout_seconds": 5})
    assert settlement.write == "fail"
    assert settlement.error is not None
    assert "5 s" in settlement.error["detail"]


def test_every_combination_has_an_answer_and_every_failure_an_error() -> None:
    for outcome, stop in itertools.product(OUTCOMES, STOPS):
        settlement = settle(outcome, stop, KILLED, resources={"timeout_seconds": 5})
        if settlement.write in ("fail", "requeue"):
            assert settlement.error is not None
            assert settlement.error["code"]


def test_back_off_doubles_up_to_a_minute() -> None:
    assert [back_off(attempt, 1.0) for attempt in (1, 2, 3, 6, 7, 5000)] == [1, 2, 4, 32, MAX_DELAY_SECONDS, 60]
