"""The pool: servers, device slots, what runs on each."""

from __future__ import annotations

from fastapi import APIRouter

from app.dependencies import Reader, ServicesDep
from app.problems import problem_responses
from app.schemas.service import Server, WorkerList
from app.service_state import alive_servers

router = APIRouter(tags=["workers"])


@router.get("/workers", summary="List workers", responses=problem_responses())
def list_workers(services: ServicesDep, principal: Reader) -> WorkerList:
    """The servers that gave a sign of life lately, with their device slots."""
    with services.database.read() as session:
        return WorkerList(items=[Server.of(row) for row in alive_servers(session, services.settings)])
