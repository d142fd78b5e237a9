"""One slot of the pool over time: its worker process, and the attempt that it runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import structlog

from storage.claims import Claim, SlotOffer
from workers.attempt import AttemptSpec, Outcome
from workers.provider import Slot, Worker, WorkerProvider, WorkerStartError
from workers.settlement import Stop, back_off

FIRST_RESTART_SECONDS = 0.5
NO_PROCESS: dict[str, Any] = {"code": None, "signal": None, "peak_memory": None}

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Running:
    """An attempt from its claim until its end has been written. Times are of the monotonic clock.

    Attributes:
        new_pid: the process that was started for it after its claim, until that has been written down.
    """

    claim: Claim
    began: float
    lease_ends: float
    deadline: float | None
    stop: Stop | None = None
    kill_at: float | None = None
    kill_sent: bool = False
    new_pid: int | None = None

    @property
    def key(self) -> tuple[str, int]:
        return self.claim.job_id, self.claim.attempt


class Lane:
    """Keeps one worker process on its slot, gives it attempts and stops them.

    The slot is free again only when the attempt's process may serve another one or has been reaped, and the
    attempt's end has been written (`clear`).

    An attempt on several devices takes several lanes of one host. One leads: all their processes end first, then it
    starts one process that has all the devices. The others are `lent` to it until that process has been reaped.
    """

    def __init__(self, slot: Slot, provider: WorkerProvider, notify: Callable[[], None], grace_seconds: float) -> None:
        self.slot = slot
        self.worker: Worker | None = None
        self.running: Running | None = None
        self.retired = False
        self._last_host = ""
        self._provider = provider
        self._notify = notify
        self._grace_seconds = grace_seconds
        self._restart_at = 0.0
        self._failed_starts = 0
        self._problem: str | None = None
        self._was_ready = False
        self._lent_to: Lane | None = None
        self._partners: tuple[Lane, ...] = ()
        self._waiting_spec: AttemptSpec | None = None  # of several devices, until their process is ready
        self._shared_worker = False
        self._busy_seconds = 0.0  # of the attempts that have ended

    @property
    def host(self) -> str:
        """The machine of its worker, or of its last one; "" until that is known."""
        return (self.worker.host if self.worker is not None else "") or self._last_host

    @property
    def idle(self) -> bool:
        """Whether an attempt can be given to it now."""
        worker = self.worker
        if self.running is not None or self._lent_to is not None or self._partners or self.retired:
            return False
        return worker is not None and worker.alive() and worker.ready

    @property
    def finished(self) -> bool:
        """Whether its attempt has ended, so that the end can be written."""
        if self.running is None or self._waiting_spec is not None:
            return False
        if self.worker is None or not self.worker.alive():
            return True
        return self.worker.poll() is not None and not self._must_replace()

    @property
    def outcome(self) -> Outcome | None:
        if self.running is None or self._waiting_spec is not None or self.worker is None:
            return None
        return self.worker.poll()

    @property
    def exit(self) -> dict[str, Any]:
        """{code, signal, peak_memory} of the process of the attempt."""
        return self.worker.exit() if self.worker is not None else NO_PROCESS

    @property
    def start_problem(self) -> str | None:
        """Why the last start of a worker failed; None when one has started since."""
        return self._problem

    def offer(self) -> SlotOffer:
        """What a claim needs to know of this idle lane."""
        assert self.worker is not None
        return SlotOffer(self.slot.name, self.host, frozenset(self.worker.warm), self.worker.pid)

    def log_tail(self) -> list[str]:
        return self.worker.log_tail() if self.worker is not None else []

    def status(self) -> dict[str, Any]:
        """What `GET /workers` shows of the slot."""
        leader = self._lent_to or self
        running, worker = leader.running, leader.worker
        if running is not None:
            state = "stopping" if running.stop is not None else "running"
        else:
            state = "idle" if self.idle else "starting"
        return {
            "name": self.slot.name,
            "device": self.slot.device,
            "host": self.host,
            "state": state,
            "pid": worker.pid if worker is not None else None,
            "job_id": running.claim.job_id if running is not None else None,
            "attempt": running.claim.attempt if running is not None else None,
            "warm": list(worker.warm) if worker is not None else [],
            "problem": self._problem,
            "busy_seconds": round(self._busy_seconds + self._busy_with(running), 3),
        }

    @staticmethod
    def _busy_with(running: Running | None) -> float:
        return max(0.0, time.monotonic() - running.began) if running is not None else 0.0

    def ensure_worker(self, now: float) -> None:
        """Start a worker if there is none, replace one that has ended; waits longer after each failed start."""
        if self.running is not None or self._lent_to is not None:
            return
        if self.worker is not None and self.worker.alive():
            self._look_after_idle(self.worker)
            return
        self._return_partners()
        if self.worker is not None:
            ended = self.worker.exit()
            log.info("worker_ended", slot=self.slot.name, pid=self.worker.pid, **ended)
            self.worker = None
            if not self._was_ready:
                problem = ended.get("lost") or "the worker process ended before it was ready"
                self._count_failed_start(now, problem)
        if now >= self._restart_at and not self.retired:
            self._start_worker(now, [self.slot])

    def _look_after_idle(self, worker: Worker) -> None:
        if self._shared_worker or self.retired:
            worker.kill()
        elif worker.ready:
            self._last_host = worker.host
            self._note_ready()

    def _start_worker(self, now: float, slots: Sequence[Slot]) -> None:
        self._was_ready = False
        self._shared_worker = len(slots) > 1
        try:
            self.worker = self._provider.start(slots, self._notify)
        except WorkerStartError as error:
            log.error("worker_not_started", slot=self.slot.name, error=str(error))
            self.worker = None
            self._count_failed_start(now, str(error))

    def _note_ready(self) -> None:
        self._was_ready, self._failed_starts, self._problem = True, 0, None

    def _count_failed_start(self, now: float, problem: str) -> None:
        self._failed_starts += 1
        self._problem = problem
        self._restart_at = now + back_off(self._failed_starts, FIRST_RESTART_SECONDS)

    def assign(
        self,
        claim: Claim,
        spec: AttemptSpec,
        *,
        now: float,
        lease_ends: float,
        deadline: float | None,
        partners: Sequence[Lane] = (),
    ) -> None:
        """Give the claimed attempt to the idle worker; with partners, to a new one that has their devices too."""
        assert self.worker is not None
        self._note_ready()
        self.running = Running(claim, now, lease_ends, deadline)
        if not partners:
            self.worker.submit(spec)
            return
        self._partners = tuple(partners)
        self._waiting_spec = spec
        for lane in (self, *partners):
            lane.end_worker()
        for lane in partners:
            lane._lent_to = self

    def stop(self, reason: Stop, now: float) -> None:
        """Ask the attempt to stop, and have it killed after the grace. The first reason stays, unless it is lost."""
        running = self.running
        if running is None or (running.stop is not None and reason is not Stop.LOST):
            return
        if running.stop is reason:
            return
        log.info("attempt_stopping", job_id=running.claim.job_id, attempt=running.claim.attempt, reason=reason.value)
        running.stop = reason
        if self._waiting_spec is not None:  # it has not begun
            self._waiting_spec = None
            running.kill_at = now
        elif reason in (Stop.LOST, Stop.EXPIRED):  # nothing that it still does can count
            running.kill_at = now
        else:
            running.kill_at = now + self._grace_seconds
            if self.worker is not None:
                self.worker.terminate()

    def step(self, now: float) -> None:
        """Act on what time has brought: a lease that ended, a deadline, a grace that is over, a worker to replace."""
        running = self.running
        if running is None:
            return
        if now >= running.lease_ends:
            self.stop(Stop.EXPIRED, now)
        elif running.deadline is not None and now >= running.deadline:
            self.stop(Stop.TIMEOUT, now)
        if self._waiting_spec is not None:
            self._prepare(now)
        worker = self.worker
        if worker is None or not worker.alive():
            return
        grace_is_over = running.kill_at is not None and now >= running.kill_at
        if not running.kill_sent and (grace_is_over or (self.outcome is not None and self._must_replace())):
            running.kill_sent = True
            worker.kill()

    def _prepare(self, now: float) -> None:
        """Bring up the process of an attempt on several devices, step by step."""
        assert self._waiting_spec is not None
        assert self.running is not None
        lanes = (self, *self._partners)
        if not self._shared_worker:
            if all(lane.worker is None or not lane.worker.alive() for lane in lanes):
                self._start_worker(now, [lane.slot for lane in lanes])
                if self.worker is None:
                    self._waiting_spec = None  # the attempt ends here; its job is queued again
            return
        assert self.worker is not None
        if not self.worker.alive():
            self._waiting_spec = None
        elif self.worker.ready:
            self._note_ready()
            self.worker.submit(self._waiting_spec)
            self._waiting_spec = None
            self.running.new_pid = self.worker.pid

    def next_event(self) -> float | None:
        """When `step` or `ensure_worker` will have something to do, if nothing happens before."""
        running = self.running
        if running is None:
            return self._restart_at if self.worker is None and self._lent_to is None and not self.retired else None
        if running.kill_sent:
            return None
        if running.stop is not None:
            return running.kill_at
        return running.lease_ends if running.deadline is None else min(running.lease_ends, running.deadline)

    def clear(self) -> None:
        """The attempt's end has been written: the slot is free, as soon as a process of several devices has ended."""
        for lane in (self, *self._partners):
            lane._busy_seconds += self._busy_with(self.running)
        self.running = None
        if self.worker is not None:
            self.worker.discard()
            if self._shared_worker:
                self.worker.kill()
        if self.worker is None or not self._shared_worker:
            self._return_partners()

    def _return_partners(self) -> None:
        for lane in self._partners:
            lane._lent_to = None
        self._partners = ()
        self._shared_worker = False

    def _must_replace(self) -> bool:
        """Whether the process may not serve another attempt: stopped, spent, or out of its device's memory."""
        running, outcome = self.running, self.outcome
        if running is None or outcome is None:
            return False
        return (
            self._shared_worker
            or running.stop is not None
            or outcome.state in ("cancelled", "stale")
            or outcome.spent
            or outcome.retry == "out_of_memory"
        )

    def end_worker(self) -> None:
        """Kill the worker."""
        if self.worker is not None and self.worker.alive():
            self.worker.kill()

    @property
    def busy(self) -> bool:
        """Whether it has an attempt or a process."""
        return self.running is not None or (self.worker is not None and self.worker.alive())

    @property
    def removable(self) -> bool:
        """Whether nothing depends on it."""
        return not self.busy and not self._partners and self._lent_to is None
