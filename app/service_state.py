"""What is going on in the whole service, as the database has it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from sqlalchemy.orm import Session

from app.settings import Settings
from storage import claims, jobs
from storage.database import Database
from storage.tables import ServerRow


def alive_servers(session: Session, settings: Settings) -> Sequence[ServerRow]:
    """The servers that were seen within a lease: a silent one has lost its jobs by then."""
    return claims.list_servers(session, settings.lease_seconds)


def jobs_by_state(database: Database) -> Mapping[str, int]:
    """State → number of jobs, all states."""
    with database.read() as session:
        return jobs.count_by_state(session)


def slots_by_state(database: Database, settings: Settings) -> Mapping[tuple[str, str], int]:
    """(device, state) → number of slots of the servers that are alive."""
    with database.read() as session:
        return Counter(
            (str(slot["device"]), str(slot.get("state", "idle")))
            for row in alive_servers(session, settings)
            for slot in row.slots
        )
