"""What is going on in the whole service, as the database has it."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy.orm import Session

from app.settings import Settings
from storage import claims
from storage.database import Database
from storage.figures import Figures, StoredFigures, figures, stored_figures
from storage.tables import ServerRow


def alive_servers(session: Session, settings: Settings) -> Sequence[ServerRow]:
    """The servers that were seen within a lease: a silent one has lost its jobs by then."""
    return claims.list_servers(session, settings.lease_seconds)


def service_figures(database: Database, settings: Settings) -> Figures:
    """What is cheap to know."""
    with database.read() as session:
        return figures(session, alive_servers(session, settings), settings.lease_seconds)


def service_stored_figures(database: Database) -> StoredFigures:
    """What is not."""
    with database.read() as session:
        return stored_figures(session)
