"""What remote clients give, as rows: taken once, never after the round or the training, and whatever dies meanwhile."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import update

from artifacts.errors import Gone, NotFound, StateConflict
from artifacts.manifest import FileEntry
from storage import claims, federations, jobs, remote_clients
from storage.conditions import AWAITING
from storage.database import Database, now
from storage.federations import Asked
from storage.tables import ClientUpdateRow


def file(digit: str) -> FileEntry:
    return FileEntry("update.safetensors", digit * 64, 12, "application/octet-stream")


@pytest.fixture
def run(database: Database) -> str:
    """A training whose first round waits for a job and two remote clients."""
    with database.write() as session:
        run_id = jobs.create_job(session, "train", {}).id
        claim = claims.claim_next(session, server_id="srv", boot_id="boot", slot="cpu:0", lease_seconds=60.0)
        assert claim is not None

    def before(session: Any) -> None:
        asked = [Asked(0, {"run": run_id, "client": 0}), Asked(1, None), Asked(2, None)]
        federations.open_round(session, run_id, 0, asked, seconds=600.0, affinity=None)

    with database.write() as session:
        federations.suspend(session, run_id, claim.attempt, before=before, message="at work", fraction=0.5)
    return run_id


def give(database: Database, run: str, client: int, digit: str = "a", rows: int = 3) -> bool:
    """Whether it was new."""
    with database.write() as session:
        details = {"rows": rows, "sha256": digit * 64}
        return remote_clients.give(session, run, 0, client, file(digit), details)[1]


def waits(database: Database, run: str) -> bool:
    with database.read() as session:
        return jobs.get_job(session, run).available_at == AWAITING


def states(database: Database, run: str) -> list[str]:
    with database.read() as session:
        return [row.state for row in federations.updates_of(session, run, 0)]


def test_the_last_of_jobs_and_remote_clients_wakes_the_training(database: Database, run: str) -> None:
    assert give(database, run, 1)
    assert not give(database, run, 1)
    assert give(database, run, 2)
    assert waits(database, run)
    with database.write() as session:
        claim = claims.claim_next(session, server_id="srv", boot_id="boot", slot="cpu:0", lease_seconds=60.0)
        assert claim is not None
        federations.answer(session, run, 0, 0, file("b"), {"rows": 4})
    assert not waits(database, run)
    assert states(database, run) == ["answered"] * 3
    assert not give(database, run, 1)  # an answer that was lost is given again


def test_other_bytes_or_another_number_of_rows_change_nothing(database: Database, run: str) -> None:
    give(database, run, 1)
    for digit, rows in (("b", 3), ("a", 4)):
        with pytest.raises(StateConflict, match="given other bytes or another number of rows"):
            give(database, run, 1, digit, rows)
    with database.read() as session:
        row = federations.updates_of(session, run, 0)[1]
    assert (row.sha256, row.details["rows"]) == ("a" * 64, 3)
    with pytest.raises(NotFound, match="client 3 of"):
        give(database, run, 3)


def test_a_late_remote_client_is_left_and_has_no_job_to_cancel(database: Database, run: str) -> None:
    with database.write() as session:
        passed = now(session) - timedelta(seconds=1)
        session.execute(update(ClientUpdateRow).where(ClientUpdateRow.client == 2).values(deadline=passed))
    with pytest.raises(StateConflict, match="it ended at"):
        give(database, run, 2)
    give(database, run, 1)
    with database.write() as session:
        assert federations.settle(session, run) == []
    assert states(database, run) == ["pending", "answered", "late"]
    with pytest.raises(StateConflict, match="counts as late: not done at"):
        give(database, run, 2)


def test_a_training_that_is_cancelled_or_failed_takes_nothing_and_keeps_nothing(database: Database, run: str) -> None:
    give(database, run, 1)
    with database.write() as session:
        jobs.request_cancel(session, run)
    with pytest.raises(Gone, match="is cancelled"):
        give(database, run, 2)
    with database.write() as session:
        assert len(federations.settle(session, run)) == 1  # the job of client 0
    with database.read() as session:
        rows = federations.updates_of(session, run, 0)
    assert [(row.state, row.sha256) for row in rows] == [("lost", None), ("answered", None), ("lost", None)]
    with pytest.raises(Gone):
        give(database, run, 2)
    with database.read() as session, pytest.raises(Gone):
        remote_clients.start_of(session, run, 0)
