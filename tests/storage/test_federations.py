"""Rounds of federated trainings as rows: opened once, answered once, and over whatever becomes of the clients."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import update

from artifacts.errors import NotFound, StateConflict
from artifacts.manifest import FileEntry
from storage import claims, federations, jobs, outlook, parking
from storage.conditions import AWAITING
from storage.database import Database, now
from storage.federations import Asked
from storage.tables import ClientUpdateRow, JobRow

SECONDS = 600.0
FILE = FileEntry("update.safetensors", "ab" * 32, 12, "application/octet-stream")


def claim(database: Database) -> claims.Claim:
    with database.write() as session:
        found = claims.claim_next(session, server_id="srv", boot_id="boot", slot="cpu:0", lease_seconds=60.0)
    assert found is not None
    return found


def none_is_due(database: Database) -> bool:
    with database.write() as session:
        found = claims.claim_next(session, server_id="srv", boot_id="boot", slot="cpu:0", lease_seconds=60.0)
    return found is None


def suspend(database: Database, run: claims.Claim, round_: int, clients: int = 2) -> None:
    asked = [Asked(client, {"run": run.job_id, "client": client}) for client in range(clients)]

    def before(session: Any) -> None:
        federations.open_round(session, run.job_id, round_, asked, seconds=SECONDS, affinity=None)

    with database.write() as session:
        federations.suspend(session, run.job_id, run.attempt, before=before, message="at work", fraction=0.5)


@pytest.fixture
def run(database: Database) -> claims.Claim:
    """A training whose first round is open: two clients are asked."""
    with database.write() as session:
        jobs.create_job(session, "train", {})
    found = claim(database)
    suspend(database, found, 0)
    return found


def row_of(database: Database, job_id: str) -> JobRow:
    with database.read() as session:
        return jobs.get_job(session, job_id)


def states(database: Database, run: claims.Claim, round_: int = 0) -> list[str]:
    with database.read() as session:
        return [row.state for row in federations.updates_of(session, run.job_id, round_)]


def answer(database: Database, client: claims.Claim, run: claims.Claim, round_: int = 0) -> None:
    with database.write() as session:
        claims.fence(session, client.job_id, client.attempt)
        federations.answer(session, run.job_id, round_, client.params["client"], FILE, {"rows": 3})
        claims.finish_succeeded(session, client.job_id, client.attempt, {"adapters": [], "images": [], "report": {}})


def settle(database: Database) -> list[str]:
    with database.read() as session:
        waiting = federations.unsettled(session)
    stopped = []
    for run_id in waiting:
        with database.write() as session:
            stopped += federations.settle(session, run_id)
    for job_id in stopped:
        with database.write() as session:
            federations.stop_client(session, job_id)
    return stopped


def test_a_round_holds_no_slot_and_wakes_the_training_when_all_have_answered(
    database: Database, run: claims.Claim
) -> None:
    waiting = row_of(database, run.job_id)
    assert (waiting.state, waiting.available_at, waiting.failures) == ("queued", AWAITING, 0)
    with database.write() as session:
        assert parking.settle(session) == 0  # it is no job of a closed window
        shown = outlook.outlook_of(session, jobs.get_job(session, run.job_id), 60.0)
    assert shown.waiting is not None
    assert shown.waiting.reason == "clients"
    clients = [claim(database), claim(database)]
    assert {item.kind for item in clients} == {jobs.CLIENT_UPDATE}
    assert none_is_due(database)
    answer(database, clients[0], run)
    assert settle(database) == []
    assert none_is_due(database)
    answer(database, clients[1], run)
    again = claim(database)
    assert (again.job_id, again.attempt) == (run.job_id, 2)
    assert states(database, run) == ["answered", "answered"]


def test_a_round_is_opened_once_and_what_was_averaged_is_let_go(database: Database, run: claims.Claim) -> None:
    answer(database, claim(database), run)
    answer(database, claim(database), run)
    again = claim(database)
    suspend(database, again, 0)  # killed before it could average: the clients are asked once
    with database.read() as session:
        children = [row.child_id for row in federations.updates_of(session, run.job_id, 0)]
        assert len(set(children)) == 2
        assert {row.sha256 for row in federations.updates_of(session, run.job_id, 0)} == {FILE.sha256}
    settle(database)
    suspend(database, claim(database), 1)
    with database.read() as session:
        assert {row.sha256 for row in federations.updates_of(session, run.job_id, 0)} == {None}
        assert [row.child_id for row in federations.updates_of(session, run.job_id, 0)] == children


def test_a_client_whose_job_fails_is_lost_and_the_round_is_over(database: Database, run: claims.Claim) -> None:
    first, second = claim(database), claim(database)
    answer(database, first, run)
    error = {"code": "file_broken", "detail": "no row is left"}
    with database.write() as session:
        claims.finish_failed(session, second.job_id, second.attempt, error)
    assert none_is_due(database)
    assert settle(database) == []
    assert states(database, run) == ["answered", "lost"]
    with database.read() as session:
        assert federations.updates_of(session, run.job_id, 0)[1].reason == "file_broken: no row is left"
    assert claim(database).job_id == run.job_id


def test_a_client_that_is_not_done_in_time_is_late_and_can_not_answer_any_more(
    database: Database, run: claims.Claim
) -> None:
    first, second = claim(database), claim(database)
    answer(database, first, run)
    with database.write() as session:
        passed = now(session) - timedelta(seconds=1)
        session.execute(update(ClientUpdateRow).where(ClientUpdateRow.client == 1).values(deadline=passed))
    assert settle(database) == [second.job_id]
    assert row_of(database, second.job_id).state == "cancelling"
    assert states(database, run) == ["answered", "late"]
    with pytest.raises(StateConflict, match="counts as late"), database.write() as session:
        federations.answer(session, run.job_id, 0, 1, FILE, {})
    assert claim(database).job_id == run.job_id


def test_the_clients_of_a_training_that_was_cancelled_are_cancelled_too(database: Database, run: claims.Claim) -> None:
    running = claim(database)
    with database.write() as session:
        jobs.request_cancel(session, run.job_id)
    assert len(settle(database)) == 2
    assert row_of(database, running.job_id).state == "cancelling"
    assert states(database, run) == ["lost", "lost"]
    assert none_is_due(database)
    assert settle(database) == []


def test_a_clients_job_is_not_retried_by_itself(database: Database, run: claims.Claim) -> None:
    client = claim(database)
    with database.write() as session:
        claims.finish_failed(session, client.job_id, client.attempt, {"code": "x", "detail": "y"})
    with pytest.raises(StateConflict, match="is a client's part"), database.write() as session:
        jobs.retry_job(session, client.job_id)


def test_refusals_and_what_was_spent_stand_beside_what_was_given(database: Database, run: claims.Claim) -> None:
    for _ in range(2):
        answer(database, claim(database), run)
    again = claim(database)
    with database.write() as session:
        federations.record_refusals(session, run.job_id, again.attempt, 0, {1: "not finite"})
        federations.record_epsilons(session, run.job_id, 0, {0: 1.5, 1: 2.5})
    with database.read() as session:
        rows = federations.rounds_after(session, run.job_id, 0, 5)
        assert [(row.state, row.reason, row.details) for row in rows] == [
            ("answered", None, {"rows": 3, "epsilon": 1.5}),
            ("refused", "not finite", {"rows": 3, "epsilon": 2.5}),
        ]
        assert federations.rounds_after(session, run.job_id, 1, 5) == []
        with pytest.raises(NotFound):
            federations.rounds_after(session, "job_" + "0" * 32, 0, 5)


def test_a_number_of_clients_is_never_too_many_for_a_queue_that_took_their_training(database: Database) -> None:
    with database.write() as session:
        jobs.create_job(session, "train", {}, max_queued=1)
    found = claim(database)
    suspend(database, found, 0, clients=5)
    assert states(database, found) == ["pending"] * 5
