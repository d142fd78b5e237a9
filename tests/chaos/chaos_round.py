"""One round: servers, users and an adversary on one database and blob store, and the invariants afterwards."""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import chaos_clock
import chaos_outbox
import httpx
import pytest
from chaos_adversary import Adversary, Timeline
from chaos_clients import Clients
from chaos_databases import OUTAGES, DatabaseUnderChaos
from chaos_disk import Disk
from chaos_fleet import Fleet, marked_processes
from chaos_invariants import Expected, Violation, check_blobs, check_folders, check_outcome, check_rows
from chaos_plan import Plan, PlannedJob, canaries
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from storage import jobs
from storage.blobs import BlobStore
from storage.database import Database
from storage.log_rescue import rescue_logs
from storage.sweep import sweep_blobs
from storage.tables import TERMINAL_STATES, JobEventRow, JobRow

LEASE_SECONDS = 2.0
SETTINGS = {
    "LEASE_SECONDS": str(LEASE_SECONDS),
    "BEAT_SECONDS": "0.5",
    "GRACE_SECONDS": "1",
    "MAX_QUEUED_JOBS": "100000",
    "LOG_LEVEL": "info",
}
RECOVERY_SECONDS = 100.0
STOP_SECONDS = 30.0
LOG_LINES = 40


