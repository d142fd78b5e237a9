"""The pool's side of the jobs in the database, as one server writes it: each method is one transaction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import structlog
from sqlalchemy import select

from artifacts.errors import DatabaseUnavailable, DiskFull
from storage import claims, servers
from storage.claims import Claims, Renewal, SlotOffer
from storage.database import Database
from storage.tables import JobRow
from storage.transitions import lock_attempt
from workers.lane import Running
from workers.settlement import Settlement, Stop

MAX_FAILURES = 3
Key = tuple[str, int]  # (job id, attempt)

log = structlog.get_logger(__name__)


class Ledger:
    """All that a supervisor reads and writes.

    Every method raises DatabaseUnavailable (or DiskFull) while the database can not serve it. Those that take an
    attempt raise AttemptStale when it is no longer the current one.
    """

    def __init__(self, database: Database, server_id: str, boot_id: str, lease_seconds: float) -> None:
        self._database = database
        self._server_id = server_id
        self._boot_id = boot_id
        self._lease_seconds = lease_seconds

    def register(self, host: str, slots: Sequence[Mapping[str, Any]], pool: str) -> int:
        """Enter this boot and take back what the previous ones ran. Returns the number of jobs taken back."""
        with self._database.write() as session:
            servers.register_server(session, self._server_id, self._boot_id, host, slots, pool=pool)
            return claims.release_previous_boots(session, self._server_id, self._boot_id)

    def beat(self, slots: Sequence[Mapping[str, Any]]) -> int:
        """A sign of life; also takes back the jobs of servers that give none. Returns the number of those."""
        with self._database.write() as session:
            servers.beat_server(session, self._server_id, slots)
            return claims.expire_leases(session, MAX_FAILURES)

    def claim(self, slots: Sequence[SlotOffer], capacity: Mapping[str, int], hold: str | None) -> Claims:
        """Give the idle `slots` the jobs that are next (`storage.claiming`)."""
        with self._database.write() as session:
            return claims.claim_many(
                session,
                server_id=self._server_id,
                boot_id=self._boot_id,
                slots=slots,
                lease_seconds=self._lease_seconds,
                capacity=capacity,
                hold=hold,
            )

    def record_pid(self, key: Key, pid: int) -> None:
        """Note the process that runs an attempt, where its claim could not know it."""
        with self._database.write() as session:
            claims.record_pid(session, *key, pid)

    def work_waits(self) -> bool:
        """Whether any job is queued: a read, so that an idle server takes no write lock each time it looks."""
        with self._database.read() as session:
            return claims.waits(session)

    def renew(self, keys: Sequence[Key]) -> None:
        """Prolong the leases of those that are still current; `standing` tells which are not."""
        with self._database.write() as session:
            claims.renew(session, keys, self._lease_seconds)

    def standing(self, keys: Sequence[Key]) -> dict[Key, Renewal]:
        """Whether each attempt may go on ("ok"), shall stop ("cancel") or counts no more ("lost").

        One that has just published is "ok": its worker is about to say so.
        """
        with self._database.read() as session:
            rows = session.execute(
                select(JobRow.id, JobRow.attempt, JobRow.state).where(JobRow.id.in_([job_id for job_id, _ in keys]))
            )
            found = {(job_id, attempt): state for job_id, attempt, state in rows}
        answers: dict[str, Renewal] = {"running": "ok", "cancelling": "cancel", "succeeded": "ok"}
        return {key: answers.get(found.get(key, "gone"), "lost") for key in keys}

    def settle(
        self,
        running: Running,
        settlement: Settlement,
        ended: dict[str, Any],
        delay_seconds: float,
        *,
        paused: bool = False,
    ) -> str:
        """Write how an attempt ended, as `settlement` says. Returns what became of its job.

        Args:
            ended: {code, signal, peak_memory} of its process.
            delay_seconds: until it runs again, if it does.
            paused: the attempt itself wrote that its job waits for others.
        """
        key, error = running.key, settlement.error or {}
        match settlement.write:
            case "fail":
                return self.fail(key, error, ended)
            case "cancel":
                self.cancel(key, ended)
                return "cancelled"
            case "requeue":
                return self.requeue(
                    key, error, ended, delay_seconds=delay_seconds, reduce_memory=settlement.reduce_memory
                )
            case "release":
                return "released"  # with all others, when the drain is over
            case "nothing":
                return "lost" if running.stop is Stop.LOST else "paused" if paused else "succeeded"

    def fail(self, key: Key, error: dict[str, Any], ended: dict[str, Any]) -> str:
        with self._database.write() as session:
            return claims.finish_failed(session, *key, error, ended)

    def fail_plainly(self, key: Key, error: dict[str, Any], ended: dict[str, Any]) -> str:
        """The end of an attempt whose own could not be written, told while that failure is handled.

        If this can not be written either, the lease of the job ends, and it is taken back like that of a silent server:
        the slot must not wait for it for ever.
        """
        known = log.bind(job_id=key[0], attempt=key[1])
        known.exception("attempt_end_not_written")
        try:
            return self.fail(key, error, ended)
        except (DatabaseUnavailable, DiskFull):
            raise
        except Exception:
            known.exception("attempt_left_to_its_lease")
            return "lost"

    def cancel(self, key: Key, ended: dict[str, Any]) -> None:
        with self._database.write() as session:
            claims.finish_cancelled(session, *key, ended)

    def requeue(
        self,
        key: Key,
        error: dict[str, Any],
        ended: dict[str, Any],
        *,
        delay_seconds: float,
        reduce_memory: bool = False,
    ) -> Literal["queued", "failed", "cancelled"]:
        """Count a failure and queue the job again, with the hint to use less device memory if asked."""
        with self._database.write() as session:
            if reduce_memory:
                job = lock_attempt(session, *key)
                job.resources = {**job.resources, "reduce_memory": True}
            return claims.requeue(
                session, *key, delay_seconds=delay_seconds, error=error, exit=ended, max_failures=MAX_FAILURES
            )

    def release_all(self) -> int:
        """Queue again whatever this server still holds, with no failure counted: its attempts have been stopped."""
        with self._database.write() as session:
            return claims.release_previous_boots(session, self._server_id, boot_id="", graceful=True)
