"""One slot of the pool over time: its worker process, and the attempt that it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import structlog

from storage.claims import Claim
from workers.attempt import AttemptSpec, Outcome
from workers.provider import Slot, Worker, WorkerProvider, WorkerStartError
from workers.settlement import Stop, back_off

FIRST_RESTART_SECONDS = 0.5

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Running:
    """An attempt from its claim until its end has been written. Times are of the monotonic clock."""

    claim: Claim
    lease_ends: float
    deadline: float | None
    stop: Stop | None = None
    kill_at: float | None = None
    kill_sent: bool = False

    @property
    def key(self) -> tuple[str, int]:
        return self.claim.job_id, self.claim.attempt


class Lane:
    """Keeps one worker process on its slot, gives it attempts and stops them.

    The slot is free again only when the attempt's process may serve another one or has been reaped, and the
    attempt's end has been written (`clear`).
    """

    def __init__(self, slot: Slot, provider: WorkerProvider, notify: Callable[[], None], grace_seconds: float) -> None:
        self.slot = slot
        self.worker: Worker | None = None
        self.running: Running | None = None
        self._provider = provider
        self._notify = notify
        self._grace_seconds = grace_seconds
        self._restart_at = 0.0
        self._failed_starts = 0
        self._was_ready = False

    @property
    def idle(self) -> bool:
        """Whether an attempt can be given to it now."""
        return self.running is None and self.worker is not None and self.worker.alive() and self.worker.ready

    @property
    def finished(self) -> bool:
        """Whether its attempt has ended, so that the end can be written."""
        if self.running is None or self.worker is None:
            return False
        return not self.worker.alive() or (self.worker.poll() is not None and not self._must_replace())

    @property
    def outcome(self) -> Outcome | None:
        return self.worker.poll() if self.worker is not None else None

    def status(self) -> dict[str, Any]:
        """What `GET /workers` shows of the slot."""
        running, worker = self.running, self.worker
        if running is not None:
            state = "stopping" if running.stop is not None else "running"
        else:
            state = "idle" if self.idle else "starting"
        return {
            "name": self.slot.name,
            "device": self.slot.device,
            "state": state,
            "pid": worker.pid if worker is not None else None,
            "job_id": running.claim.job_id if running is not None else None,
            "attempt": running.claim.attempt if running is not None else None,
            "warm": [],
        }

    def ensure_worker(self, now: float) -> None:
        """Start a worker if there is none, replace one that has ended; waits longer after each failed start."""
        if self.running is not None:
            return
        if self.worker is not None and self.worker.alive():
            if self.worker.ready:
                self._note_ready()
            return
        if self.worker is not None:
            log.info("worker_ended", slot=self.slot.name, pid=self.worker.pid, **self.worker.exit())
            self.worker = None
            if not self._was_ready:
                self._count_failed_start(now)
        if now < self._restart_at:
            return
        self._was_ready = False
        try:
            self.worker = self._provider.start(self.slot, self._notify)
        except WorkerStartError as error:
            log.error("worker_not_started", slot=self.slot.name, error=str(error))
            self._count_failed_start(now)

    def _note_ready(self) -> None:
        self._was_ready, self._failed_starts = True, 0

    def _count_failed_start(self, now: float) -> None:
        self._failed_starts += 1
        self._restart_at = now + back_off(self._failed_starts, FIRST_RESTART_SECONDS)

    def assign(self, claim: Claim, spec: AttemptSpec, *, lease_ends: float, deadline: float | None) -> None:
        """Give the claimed attempt to the idle worker."""
        assert self.worker is not None
        self._note_ready()
        self.running = Running(claim, lease_ends, deadline)
        self.worker.submit(spec)

    def stop(self, reason: Stop, now: float) -> None:
        """Ask the attempt to stop, and have it killed after the grace. The first reason stays, unless it is lost."""
        running, worker = self.running, self.worker
        if running is None or worker is None or (running.stop is not None and reason is not Stop.LOST):
            return
        if running.stop is reason:
            return
        log.info("attempt_stopping", job_id=running.claim.job_id, attempt=running.claim.attempt, reason=reason.value)
        running.stop = reason
        if reason in (Stop.LOST, Stop.EXPIRED):  # nothing that it still does can count
            running.kill_at = now
        else:
            running.kill_at = now + self._grace_seconds
            worker.terminate()

    def step(self, now: float) -> None:
        """Act on what time has brought: a lease that ended, a deadline, a grace that is over, a worker to replace."""
        running, worker = self.running, self.worker
        if running is None or worker is None:
            return
        if now >= running.lease_ends:
            self.stop(Stop.EXPIRED, now)
        elif running.deadline is not None and now >= running.deadline:
            self.stop(Stop.TIMEOUT, now)
        grace_is_over = running.kill_at is not None and now >= running.kill_at
        if not running.kill_sent and (grace_is_over or (worker.poll() is not None and self._must_replace())):
            running.kill_sent = True
            worker.kill()

    def next_event(self) -> float | None:
        """When `step` or `ensure_worker` will have something to do, if nothing happens before."""
        running = self.running
        if running is None:
            return self._restart_at if self.worker is None else None
        if running.kill_sent:
            return None
        if running.stop is not None:
            return running.kill_at
        return running.lease_ends if running.deadline is None else min(running.lease_ends, running.deadline)

    def clear(self) -> None:
        """The attempt's end has been written: the slot is free."""
        self.running = None
        if self.worker is not None:
            self.worker.discard()

    def _must_replace(self) -> bool:
        """Whether the process may not serve another attempt: it was stopped, or its device's memory ran out."""
        running, outcome = self.running, self.outcome
        if running is None or outcome is None:
            return False
        return running.stop is not None or outcome.state in ("cancelled", "stale") or outcome.retry == "out_of_memory"

    def end_worker(self) -> None:
        """Kill a worker that runs nothing."""
        if self.worker is not None and self.worker.alive():
            self.worker.kill()
