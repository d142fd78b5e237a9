"""Base models: register, list, show, deprecate."""

from __future__ import annotations

from fastapi import APIRouter
from sqlalchemy.orm import Session
from starlette.responses import JSONResponse

from app.dependencies import IdempotencyKey, ModelId, Paging, Reader, ServicesDep, Writer
from app.idempotency import Answer, answer_after, request_key
from app.json_body import JsonRoute
from app.model_registration import reference
from app.problems import problem_responses
from app.schemas.common import PageOf, as_json
from app.schemas.models import BaseModelResource, ModelPatch, ModelRequest
from artifacts.base_model import BaseModelRef
from storage import models

router = APIRouter(tags=["models"], route_class=JsonRoute)
_LOCATION = {"Location": {"description": "Path of the model.", "schema": {"type": "string"}}}


@router.post(
    "/models",
    status_code=201,
    summary="Register a base model",
    response_model=BaseModelResource,
    responses={
        201: {"description": "Registered", "headers": _LOCATION},
        200: {"description": "It is registered already", "model": BaseModelResource, "headers": _LOCATION},
        **problem_responses(409, 413, 415, 507),
    },
)
def register_model(
    services: ServicesDep, principal: Writer, body: ModelRequest, idempotency_key: IdempotencyKey = None
) -> JSONResponse:
    """By hub id and commit, or by a folder under one of the server's model roots, whose weights are then hashed."""

    def act(session: Session, ref: BaseModelRef) -> Answer:
        row, created = models.add_model(session, ref)
        location = {"Location": f"/models/{row.id}"}
        return Answer(201 if created else 200, as_json(BaseModelResource.of(row)), location)

    key = request_key(principal.owner, idempotency_key, "POST /models", as_json(body))
    return answer_after(services, key, lambda: reference(body, services.settings.model_roots), act).response()


@router.get("/models", summary="List base models", responses=problem_responses())
def list_models(services: ServicesDep, principal: Reader, query: Paging) -> PageOf[BaseModelResource]:
    """Newest first."""
    with services.database.read() as session:
        page = models.list_models(session, cursor=query.cursor, limit=query.limit)
        return PageOf[BaseModelResource](items=[BaseModelResource.of(row) for row in page.items], next=page.next)


@router.get("/models/{model_id}", summary="Show a base model", responses=problem_responses(404))
def get_model(services: ServicesDep, principal: Reader, model_id: ModelId) -> BaseModelResource:
    """What is known of it."""
    with services.database.read() as session:
        return BaseModelResource.of(models.get_model(session, model_id))


@router.patch(
    "/models/{model_id}",
    summary="Deprecate or remove a base model",
    responses=problem_responses(404, 413, 415, 507),
)
def patch_model(services: ServicesDep, principal: Writer, model_id: ModelId, body: ModelPatch) -> BaseModelResource:
    """Sets or clears `deprecated_at` and `removed_at`; what is left out stays as it is."""
    with services.database.write() as session:
        return BaseModelResource.of(models.update_model(session, model_id, **body.changes()))
