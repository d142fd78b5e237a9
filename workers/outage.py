"""How to go on while the database is away: try again, ever more seldom, and tell it once."""

from __future__ import annotations

import structlog

FIRST_WAIT_SECONDS = 0.25
LONGEST_WAIT_SECONDS = 5.0

log = structlog.get_logger(__name__)


class Outage:
    """Times are of the monotonic clock."""

    def __init__(self) -> None:
        self._began: float | None = None
        self._wait = FIRST_WAIT_SECONDS
        self._try_at = 0.0
        self._now = 0.0

    def may_try(self, now: float) -> bool:
        """Whether the next try is due."""
        self._now = now
        return now >= self._try_at

    def begin(self, now: float, detail: str) -> None:
        """A try has failed: wait, longer each time."""
        if self._began is None:
            self._began = now
            log.error("database_outage", detail=detail)
        self._try_at = now + self._wait
        self._wait = min(LONGEST_WAIT_SECONDS, self._wait * 2)

    def end(self) -> None:
        """A try has succeeded."""
        if self._began is not None:
            log.info("database_outage_over", seconds=round(self._now - self._began, 1))
        self._began, self._wait, self._try_at = None, FIRST_WAIT_SECONDS, 0.0
