"""The supervisor: claims jobs for the free slots of this server, keeps their leases, stops and settles attempts.

One thread does it all, woken by the workers, by `wake` and by the clock. It keeps nothing that the database does not
know: after its death the next boot of the same server, or any other server, goes on.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import structlog

from artifacts.errors import AttemptStale, DatabaseUnavailable, DiskFull, StateConflict
from storage.claims import Claim
from storage.database import Database
from storage.ids import new_id
from workers import base_models, failures
from workers.attempt import AttemptSpec
from workers.devices import device_in_worker
from workers.identity import ServerLock
from workers.kinds import KINDS
from workers.lane import NO_PROCESS, Lane, Running
from workers.ledger import Ledger
from workers.log_shipping import LOG_FOLDER, LogKeeper, clear_work
from workers.observer import PoolObserver, Unobserved
from workers.outage import Outage
from workers.provider import Slot, WorkerProvider
from workers.providers import PoolName, RaySettings, make_provider
from workers.remotes import Remotes
from workers.settlement import Stop, back_off, settle

DRAIN_MARGIN_SECONDS = 15.0
LEFT_LOG_SECONDS = 1.0

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class PoolSettings:
    """What a supervisor needs to know. Times are in seconds.

    Attributes:
        server_id: see `workers.identity.read_server_id`.
        devices: see `workers.devices.parse_devices`, and `workers.ray_slots.SlotRules` for Ray.
        pool: what runs the worker processes.
        warm_bytes: base models that a worker may keep in memory; None: a share of what its device has.
        safety_checker, remotes: see `AttemptSpec`.
        retry_seconds: wait before the second attempt after a failure of the infrastructure; doubles with each one.
        kinds: kind of job → "module:function".
    """

    server_id: str
    database_url: str
    blob_url: str
    data_dir: Path
    devices: str = "auto"
    pool: PoolName = "local"
    ray: RaySettings = field(default_factory=RaySettings)
    lease_seconds: float = 60.0
    beat_seconds: float = 15.0
    grace_seconds: float = 30.0
    poll_seconds: float = 1.0
    model_roots: Sequence[str | Path] = ()
    warm_bytes: int | None = None
    safety_checker: str | None = None
    remotes: Remotes = field(default_factory=Remotes)
    retry_seconds: float = 1.0
    kinds: Mapping[str, str] = field(default_factory=lambda: KINDS)


class Supervisor:
    """The pool of one server, in a thread of its process.

    Args:
        provider: what runs the worker processes. One that is given is not closed here; by default the settings say.
        observer: is told what happens.
    """

    def __init__(
        self,
        settings: PoolSettings,
        provider: WorkerProvider | None = None,
        *,
        observer: PoolObserver | None = None,
    ) -> None:
        self._settings = settings
        self._provider_is_ours = provider is None
        self._provider = provider or make_provider(settings.pool, settings.devices, settings.ray)
        self._known_slots: tuple[Slot, ...] = ()
        self._observer = observer or Unobserved()
        self._lanes: dict[str, Lane] = {}
        self._hold: str | None = None
        self._lock = ServerLock(settings.data_dir, settings.server_id)
        self._work_dir = settings.data_dir / "work" / settings.server_id
        self._database = Database(settings.database_url)
        self._ledger = Ledger(self._database, settings.server_id, new_id("run"), settings.lease_seconds)
        self._left_logs = LogKeeper()
        self._outage = Outage()
        self._wake = threading.Event()
        self._asked_to_look = threading.Event()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._registered = False
        self._beat_at = 0.0
        self._look_at = 0.0

    def start(self) -> None:
        """Begin to serve, without waiting for the database or the workers.

        Raises:
            StateConflict: started before, or another process serves under this server id.
        """
        if self._thread is not None:
            raise StateConflict("This supervisor has been started before.", hint="Make a new one.")
        self._lock.acquire()
        # Left by a boot that was killed: its worker processes died with it.
        clear_work(self._work_dir)
        self._left_logs.keep_folder(self._work_dir / LOG_FOLDER, self._settings.database_url, self._settings.blob_url)
        self._match_lanes(self._provider)
        self._thread = threading.Thread(target=self._run, args=(self._provider,), name="supervisor", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop gracefully and wait for it.

        Attempts get the grace to stop at a safe point and are queued again, with no failure counted.
        """
        self._stopping.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join()

    def wake(self) -> None:
        """Look at the database now: a job was submitted or cancelled."""
        self._asked_to_look.set()
        self._wake.set()

    @property
    def server_id(self) -> str:
        return self._settings.server_id

    @property
    def alive(self) -> bool:
        """Whether the supervisor is serving."""
        return self._thread is not None and self._thread.is_alive()

    def status(self) -> list[dict[str, Any]]:
        """The slots: {name, device, host, state, pid, job_id, attempt, warm, problem, busy_seconds}."""
        return [lane.status() for lane in list(self._lanes.values())]

    def _run(self, provider: WorkerProvider) -> None:
        try:
            while not self._stopping.is_set():
                self._pass(time.monotonic(), provider)
                self._wait()
            self._drain(time.monotonic(), provider)
        finally:
            if self._provider_is_ours:
                provider.close()
            self._left_logs.flush(LEFT_LOG_SECONDS)
            self._database.dispose()
            self._lock.release()

    def _wait(self) -> None:
        now = time.monotonic()
        lanes = self._lanes.values()
        events = [lane.next_event() for lane in lanes if lane.running is not None or not self._stopping.is_set()]
        due = min((moment for moment in events if moment is not None), default=now + self._settings.poll_seconds)
        self._wake.wait(max(0.0, min(due - now, self._settings.poll_seconds)))
        self._wake.clear()

    def _pass(self, now: float, provider: WorkerProvider) -> None:
        """One round: act on the clock, talk to the database if it can be had, keep a worker on every slot."""
        if provider.slots() is not self._known_slots:
            self._match_lanes(provider)
        for lane in self._lanes.values():
            lane.step(now)
        self._talk(now, provider)
        for lane in self._lanes.values():
            if not self._stopping.is_set():
                lane.ensure_worker(now)
            elif lane.running is None:
                lane.end_worker()

    def _match_lanes(self, provider: WorkerProvider) -> None:
        """One lane for each slot that the provider has now; those of slots that are gone end with their attempt."""
        self._known_slots = provider.slots()
        slots = {slot.name: slot for slot in self._known_slots}
        for name, slot in slots.items():
            if name not in self._lanes:
                self._lanes[name] = Lane(slot, provider, self._wake.set, self._settings.grace_seconds)
            self._lanes[name].retired = False
        for name in self._lanes.keys() - slots.keys():
            self._lanes[name].retired = True
            if self._lanes[name].removable:
                del self._lanes[name]

    def _talk(self, now: float, provider: WorkerProvider) -> None:
        """All that needs the database. Its outages, and bugs, end this round, never the supervisor."""
        if not self._outage.may_try(now):
            return
        try:
            self._exchange(now, provider)
        except (DatabaseUnavailable, DiskFull) as error:
            self._outage.begin(now, error.detail)
        except Exception as error:
            log.exception("supervisor_round_failed")
            self._outage.begin(now, repr(error))
        else:
            self._outage.end()

    def _exchange(self, now: float, provider: WorkerProvider) -> None:
        if not self._registered:
            self._register()
        self._beat(now, provider)
        self._heed_standing(now)
        self._record_pids()
        for lane in self._lanes.values():
            if lane.finished:
                self._settle(lane)
        if not self._stopping.is_set():
            self._claim()

    def _register(self) -> None:
        released = self._ledger.register(socket.gethostname(), self.status(), self._settings.pool)
        self._registered = True
        self._beat_at = 0.0
        log.info(
            "server_registered", server_id=self._settings.server_id, slots=len(self._lanes), jobs_released=released
        )

    def _beat(self, now: float, provider: WorkerProvider) -> None:
        """Now and then: renew what runs or waits to be settled, show a sign of life, take over from silent servers."""
        if now < self._beat_at:
            return
        self._match_lanes(provider)
        running = self._running()
        if running:
            asked_at = time.monotonic()
            self._ledger.renew([item.key for item in running])
            for item in running:
                item.lease_ends = asked_at + self._settings.lease_seconds
        expired = self._ledger.beat(self.status())
        if expired:
            log.warning("leases_expired", jobs=expired)
        self._beat_at = now + self._settings.beat_seconds

    def _heed_standing(self, now: float) -> None:
        """Stop attempts whose job is being cancelled or that count no more."""
        if now < self._look_at and not self._asked_to_look.is_set():
            return
        self._asked_to_look.clear()
        running = self._running()
        if running:
            standing = self._ledger.standing([item.key for item in running])
            for lane in self._lanes.values():
                if lane.running is None:
                    continue
                answer = standing[lane.running.key]
                if answer == "cancel":
                    lane.stop(Stop.CANCEL, now)
                elif answer == "lost":
                    lane.stop(Stop.LOST, now)
                lane.step(now)
        self._look_at = now + self._settings.poll_seconds

    def _record_pids(self) -> None:
        """Write down the processes that attempts on several devices got after their claim."""
        for running in self._running():
            if running.new_pid is not None:
                with suppress(AttemptStale):  # what is stale is stopped when its standing is looked at
                    self._ledger.record_pid(running.key, running.new_pid)
                running.new_pid = None

    def _running(self) -> list[Running]:
        return [lane.running for lane in self._lanes.values() if lane.running is not None]

    def _claim(self) -> None:
        """Give the idle slots the jobs that are next."""
        idle = {name: lane for name, lane in self._lanes.items() if lane.idle}
        if not idle or not self._ledger.work_waits():
            return
        capacity: dict[str, int] = {}
        for lane in self._lanes.values():
            if not lane.retired:
                capacity[lane.host] = capacity.get(lane.host, 0) + 1
        asked_at = time.monotonic()
        found = self._ledger.claim([lane.offer() for lane in idle.values()], capacity, self._hold)
        self._observer.claim_took(time.monotonic() - asked_at)
        self._hold = found.hold
        for claim in found.claims:
            self._observer.claimed(claim.kind, claim.waited_seconds)
            self._assign([idle[name] for name in claim.slots], claim, asked_at)

    def _assign(self, lanes: Sequence[Lane], claim: Claim, asked_at: float) -> None:
        lane, *partners = lanes
        function = self._settings.kinds.get(claim.kind)
        if function is None:
            self._ledger.fail((claim.job_id, claim.attempt), failures.unknown_kind(claim.kind), NO_PROCESS)
            return
        timeout = claim.resources.get("timeout_seconds")
        now = time.monotonic()
        lane.assign(
            claim,
            self._spec(lane, claim, function),
            now=now,
            lease_ends=asked_at + self._settings.lease_seconds,
            deadline=now + float(timeout) if timeout is not None else None,
            partners=partners,
        )
        log.info("attempt_started", job_id=claim.job_id, attempt=claim.attempt, slots=claim.slots, kind=claim.kind)

    def _spec(self, lane: Lane, claim: Claim, function: str) -> AttemptSpec:
        name = f"{claim.job_id}-{claim.attempt}"
        return AttemptSpec(
            job_id=claim.job_id,
            attempt=claim.attempt,
            kind=claim.kind,
            params=claim.params,
            slot=lane.slot.name,
            device=device_in_worker(lane.slot),
            database_url=self._settings.database_url,
            blob_url=self._settings.blob_url,
            scratch=str(self._work_dir / name),
            cache=str(self._settings.data_dir / "cache" / "blobs"),
            model_roots=tuple(str(root) for root in self._settings.model_roots),
            function=function,
            log=str(self._work_dir / LOG_FOLDER / f"{name}.log"),
            devices=claim.devices,
            warm_bytes=self._warm_bytes(lane),
            safety_checker=self._settings.safety_checker,
            remotes=self._settings.remotes,
            resources=claim.resources,
        )

    def _warm_bytes(self, lane: Lane) -> int | None:
        """What its worker may keep; workers without a device of their own share the main memory."""
        if self._settings.warm_bytes is not None or lane.slot.device != "cpu":
            return self._settings.warm_bytes
        neighbours = sum(other.host == lane.host for other in self._lanes.values())
        return base_models.host_limit() // max(1, neighbours)

    def _settle(self, lane: Lane) -> None:
        """Write how the attempt ended. The slot is free afterwards; while the database is away, it is not."""
        running, ended, outcome = lane.running, lane.exit, lane.outcome
        assert running is not None
        settlement = settle(
            outcome, running.stop, ended, resources=running.claim.resources, start_problem=lane.start_problem
        )
        error = dict(settlement.error or {})
        if error and (outcome is None or outcome.retry != "never" or error.get("code") == "internal_error"):
            error["log"] = lane.log_tail()
        claim = running.claim
        known = log.bind(job_id=claim.job_id, attempt=claim.attempt, slot=lane.slot.name)
        try:
            delay = back_off(claim.attempt, self._settings.retry_seconds)
            paused = outcome is not None and outcome.state == "paused"
            state = self._ledger.settle(running, replace(settlement, error=error), ended, delay, paused=paused)
        except AttemptStale as stale:
            known.warning("attempt_was_stale", detail=stale.detail)
            state = "lost"
        except (DatabaseUnavailable, DiskFull):
            raise
        except Exception as broken:
            state = self._ledger.fail_plainly(running.key, failures.end_not_written(broken), ended)
        else:
            known.info("attempt_ended", state=state, error=error.get("code"), detail=error.get("detail"), exit=ended)
        if state == "queued":
            self._observer.retried(claim.kind, str(error.get("code")))
        self._observer.ended(claim.kind, state, time.monotonic() - running.began)
        lane.clear()

    def _drain(self, now: float, provider: WorkerProvider) -> None:
        """Stop the attempts, reap every worker, and give the jobs back."""
        for lane in self._lanes.values():
            lane.stop(Stop.DRAIN, now)
        give_up_at = now + self._settings.grace_seconds + DRAIN_MARGIN_SECONDS
        while self._busy() and now < give_up_at:
            self._pass(now, provider)
            if self._busy():
                self._wait()
            now = time.monotonic()
        if not self._registered:
            return
        try:
            released = self._ledger.release_all()
        except (DatabaseUnavailable, DiskFull) as error:
            log.error("jobs_not_released", detail=error.detail, hint="The next start of this server releases them.")
        else:
            log.info("server_stopped", jobs_released=released)

    def _busy(self) -> bool:
        return any(lane.busy for lane in self._lanes.values())
