"""Clockwork: the chores that a process does by itself, again and again, each in a thread of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog

from artifacts.errors import BlobStoreUnavailable, DatabaseUnavailable, DiskFull, RankwiseError

FIRST_RETRY_SECONDS = 0.5
LONGEST_RETRY_SECONDS = 60.0
STOP_SECONDS = 30.0

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Chore:
    """Something to be done every `interval_seconds`, counted from the end of the last turn.

    Attributes:
        name: unique among the chores of one clockwork; the name of its thread.
        run: one turn; blocks. What it raises ends the turn, never the chore.
        delay_seconds: from the start to the first turn.
        interrupt: called from another thread when the clockwork stops, so that a long turn ends early.
    """

    name: str
    interval_seconds: float
    run: Callable[[], None]
    delay_seconds: float = 0.0
    interrupt: Callable[[], None] | None = None


class Clockwork:
    """Runs chores until it is stopped.

    While the database, the blob store or the disk is away, a chore tries again ever more seldom, at the latest when
    its next turn would be, or after a minute, and tells it once. Any other exception is logged with its traceback.

    Raises:
        ValueError: two chores of one name, or an interval that is not positive.
    """

    def __init__(self, chores: Sequence[Chore]) -> None:
        if len({chore.name for chore in chores}) < len(chores):
            raise ValueError("two chores have the same name")
        if any(chore.interval_seconds <= 0 for chore in chores):
            raise ValueError("the interval of a chore must be positive")
        self._stopping = threading.Event()
        self._turns = {chore.name: _Turns(chore, self._stopping) for chore in chores}

    def start(self) -> None:
        """Start every chore. Once only."""
        for turns in self._turns.values():
            turns.thread.start()

    def wake(self, name: str) -> None:
        """Let the chore take its next turn at once; when it is at one, right after it. Raises KeyError."""
        self._turns[name].wake.set()

    def stop(self) -> None:
        """Wait until every chore has ended its turn; one that takes longer than 30 s is left behind and named."""
        self._stopping.set()
        for turns in self._turns.values():
            turns.wake.set()
            if turns.chore.interrupt is not None:
                turns.chore.interrupt()
        deadline = time.monotonic() + STOP_SECONDS
        for name, turns in self._turns.items():
            if turns.thread.ident is None:
                continue
            turns.thread.join(max(0.0, deadline - time.monotonic()))
            if turns.thread.is_alive():
                _log.warning("chore_left_behind", chore=name, waited_seconds=STOP_SECONDS)


class _Turns:
    """One chore and its thread."""

    def __init__(self, chore: Chore, stopping: threading.Event) -> None:
        self.chore = chore
        self.wake = threading.Event()
        # A daemon, so that a turn that hangs does not keep the process from ending.
        self.thread = threading.Thread(target=self._loop, name=f"chore-{chore.name}", daemon=True)
        self._stopping = stopping
        self._failures = 0

    def _loop(self) -> None:
        pause = self.chore.delay_seconds
        while True:
            self.wake.wait(pause)
            self.wake.clear()  # before the turn: a wake during it leads to another one
            if self._stopping.is_set():
                return
            pause = self._turn()

    def _turn(self) -> float:
        """One turn; returns the seconds until the next."""
        try:
            self.chore.run()
        except (DatabaseUnavailable, BlobStoreUnavailable, DiskFull) as error:
            return self._postpone(error)
        except Exception:  # a chore that ended for ever, unseen, would be worse than any fault of one turn
            _log.exception("chore_failed", chore=self.chore.name)
            return self.chore.interval_seconds
        if self._failures:
            _log.info("chore_goes_on", chore=self.chore.name, failures=self._failures)
            self._failures = 0
        return self.chore.interval_seconds

    def _postpone(self, error: RankwiseError) -> float:
        if not self._failures:
            _log.error("chore_postponed", chore=self.chore.name, code=error.code, detail=error.detail)
        longest = min(LONGEST_RETRY_SECONDS, self.chore.interval_seconds)
        pause = min(longest, FIRST_RETRY_SECONDS * 2.0 ** min(self._failures, 16))
        self._failures += 1
        return pause
