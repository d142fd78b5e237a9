"""The pool: servers, device slots, what runs on each."""

from __future__ import annotations

from fastapi import APIRouter

from app.dependencies import Reader, ServicesDep
from app.problems import problem_responses
from app.schemas.service import Server, Slot, WorkerList
from app.service_state import alive_servers

router = APIRouter(tags=["workers"])


@router.get("/workers", summary="List workers", responses=problem_responses())
def list_workers(services: ServicesDep, principal: Reader) -> WorkerList:
    """The servers that gave a sign of life lately, with their device slots.

    Those of the server that answers are shown as they are now, those of others as of their last sign of life.
    """
    with services.database.read() as session:
        items = [Server.of(row) for row in alive_servers(session, services.settings)]
    supervisor = services.supervisor
    if supervisor is not None:
        now = [Slot.model_validate(slot) for slot in supervisor.status()]
        items = [item.model_copy(update={"slots": now}) if item.id == supervisor.server_id else item for item in items]
    return WorkerList(items=items)
