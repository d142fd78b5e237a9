"""Adapters: upload, list, show, delete, download, lineage."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request
from starlette.responses import JSONResponse, Response

from app.adapter_intake import TEXT_FIELDS, store_upload
from app.dependencies import AdapterId, IdempotencyKey, Reader, ServicesDep, Writer
from app.download_query import Wanted
from app.file_answers import answer_file, file_responses, file_route
from app.json_body import JsonRoute
from app.problems import problem_responses
from app.recipes import recipe_of
from app.schemas.adapters import (
    UPLOAD_FORM_SCHEMA,
    Adapter,
    AdapterLineage,
    AdapterQuery,
    AdapterSummary,
    Compatibility,
    CompatibilityFinding,
    KeyPage,
    KeyQuery,
    KeyVerdict,
    Waiver,
    WaiverRequest,
)
from app.schemas.common import PageOf
from app.schemas.recipes import AdapterRecipe
from app.upload_answers import answer_upload
from artifacts.compatibility import Engine, findings, loads
from storage import adapters, transferables, waivers
from storage.adapter_keys import keys_page
from storage.adapters import AdapterFilter
from storage.downloads import SAFETENSORS_TYPE, ZIP_TYPE
from storage.written_downloads import Wish

router = APIRouter(tags=["adapters"], route_class=JsonRoute)

_LOCATION = {"Location": {"description": "Path of the adapter.", "schema": {"type": "string"}}}


@router.post(
    "/adapters",
    status_code=201,
    summary="Upload an adapter",
    response_model=Adapter,
    responses={
        201: {"description": "A new adapter", "headers": _LOCATION},
        200: {"description": "The same content is here already", "model": Adapter, "headers": _LOCATION},
        **problem_responses(409, 413, 415, 429, 507),
    },
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "multipart/form-data": {
                    "schema": UPLOAD_FORM_SCHEMA,
                    "encoding": {"file": {"contentType": "application/octet-stream"}},
                }
            },
        }
    },
)
async def upload_adapter(
    request: Request, services: ServicesDep, principal: Writer, idempotency_key: IdempotencyKey = None
) -> JSONResponse:
    """One .safetensors of any format that is read here, one .zip, .tar or .tar.gz, or the files of a PEFT directory.

    The body is streamed to disk and hashed on the way; the same content again gives the adapter that is there.
    """
    return await answer_upload(request, services, principal, idempotency_key, store_upload, TEXT_FIELDS)


@router.get("/adapters", summary="List adapters", responses=problem_responses())
def list_adapters(
    services: ServicesDep, principal: Reader, query: Annotated[AdapterQuery, Query()]
) -> PageOf[AdapterSummary]:
    """Newest first. `next` is the cursor of the next page, with the same filters."""
    filters = AdapterFilter(
        base_model=query.base_model, method=query.method, tag=query.tag, name=query.name, sha256=query.sha256
    )
    with services.database.read() as session:
        page = adapters.list_adapters(session, filters, cursor=query.cursor, limit=query.limit)
        return PageOf[AdapterSummary](items=[AdapterSummary.of(row) for row in page.items], next=page.next)


@router.get("/adapters/{adapter_id}", summary="Show an adapter", responses=problem_responses(404))
def get_adapter(services: ServicesDep, principal: Reader, adapter_id: AdapterId) -> Adapter:
    """Its configuration, files, modules, and the report on every key of the upload."""
    with services.database.read() as session:
        row = adapters.get_adapter(session, adapter_id)
        return Adapter.of(row, waivers.get_waiver(session, adapter_id), transferables.get(session, adapter_id))


@router.get("/adapters/{adapter_id}/keys", summary="Show what became of its keys", responses=problem_responses(404))
def list_keys(
    services: ServicesDep, principal: Reader, adapter_id: AdapterId, query: Annotated[KeyQuery, Query()]
) -> KeyPage:
    """Every tensor of the file: used as what, kept, or ignored and why; in the order of the file."""
    with services.database.read() as session:
        manifest = adapters.manifest_of(adapters.get_adapter(session, adapter_id))
        page = keys_page(session, adapter_id, manifest, use=query.use, cursor=query.cursor, limit=query.limit)
    items = [KeyVerdict.model_validate(item, from_attributes=True) for item in page.items]
    return KeyPage(items=items, next=page.next)


@router.get(
    "/adapters/{adapter_id}/compatibility",
    summary="Ask whether an engine loads it",
    responses=problem_responses(404),
)
def get_compatibility(
    services: ServicesDep,
    principal: Reader,
    adapter_id: AdapterId,
    engine: Annotated[Engine, Query(description="The program that is to apply the adapter.")],
) -> Compatibility:
    """What the engine would refuse, apply otherwise or need, each with where the rule is from. Told from the adapter's
    description; nothing is loaded."""
    with services.database.read() as session:
        row = adapters.get_adapter(session, adapter_id)
    config = services.base_configs.of_adapter(row) if engine == "llama.cpp" else None
    found = findings(adapters.manifest_of(row), engine, config)
    items = [CompatibilityFinding.model_validate(item, from_attributes=True) for item in found]
    return Compatibility(engine=engine, loads=loads(found), findings=items)


@router.delete(
    "/adapters/{adapter_id}", status_code=204, summary="Delete an adapter", responses=problem_responses(404, 409, 507)
)
def delete_adapter(services: ServicesDep, principal: Writer, adapter_id: AdapterId) -> Response:
    """The adapter disappears from lists and downloads, with what it kept for transfers; the lineage of what was made
    from it stays whole. Refused while an alias points to it."""
    with services.database.write() as session:
        adapters.delete_adapter(session, adapter_id)
    return Response(status_code=204)


@router.put(
    "/adapters/{adapter_id}/waiver", summary="Waive an adapter", responses=problem_responses(404, 413, 415, 507)
)
def put_waiver(services: ServicesDep, principal: Writer, adapter_id: AdapterId, body: WaiverRequest) -> Waiver:
    """Accept that it goes out of use with its base model: it no longer keeps that from being removed."""
    with services.database.write() as session:
        return Waiver.of(waivers.put_waiver(session, adapter_id, body.reason, created_by=principal.key_id))


@router.delete(
    "/adapters/{adapter_id}/waiver",
    status_code=204,
    summary="Take an adapter's waiver back",
    responses=problem_responses(404, 507),
)
def delete_waiver(services: ServicesDep, principal: Writer, adapter_id: AdapterId) -> Response:
    """Its base model can not be removed any more until it is transferred, waived again or deleted."""
    with services.database.write() as session:
        waivers.drop_waiver(session, adapter_id)
    return Response(status_code=204)


@router.get("/adapters/{adapter_id}/lineage", summary="Show where it came from", responses=problem_responses(404))
def get_lineage(services: ServicesDep, principal: Reader, adapter_id: AdapterId) -> AdapterLineage:
    """Ancestors and descendants, deleted ones included, with the recipe of each step."""
    with services.database.read() as session:
        return AdapterLineage.of(adapter_id, adapters.lineage(session, adapter_id))


@router.get("/adapters/{adapter_id}/recipe", summary="Show how to make it again", responses=problem_responses(404))
def get_recipe(services: ServicesDep, principal: Reader, adapter_id: AdapterId) -> AdapterRecipe:
    """The call that makes the adapter again, and whether it gives the same bytes on this server, else why not."""
    with services.database.read() as session:
        return recipe_of(session, adapter_id)


_DOWNLOAD_RESPONSES = file_responses((ZIP_TYPE, SAFETENSORS_TYPE))


@file_route(
    router,
    "/adapters/{adapter_id}/download",
    summary="Download an adapter",
    head_summary="Ask for the size and ETag of a download",
    responses=_DOWNLOAD_RESPONSES,
)
def download_adapter(
    request: Request, services: ServicesDep, principal: Reader, adapter_id: AdapterId, wanted: Wanted
) -> Response:
    """Takes Range, If-Range and If-None-Match. The same adapter always gives the same bytes, but for a rank that has to
    be computed. `Rankwise-Relative-Error` is ‖ΔW − ΔW′‖/‖ΔW‖ of what is sent, where anything had to be written anew."""
    with services.database.read() as session:
        row = adapters.get_adapter(session, adapter_id)
    found = services.adapter_downloads.of(row, Wish(wanted.layout, wanted.dtype, wanted.rank))
    return answer_file(request, services, found)
