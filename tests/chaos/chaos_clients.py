"""The users of a round: they submit and cancel jobs, over HTTP and beside it, and try again when nobody answers."""

from __future__ import annotations

import heapq
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import chaos_outbox
import httpx
from chaos_databases import OUTAGES
from chaos_plan import PlannedJob

from artifacts.errors import StateConflict
from storage import jobs
from storage.database import Database

AGAIN_SECONDS = 0.3
ANSWER_SECONDS = 4.0


class Clients:
    """Works off its agenda in a thread. What it notes was acknowledged to a user, so it must be true for ever.

    Attributes:
        submitted: planned number → job id.
        cancelled: ids of the jobs whose cancel was accepted.
    """

    def __init__(
        self,
        planned: Sequence[PlannedJob],
        database: Database,
        url: str,
        prepare: Callable[[PlannedJob], dict[str, Any]],
        events: Sequence[float] = (),
    ) -> None:
        self.submitted: dict[int, str] = {}
        self.cancelled: set[str] = set()
        self.error: BaseException | None = None
        self._database = database
        self._prepare = prepare
        self._http = httpx.Client(base_url=url, timeout=ANSWER_SECONDS, trust_env=False)
        self._planned = {job.number: job for job in planned}
        agenda = [(job.at, job.number, "submit") for job in planned]
        agenda += [(job.cancel_at, job.number, "cancel") for job in planned if job.cancel_at is not None]
        agenda += [(at, number, "publish") for number, at in enumerate(events)]
        heapq.heapify(agenda)
        self._agenda = agenda
        self._leave = threading.Event()
        self._thread = threading.Thread(target=self._run, name="chaos-clients")

    def start(self) -> None:
        self._began = time.monotonic()
        self._thread.start()

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def close(self) -> None:
        self._leave.set()
        if self._thread.ident is not None:
            self._thread.join()
        self._http.close()

    def _run(self) -> None:
        try:
            while self._agenda and not self._leave.is_set():
                at, number, what = heapq.heappop(self._agenda)
                self._leave.wait(max(0.0, at - self._passed()))
                if not self._act(what, number):
                    heapq.heappush(self._agenda, (self._passed() + AGAIN_SECONDS, number, what))
        except BaseException as error:
            self.error = error

    def _act(self, what: str, number: int) -> bool:
        match what:
            case "submit":
                return self._submit(self._planned[number])
            case "cancel":
                return self._cancel(self._planned[number])
            case "publish":
                return self._publish(number)
        raise AssertionError(what)

    def _passed(self) -> float:
        return time.monotonic() - self._began

    def _submit(self, job: PlannedJob) -> bool:
        """Whether it was acknowledged."""
        params = self._prepare(job)
        if job.over_http:
            headers = {"Idempotency-Key": f"chaos-{job.number}"}
            answer = self._ask("/merge", params, headers)
            if answer is None:
                return False
            assert answer.status_code == 202, answer.text
            self.submitted[job.number] = answer.json()["id"]
            return True
        try:
            with self._database.write() as session:
                row = jobs.create_job(session, job.kind, params, resources=job.resources, priority=job.priority)
        except OUTAGES:
            return False  # it may have been written all the same: then it runs as well
        self.submitted[job.number] = row.id
        return True

    def _cancel(self, job: PlannedJob) -> bool:
        """Whether it was answered."""
        job_id = self.submitted.get(job.number)
        if job_id is None:
            return False
        if job.number % 2:
            answer = self._ask(f"/jobs/{job_id}/cancel", None, {})
            if answer is None:
                return False
            assert answer.status_code in (200, 409), answer.text
            if answer.status_code == 200:
                self.cancelled.add(job_id)
            return True
        try:
            with self._database.write() as session:
                jobs.request_cancel(session, job_id)
        except OUTAGES:
            return False
        except StateConflict:
            return True
        self.cancelled.add(job_id)
        return True

    def _publish(self, number: int) -> bool:
        """Whether it was written; when that is not known, it happens again."""
        try:
            with self._database.write() as session:
                chaos_outbox.publish(session, number)
        except OUTAGES:
            return False
        return True

    def _ask(self, path: str, body: dict[str, Any] | None, headers: dict[str, str]) -> httpx.Response | None:
        """The answer, unless nobody was there, or only somebody who can not serve it now."""
        try:
            answer = self._http.post(path, json=body, headers=headers)
        except httpx.TransportError:
            return None
        in_flight = answer.status_code == 409 and answer.json()["code"] == "idempotency_in_flight"
        return None if in_flight or answer.status_code in (503, 507) else answer
