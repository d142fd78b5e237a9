"""Rule 2, whole: whatever is written in the name of an attempt is refused once a newer one owns the job."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from artifacts.errors import AttemptStale
from storage import checkpoints, claims, job_logs, job_metrics, jobs
from storage.database import Database
from storage.job_logs import Piece
from storage.job_metrics import Point
from storage.tables import Base, JobAttemptRow

ERROR = {"code": "worker_crashed", "detail": "killed"}
# How each function that writes for an attempt is called. `record_log` and `drop_pieces` move the log of an attempt
# that has ended, in its own row: a newer attempt does not see it.
WRITES: dict[str, Callable[[Session, str], Any]] = {
    "claims.fence": lambda session, job_id: claims.fence(session, job_id, 1),
    "claims.record_pid": lambda session, job_id: claims.record_pid(session, job_id, 1, 4711),
    "claims.record_progress": lambda session, job_id: claims.record_progress(
        session, job_id, 1, fraction=0.9, message="stale"
    ),
    "claims.finish_succeeded": lambda session, job_id: claims.finish_succeeded(session, job_id, 1, {"adapters": []}),
    "claims.finish_failed": lambda session, job_id: claims.finish_failed(session, job_id, 1, ERROR),
    "claims.finish_cancelled": lambda session, job_id: claims.finish_cancelled(session, job_id, 1),
    "claims.requeue": lambda session, job_id: claims.requeue(
        session, job_id, 1, delay_seconds=0, error=ERROR, exit=None
    ),
    "checkpoints.record_checkpoint": lambda session, job_id: checkpoints.record_checkpoint(
        session, job_id, 1, step=1, sha256="0" * 64, size=1
    ),
    "job_metrics.record_metrics": lambda session, job_id: job_metrics.record_metrics(
        session, job_id, 1, [Point(1, {"loss": 1.0})]
    ),
    "job_logs.append_pieces": lambda session, job_id: job_logs.append_pieces(session, job_id, 1, [Piece(0, "stale")]),
}
OWN_ROW_ONLY = {"claims.record_log", "job_logs.drop_pieces"}
READS = {"job_logs.pieces_from", "job_logs.log_state"}


def takes_an_attempt(module: ModuleType) -> set[str]:
    """The public functions of a module that are given a job's id and an attempt."""
    name = module.__name__.rpartition(".")[2]
    return {
        f"{name}.{function}"
        for function, value in inspect.getmembers(module, inspect.isfunction)
        if {"job_id", "attempt"} <= inspect.signature(value).parameters.keys() and not function.startswith("_")
    } - {f"{name}.{imported}" for imported in ("lock_attempt", "lock_running", "close_attempt")}  # they only lock


def test_every_function_that_takes_an_attempt_is_known_here() -> None:
    modules = (claims, job_logs, checkpoints, job_metrics)
    assert set().union(*map(takes_an_attempt, modules)) == WRITES.keys() | OWN_ROW_ONLY | READS


@pytest.mark.parametrize("write", sorted(WRITES))
@pytest.mark.parametrize("situation", ["queued again", "runs in its second attempt", "succeeded in its second attempt"])
def test_a_stale_attempt_changes_no_row(database: Database, write: str, situation: str) -> None:
    with database.write() as session:
        job_id = jobs.create_job(session, "merge", {}).id
        _claim(session)
        claims.requeue(session, job_id, 1, delay_seconds=0, error=ERROR, exit=None)
    if situation != "queued again":
        with database.write() as session:
            _claim(session)
    if situation == "succeeded in its second attempt":
        with database.write() as session:
            claims.finish_succeeded(session, job_id, 2, {"adapters": [], "images": [], "report": {}})
    before = _everything(database)
    with database.write() as session:
        if write == "job_logs.append_pieces":
            assert WRITES[write](session, job_id) is False
        else:
            with pytest.raises(AttemptStale):
                WRITES[write](session, job_id)
    assert _everything(database) == before


def test_the_log_of_an_old_attempt_is_noted_in_its_own_row_only(database: Database) -> None:
    with database.write() as session:
        job_id = jobs.create_job(session, "merge", {}).id
        _claim(session)
        claims.requeue(session, job_id, 1, delay_seconds=0, error=ERROR, exit=None)
    with database.write() as session:
        _claim(session)
        job_logs.append_pieces(session, job_id, 2, [Piece(0, "of the second")])
    with database.write() as session:
        claims.record_log(session, job_id, 1, "0" * 64)
        job_logs.drop_pieces(session, job_id, 1)
    with database.read() as session:
        kept = session.scalars(select(JobAttemptRow).order_by(JobAttemptRow.attempt)).all()
        assert [row.log_sha256 for row in kept] == ["0" * 64, None]
        assert job_logs.pieces_from(session, job_id, 2, 0) == [Piece(0, "of the second")]


def _claim(session: Session) -> None:
    assert claims.claim_next(session, server_id="srv", boot_id="boot", slot="cpu:0", lease_seconds=60) is not None


def _everything(database: Database) -> dict[str, list[Any]]:
    """Every row of every table."""
    with database.read() as session:
        return {
            table.name: sorted(map(repr, session.execute(select(table)).all())) for table in Base.metadata.sorted_tables
        }
