"""Schedules at work: the job of a firing is checked as any other submission, and looked for every second."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime

import structlog
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from app.fleets import KIND, submit_item
from app.job_kinds import check_submission
from app.job_making import make_job
from app.settings import Settings
from artifacts.errors import QueueFull, QuotaExceeded, RankwiseError
from artifacts.menu import accepted_parameters
from storage import database as clock
from storage import domain_events, firings, fleets, parking
from storage.database import Database
from storage.fleets import MadeJob
from storage.tables import FiringItemRow, FiringRow, JobRow, ScheduleRow

_log = structlog.stdlib.get_logger(__name__)


def submit_scheduled(
    settings: Settings,
    session: Session,
    row: ScheduleRow,
    *,
    created_by: str | None,
    request_id: str | None = None,
) -> JobRow:
    """Check and create a schedule's job.

    Raises:
        RequestInvalid and its kin: what was possible when the schedule was made no longer is.
        QueueFull, QuotaExceeded
    """
    with accepted_parameters():
        wanted = check_submission(settings, session, row.job_kind, row.job_params, row.job_resources)
    job, _ = make_job(settings, session, wanted, created_by=created_by, request_id=request_id, schedule_id=row.id)
    return job


class Scheduler:
    """Fires what is due. Any number of servers may do so at once: each firing happens on one of them.

    Args:
        fired: told the kind of every job that was made here, once it is there.
    """

    def __init__(self, settings: Settings, database: Database, fired: Callable[[str], None]) -> None:
        self._settings = settings
        self._database = database
        self._fired = fired
        self._seen: datetime | None = None
        self._made: list[str] = []
        self._interrupted = threading.Event()

    def run(self) -> None:
        """One turn: everything that is due now.

        Raises:
            DatabaseUnavailable, DiskFull: what was fired so far stays fired; the rest is still due.
        """
        with self._database.read() as session:
            moment = clock.now(session)
        if self._seen is None or moment < self._seen:
            # At the start, too: the clock may have been set while no server ran.
            with self._database.write() as session:
                moved = firings.resettle(session)
            if moved:
                _log.warning("schedules_resettled", schedules=moved, clock=moment.isoformat())
        self._seen = moment
        self._work_off(firings.is_due, self._fire_due)
        self._work_off(domain_events.any_open, self._fire_event)
        self._park()
        while not self._interrupted.is_set() and self._feed_fleets():
            pass

    def interrupt(self) -> None:
        """Let the present turn end after the firing that it is at. Safe from any thread."""
        self._interrupted.set()

    def _work_off(self, waits: Callable[[Session], bool], fire: Callable[[Session], list[FiringRow]]) -> None:
        """Fire one by one, until nothing is left or the rest is in the hands of other servers."""
        while not self._interrupted.is_set():
            with self._database.read() as session:  # a look costs no turn at writing
                if not waits(session):
                    return
            self._made = []
            with self._database.write() as session:
                written = fire(session)
            for firing in written:
                _tell(firing)
            for kind in self._made:
                self._fired(kind)
            if not written:
                return

    def _fire_due(self, session: Session) -> list[FiringRow]:
        return firings.fire_due(session, self._submit)

    def _fire_event(self, session: Session) -> list[FiringRow]:
        firing = firings.fire_event(session, self._submit)
        return [] if firing is None else [firing]

    def _park(self) -> None:
        """Jobs that wait for a device wait on when their schedule's window closes."""
        with self._database.read() as session:
            due = parking.is_due(session)
        if due:
            with self._database.write() as session:
                changed = parking.settle(session)
            _log.info("windows_settled", jobs=changed)

    def _feed_fleets(self) -> bool:
        """One job for each schedule whose fleet may have another; whether any was made."""
        with self._database.read() as session:
            ready = fleets.ready(session)
        fed = False
        for schedule_id in ready:
            if self._interrupted.is_set():
                break
            try:
                with self._database.write() as session:
                    item = fleets.feed(session, schedule_id, self._submit_item)
            except (QueueFull, QuotaExceeded) as error:
                _log.info("fleet_waits", schedule=schedule_id, code=error.code, detail=error.detail)
                continue
            if item is not None:
                fed = True
                _tell_item(item)
                if item.state == "job":
                    self._fired(KIND)
        return fed

    def _submit_item(self, session: Session, row: ScheduleRow, adapter_id: str) -> MadeJob:
        with self._checked(row):
            return submit_item(self._settings, session, row, adapter_id)

    def _submit(self, session: Session, row: ScheduleRow) -> JobRow:
        with self._checked(row):
            job = submit_scheduled(self._settings, session, row, created_by=row.created_by)
        self._made.append(job.kind)
        return job

    @staticmethod
    @contextmanager
    def _checked(row: ScheduleRow) -> Iterator[None]:
        """One job that can not even be checked must not keep all other schedules from firing."""
        try:
            yield
        except (RankwiseError, SQLAlchemyError):
            raise
        except Exception as error:
            _log.exception("scheduled_job_not_checked", schedule=row.id, kind=row.job_kind)
            raise RankwiseError("the job could not be checked; the server's log says why") from error


def _tell_item(item: FiringItemRow) -> None:
    tell = _log.warning if item.state == "refused" else _log.info
    tell(
        "fleet_item",
        schedule=item.schedule_id,
        occurrence=item.occurrence,
        adapter=item.adapter_id,
        state=item.state,
        job=item.job_id,
        detail=item.detail,
    )


def _tell(firing: FiringRow) -> None:
    tell = _log.info if firing.outcome in ("job", "fleet") else _log.warning
    tell(
        "schedule_fired",
        schedule=firing.schedule_id,
        occurrence=firing.occurrence,
        outcome=firing.outcome,
        job=firing.job_id,
        detail=firing.detail,
    )
