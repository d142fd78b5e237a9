"""The conditions of the partial indexes, word for word: a bound parameter would hide the index from SQLite."""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy import text

IS_QUEUED = text("jobs.state = 'queued'")
IS_ACTIVE = text("jobs.state IN ('running', 'cancelling')")
IS_WAITED_FOR = text("job_queues.queued > 0")
"""Of the counters of an owner: no index, but the same everywhere."""
PARKED = datetime(9999, 1, 1, tzinfo=UTC)
"""When a job becomes available that is not to start: no clock ever jumps there (see storage.parking)."""
AWAITING = datetime(9999, 1, 2, tzinfo=UTC)
"""The same of a job that waits for jobs of its own (see storage.federations)."""