@dataclass
class Round:
    """What one round needs, and what it found."""

    plan: Plan
    folder: Path
    disk: Disk
    under: DatabaseUnderChaos
    add_adapters: Callable[[Database, BlobStore], list[str]]

    def run(self) -> None:
        """Play the round; fails with everything that is needed to understand and to replay it."""
        print(f"\nCHAOS_SEED={self.plan.seed} replays this round on {self.under.url.partition(':')[0]}")
        self.timeline = Timeline()
        self.database = self.under.connect()
        self.blobs = BlobStore((self.disk.folder / "blobs").as_uri())
        self.database.upgrade()
        self.adapters = self.add_adapters(self.database, self.blobs)
        with self.database.write() as session:
            chaos_outbox.set_up(session, {"adapters": [{"id": item} for item in self.adapters], "method": "cat"})
        self.gates = [self.folder / f"gate-{number}" for number in range(len(self.plan.gates))]
        for gate in self.gates:
            os.mkfifo(gate)
        settings = {**SETTINGS, "DATABASE_URL": self.under.url, "BLOB_URL": self.blobs.url}
        if self.under.clock_file is not None:
            settings[chaos_clock.VARIABLE.removeprefix("RANKWISE_")] = str(self.under.clock_file)
        self.fleet = Fleet(
            uuid.uuid4().hex, self.disk.folder, self.folder, settings, self.plan.restart_after, self.timeline.tell
        )
        try:
            self._play()
        finally:
            self.fleet.destroy()
            self.database.dispose()

    def _play(self) -> None:
        adversary = Adversary(self.plan, self.fleet, self.under, self.disk, self.gates, self.timeline)
        users = Clients(self.plan.jobs, self.database, self.fleet.url, self._params, self.plan.events)
        calm_users = Clients(canaries(), self.database, self.fleet.url, self._params)
        try:
            self.fleet.start()
            self._await("the service answers", self._answers)
            users.start()
            adversary.play()
            self._await("the users have said all", lambda: users.done)
            self._await("every event is handled", self._all_handled)
            self._await("no schedule fires any more", self._stop_schedules)
            self._await("every job has ended", lambda: self._left() == 0, self._left)
            calm_users.start()
            self._await("the users have said all", lambda: calm_users.done)
            self._await("every job has ended", lambda: self._left() == 0, self._left)
            self._await("every log is kept", self._logs_kept)
        finally:
            users.close()
            calm_users.close()
            adversary.close()
        for error in (users.error, calm_users.error):
            if error is not None:
                raise error
        self._check(users, calm_users)

    def _check(self, users: Clients, calm_users: Clients) -> None:
        self._await("all slots are free", lambda: not self._busy_slots())
        found = [
            Violation("no orphan process", f"{process.pid} {process.name()} belongs to no server")
            for process in self.fleet.strangers()
        ]
        found += [Violation("a server stops when told to", line) for line in self.fleet.stop(STOP_SECONDS)]
        found += [
            Violation("no orphan process", f"{process.pid} {process.name()} outlived its server")
            for process in marked_processes(self.fleet.run)
        ]
        self.under.jump(3600.0)  # however the clock was set: all that is left over is old now
        rescue_logs(self.database, self.blobs, older_than=timedelta(0))
        sweep_blobs(self.database, self.blobs, older_than=timedelta(0))
        with self.database.read() as session:
            print("\n".join([*self.timeline.lines, _summary(session)]))
            found += check_rows(session)
            found += check_blobs(session, self.blobs)
            found += chaos_outbox.check_firings(session)
            found += chaos_outbox.check_messages(session)
            found += chaos_outbox.check_scheduled_results(session)
            chatty = [calm_users.submitted[plan.number] for plan in canaries() if plan.kind == "chatty"]
            found += chaos_outbox.check_logs(session, self.blobs, chatty)
            found += self._check_users(session, users, self.plan.jobs, calm=False)
            found += self._check_users(session, calm_users, canaries(), calm=True)
        found += check_folders(self.fleet.data_dirs, self.fleet.locks)
        if found:
            self._fail("promises were broken", found)

    def _check_users(
        self, session: Session, users: Clients, planned: tuple[PlannedJob, ...], *, calm: bool
    ) -> list[Violation]:
        found = []
        for plan in planned:
            job = session.get(JobRow, users.submitted[plan.number])
            if job is None:
                found.append(Violation("no job is lost", f"{users.submitted[plan.number]} was acknowledged"))
                continue
            if job.id in users.cancelled and job.state != "cancelled":
                found.append(Violation("a cancelled job is cancelled", f"it is {job.state}", job.id))
            found += check_outcome(job, expected_of(plan), calm=calm)
        merges = [plan for plan in planned if plan.over_http]
        names = {users.submitted[plan.number] for plan in merges}
        if len(names) != len(merges):
            found.append(Violation("one key makes one job", f"{len(merges)} keys, {len(names)} jobs"))
        return found

    def _params(self, job: PlannedJob) -> dict[str, Any]:
        """The parameters with the paths and ids of this round."""
        if job.kind == "gated":
            return {"gate": str(self.gates[job.params["gate"]])}
        if job.kind == "merge":
            first, second = self.adapters
            weighted = [{"id": first, "weight": job.params["weight"]}, {"id": second}]
            chosen = {name: job.params[name] for name in ("method", "parameters")}
            return {**chosen, "adapters": weighted, "name": f"chaos {job.number}"}
        return job.params

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.fleet.url}/readyz", timeout=5, trust_env=False).status_code == 200
        except httpx.TransportError:
            return False

    def _all_handled(self) -> bool:
        with self.database.read() as session:
            return chaos_outbox.all_handled(session)

    def _stop_schedules(self) -> bool:
        with self.database.write() as session:
            chaos_outbox.stop_schedules(session)
        return True

    def _logs_kept(self) -> bool:
        return not any(path for folder in self.fleet.data_dirs for path in (folder / "work").glob("*/logs/*"))

    def _left(self) -> int:
        """The number of jobs that have not ended."""
        with self.database.read() as session:
            unfinished = select(func.count()).select_from(JobRow).where(JobRow.state.not_in(TERMINAL_STATES))
            return session.scalar(unfinished) or 0

    def _busy_slots(self) -> list[str]:
        """Slots that do not wait for a job, of all servers, as the service tells them."""
        answer = httpx.get(f"{self.fleet.url}/workers", timeout=5, trust_env=False)
        servers = answer.json()["items"] if answer.status_code == 200 else []
        if len(servers) < len(self.fleet.servers):
            return ["those of a server that does not answer"]
        return [slot["name"] for server in servers for slot in server["slots"] if slot["state"] != "idle"]

    def _await(self, what: str, condition: Callable[[], Any], left: Callable[[], int] = lambda: 0) -> None:
        """Keep the servers running until `condition` holds; an outage is not yet an answer.

        Args:
            left: how much there is still to do; as long as it becomes less, it is only slow.
        """
        pause = threading.Event()
        deadline = time.monotonic() + RECOVERY_SECONDS
        least: int | None = None
        while True:
            self.fleet.keep()
            try:
                now_left = left()
                if least is None or now_left < least:
                    least, deadline = now_left, time.monotonic() + RECOVERY_SECONDS
                if condition():
                    self.timeline.tell(what)
                    return
            except (*OUTAGES, httpx.TransportError) as error:
                self.timeline.tell(f"while waiting: {error!r}")
            if time.monotonic() > deadline:
                self._fail(f"no progress for {RECOVERY_SECONDS:g} s: {what}", self._unfinished())
            pause.wait(0.1)

    def _unfinished(self) -> list[Violation]:
        with self.database.read() as session:
            left = session.scalars(select(JobRow).where(JobRow.state.not_in(TERMINAL_STATES)).limit(5)).all()
            told = ("state", "attempt", "failures", "server_id", "slot", "lease_expires_at", "available_at")
            return [
                Violation("every job ends", str({name: getattr(job, name) for name in told}), job.id) for job in left
            ]

    def _fail(self, why: str, found: list[Violation]) -> None:
        lines = [f"seed {self.plan.seed}: {why}", *(f"  {violation}" for violation in found)]
        with self.database.read() as session:
            for job_id in dict.fromkeys(item.job_id for item in found if item.job_id is not None):
                job = jobs.get_job(session, job_id)
                lines.append(f"{job.kind} {job_id}:")
                lines += [
                    f"  {row.created_at:%H:%M:%S.%f} {row.sequence} {row.type} {row.data}"
                    for row in jobs.events_after(session, job_id, 0)
                ]
        lines += ["timeline:", *self.timeline.lines]
        for server in self.fleet.servers.values():
            lines.append(f"the end of {server.log}:")
            lines += server.log.read_text(errors="replace").splitlines()[-LOG_LINES:]
        pytest.fail("\n".join(lines), pytrace=False)


def _summary(session: Session) -> str:
    """How the jobs ended, to see that there was something to see."""
    jobs_ = session.scalars(select(JobRow)).all()
    ends = Counter(f"{job.state} {job.error['code'] if job.error is not None else ''}".strip() for job in jobs_)
    told = session.scalars(select(JobEventRow.data).where(JobEventRow.type == "state"))
    again = Counter(data["reason"]["code"] for data in told if "reason" in data)
    return f"{len(jobs_)} jobs ended as {dict(ends.most_common())}, were run again for {dict(again.most_common())}"


def expected_of(job: PlannedJob) -> Expected:
    """What this job ends as when nothing happens to it."""
    match job.kind:
        case "user_error":
            return Expected("failed", "invalid_request")
        case "crash_always":
            return Expected("failed", "worker_crashed", failures=4)
        case "device_memory" if job.params["always"]:
            return Expected("failed", "cuda_out_of_memory", failures=1)
        case "crash_once" | "infrastructure_once" | "device_memory":
            return Expected("succeeded", failures=1)
    return Expected("succeeded")
