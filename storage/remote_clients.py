"""Clients of federated trainings on machines of their own: what they are asked for, and what they give.

What one gives is durable as soon as it is accepted, whatever becomes of the training's own process. Rows are locked in
the order of `storage.federations`: the client's update, then the training's job.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from artifacts.errors import Gone, NotFound, StateConflict
from artifacts.manifest import FileEntry
from storage import database
from storage.checkpoints import newest_checkpoint
from storage.federations import record_answer
from storage.tables import TERMINAL_STATES, ClientUpdateRow, JobCheckpointRow, JobRow


def newest_part(session: Session, run_id: str, client: int) -> ClientUpdateRow | None:
    """The client's part of the newest round that was opened."""
    parts = select(ClientUpdateRow).where(ClientUpdateRow.job_id == run_id, ClientUpdateRow.client == client)
    return session.scalars(parts.order_by(ClientUpdateRow.round.desc()).limit(1)).first()


def start_of(session: Session, run_id: str, round_: int) -> JobCheckpointRow:
    """The state of the training that the round begins with.

    Raises:
        Gone: the training has ended.
        StateConflict: the training is in another round.
    """
    row = newest_checkpoint(session, run_id)
    if row is None or row.step != round_:
        run = session.get_one(JobRow, run_id)
        _check_alive(run)
        now = "has not begun" if row is None else f"is in round {row.step + 1}"
        raise StateConflict(f"{run_id} {now}, not in round {round_ + 1}.", hint=_ASK)
    return row


def find_part(session: Session, run_id: str, round_: int, client: int) -> ClientUpdateRow:
    """A client's part of a round. Raises NotFound: it was not asked in that round."""
    row = session.get(ClientUpdateRow, (run_id, round_, client))
    if row is None:
        raise NotFound(f"client {client} of {run_id} was not asked in round {round_ + 1}", hint=_ASK)
    return row


def check_open(session: Session, row: ClientUpdateRow) -> None:
    """Whether something new may be given for this part.

    Raises:
        Gone: the training has ended; nothing is taken any more.
        StateConflict: the part is over: given already, late, or lost.
    """
    run = session.get_one(JobRow, row.job_id, populate_existing=True)
    _check_alive(run)
    told = f"round {row.round + 1} of {row.job_id} does not wait for client {row.client} any more"
    if row.state == "answered":
        raise StateConflict(f"{told}: it has given other bytes or another number of rows.", hint=_ASK)
    if row.state != "pending":
        raise StateConflict(f"{told}: it counts as {row.state}: {row.reason}", hint=_ASK)
    if database.now(session) >= row.deadline:
        raise StateConflict(f"{told}: it ended at {row.deadline.isoformat(timespec='seconds')}.", hint=_ASK)


def is_same(row: ClientUpdateRow, sha256: str, rows: int) -> bool:
    """Whether this was given for the part before, and taken."""
    return row.state == "answered" and (row.details.get("sha256"), row.details.get("rows")) == (sha256, rows)


def give(
    session: Session, run_id: str, round_: int, client: int, file: FileEntry, details: Mapping[str, Any]
) -> tuple[ClientUpdateRow, bool]:
    """The client's tensors are in the store and were found usable. The same again changes nothing.

    Args:
        details: among them `sha256` and `rows`.

    Returns:
        The part, and whether it was given just now.

    Raises:
        NotFound, Gone, StateConflict: see `find_part` and `check_open`.
    """
    find_part(session, run_id, round_, client)
    row = session.get_one(ClientUpdateRow, (run_id, round_, client), with_for_update=True, populate_existing=True)
    if is_same(row, file.sha256, details["rows"]):
        return row, False
    if row.state == "pending":
        # A training that is cancelled in this moment does not keep what nobody will average.
        session.get_one(JobRow, run_id, with_for_update=True, populate_existing=True)
    check_open(session, row)
    record_answer(session, row, file, details)
    return row, True


_ASK = "GET /jobs/{id}/clients/{client} tells which round is open."


def _check_alive(run: JobRow) -> None:
    if run.state in TERMINAL_STATES or run.cancel_requested:
        state = run.state if run.state in TERMINAL_STATES else "being cancelled"
        raise Gone(f"The training {run.id} is {state}: nothing of its clients is taken any more.")
