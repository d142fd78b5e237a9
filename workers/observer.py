"""What a supervisor tells of its work to whoever counts it."""

from __future__ import annotations

from typing import Protocol


class PoolObserver(Protocol):
    """Called by the supervisor's thread; must neither block nor raise. Times are in seconds."""

    def claimed(self, kind: str, wait_seconds: float) -> None:
        """A job was claimed that could have run since `wait_seconds`."""

    def claim_took(self, seconds: float) -> None:
        """A claim, of any number of jobs, took the database this long."""

    def ended(self, kind: str, outcome: str, run_seconds: float) -> None:
        """An attempt has ended, and that is written: succeeded, failed, cancelled, queued, paused, released or lost."""

    def retried(self, kind: str, cause: str) -> None:
        """A job was queued again because of `cause`, the code of the error."""


class Unobserved:
    """Nobody counts."""

    def claimed(self, kind: str, wait_seconds: float) -> None:
        return

    def claim_took(self, seconds: float) -> None:
        return

    def ended(self, kind: str, outcome: str, run_seconds: float) -> None:
        return

    def retried(self, kind: str, cause: str) -> None:
        return
