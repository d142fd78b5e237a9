"""Base models: register, list, show, deprecate, remove."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Request
from sqlalchemy.orm import Session
from starlette.responses import JSONResponse, Response

from app.dependencies import IdempotencyKey, ModelId, Paging, Reader, ServicesDep, Writer
from app.file_answers import answer_file, file_responses, file_route
from app.idempotency import Answer, answer_after, answer_once, request_key
from app.json_body import JsonRoute
from app.model_registration import reference
from app.problems import problem_responses
from app.recipes import recipe_of_model
from app.schemas.common import PageOf, as_json
from app.schemas.models import BaseModelResource, DeprecationRequest, ModelPatch, ModelRequest
from app.schemas.recipes import ModelRecipe
from artifacts.base_model import BaseModelRef
from storage import models, retirement
from storage.downloads import SAFETENSORS_TYPE, model_file

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
        return BaseModelResource.in_full(session, models.get_model(session, model_id))


@router.get(
    "/models/{model_id}/recipe", summary="Show how to make a base model again", responses=problem_responses(404)
)
def get_model_recipe(services: ServicesDep, principal: Reader, model_id: ModelId) -> ModelRecipe:
    """The call that makes it again, when a merge into a base model made it, and whether it gives the same bytes."""
    with services.database.read() as session:
        return recipe_of_model(session, model_id)


@router.patch(
    "/models/{model_id}",
    summary="Change the dates of a base model",
    responses=problem_responses(404, 409, 413, 415, 507),
)
def patch_model(services: ServicesDep, principal: Writer, model_id: ModelId, body: ModelPatch) -> BaseModelResource:
    """Sets or clears single dates; what is left out stays as it is."""
    with services.database.write() as session:
        row = retirement.update_model(session, model_id, **body.changes())
        return BaseModelResource.in_full(session, row)


@router.post(
    "/models/{model_id}/deprecate",
    summary="Deprecate a base model",
    response_model=BaseModelResource,
    responses=problem_responses(404, 409, 413, 415, 507),
)
def deprecate_model(
    services: ServicesDep,
    principal: Writer,
    model_id: ModelId,
    body: DeprecationRequest,
    idempotency_key: IdempotencyKey = None,
) -> JSONResponse:
    """From `deprecate_at` on, jobs that use it carry a warning, and schedules that wait for it start.

    At `remove_at` it is removed if nothing depends on it; else it stays until that is so, and `removal` says why.
    """

    def act(session: Session) -> Answer:
        row = retirement.deprecate(session, model_id, body.plan())
        return Answer(200, as_json(BaseModelResource.in_full(session, row)))

    key = request_key(principal.owner, idempotency_key, f"POST /models/{model_id}/deprecate", as_json(body))
    return answer_once(services, key, act).response()


@router.delete(
    "/models/{model_id}",
    status_code=204,
    summary="Remove a base model",
    responses=problem_responses(404, 409, 507),
)
def delete_model(services: ServicesDep, principal: Writer, model_id: ModelId) -> Response:
    """No job can name it any more; what is known of it stays.

    409 while something depends on it: an enabled schedule, an unfinished job, or an adapter that has neither a
    published transfer to another base model nor a waiver. The first twenty are listed.
    """
    with services.database.write() as session:
        retirement.remove_model(session, model_id)
    return Response(status_code=204)


_FILES = file_responses((SAFETENSORS_TYPE, "application/json"))
FileName = Annotated[
    str, Path(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,199}$", description="Name of a file, as `made.files` lists it.")
]


@file_route(
    router,
    "/models/{model_id}/files/{name}",
    summary="Download a file of a model that a job made",
    head_summary="Ask for the size and ETag of a file of a model",
    responses=_FILES,
)
def get_model_file(
    request: Request, services: ServicesDep, principal: Reader, model_id: ModelId, name: FileName
) -> Response:
    """Takes Range, If-Range and If-None-Match."""
    return answer_file(request, services, model_file(services.database, services.blobs, model_id, name))
