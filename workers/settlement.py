"""What to write when an attempt has ended: the cause decides, and it decides alike for every provider."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal

from workers import failures
from workers.attempt import Outcome

MAX_DELAY_SECONDS = 60.0


class Stop(Enum):
    """Why the supervisor stopped an attempt."""

    CANCEL = "its user cancelled it"
    TIMEOUT = "it ran longer than its job allows"
    LOST = "a newer attempt owns the job"
    EXPIRED = "its lease could not be prolonged"
    DRAIN = "the server stops"


Write = Literal["nothing", "fail", "cancel", "requeue", "release"]


@dataclass(frozen=True, slots=True)
class Settlement:
    """What to write.

    "nothing": it is written already, or nobody may write. "release": queue again, no failure counted.
    """

    write: Write
    error: dict[str, Any] | None = None
    reduce_memory: bool = False


def settle(
    outcome: Outcome | None,
    stop: Stop | None,
    ended: dict[str, Any],
    *,
    resources: Mapping[str, Any],
    start_problem: str | None = None,
) -> Settlement:
    """Decide from what the worker said, what the supervisor did to it, and how its process ended.

    Args:
        outcome: None when the process ended without a word.
        stop: why the supervisor stopped it, if it did.
        ended: {code, signal, peak_memory} of the process.
        resources: the job's, with the hints of earlier attempts.
        start_problem: why there was no process for it, if that is so.
    """
    if stop is Stop.LOST or (outcome is not None and outcome.state in ("succeeded", "stale", "paused")):
        return Settlement("nothing")
    if stop is Stop.CANCEL:
        return Settlement("cancel")
    if outcome is not None and outcome.state == "failed":
        return _failed(outcome, resources)
    match stop:
        case Stop.TIMEOUT:
            return Settlement("fail", failures.timed_out(float(resources["timeout_seconds"])))
        case Stop.DRAIN:
            return Settlement("release")
        case Stop.EXPIRED:
            return Settlement("requeue", failures.lease_not_renewed())
        case _ if start_problem is not None:
            return Settlement("requeue", failures.not_started(start_problem))
        case _:
            # Of its own accord. If the job is being cancelled, requeueing it cancels it.
            return Settlement("requeue", failures.interrupted() if outcome is not None else failures.crashed(ended))


def _failed(outcome: Outcome, resources: Mapping[str, Any]) -> Settlement:
    if outcome.retry == "infrastructure":
        return Settlement("requeue", outcome.error)
    if outcome.retry == "out_of_memory" and not resources.get("reduce_memory"):
        return Settlement("requeue", outcome.error, reduce_memory=True)
    return Settlement("fail", outcome.error)


def back_off(attempt: int, first: float) -> float:
    """Seconds to wait before the attempt after `attempt`: doubling from `first`, up to `MAX_DELAY_SECONDS`."""
    return min(MAX_DELAY_SECONDS, first * 2.0 ** min(attempt - 1, 16))
