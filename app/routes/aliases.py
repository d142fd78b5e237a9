"""Aliases: point one to an adapter, list, show with history, download what it points to, delete."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import JSONResponse, RedirectResponse, Response

from app.dependencies import Paging, Reader, ServicesDep, Writer
from app.download_query import Wanted
from app.json_body import JsonRoute
from app.preconditions import IfMatch, etag
from app.problems import problem_responses
from app.schemas.aliases import Alias, AliasDetail, AliasName, AliasRequest
from app.schemas.common import PageOf, as_json
from storage import aliases

router = APIRouter(tags=["aliases"], route_class=JsonRoute)

_ETAG = {"ETag": {"description": "The version, for If-Match.", "schema": {"type": "string"}}}


@router.put(
    "/aliases/{name}",
    summary="Point an alias to an adapter",
    response_model=AliasDetail,
    responses={
        200: {"headers": _ETAG},
        201: {"description": "A new alias", "model": AliasDetail, "headers": _ETAG},
        **problem_responses(412, 413, 415, 507),
    },
)
def put_alias(
    services: ServicesDep, principal: Writer, name: AliasName, body: AliasRequest, if_match: IfMatch
) -> JSONResponse:
    """Makes the alias, or switches it. The adapter can not be deleted while an alias points to it."""
    with services.database.write() as session:
        row, made = aliases.put_alias(session, name, body.adapter, if_version=if_match, by=principal.key_id)
        shown = as_json(AliasDetail.in_full(session, row))
        headers = {"ETag": etag(row.version)}
    return JSONResponse(shown, 201 if made else 200, headers)


@router.get("/aliases", summary="List aliases", responses=problem_responses())
def list_aliases(services: ServicesDep, principal: Reader, query: Paging) -> PageOf[Alias]:
    """Newest first."""
    with services.database.read() as session:
        page = aliases.list_aliases(session, cursor=query.cursor, limit=query.limit)
        return PageOf[Alias](items=[Alias.of(row) for row in page.items], next=page.next)


@router.get(
    "/aliases/{name}",
    summary="Show an alias",
    response_model=AliasDetail,
    responses={200: {"headers": _ETAG}, **problem_responses(404)},
)
def get_alias(services: ServicesDep, principal: Reader, name: AliasName) -> JSONResponse:
    """Where it points, and every switch of it."""
    with services.database.read() as session:
        row = aliases.get_alias(session, name)
        return JSONResponse(as_json(AliasDetail.in_full(session, row)), headers={"ETag": etag(row.version)})


@router.delete(
    "/aliases/{name}", status_code=204, summary="Delete an alias", responses=problem_responses(404, 412, 507)
)
def delete_alias(services: ServicesDep, principal: Writer, name: AliasName, if_match: IfMatch) -> Response:
    """The alias and its history go, the adapter stays."""
    with services.database.write() as session:
        aliases.delete_alias(session, name, if_version=if_match)
    return Response(status_code=204)


@router.get(
    "/aliases/{name}/download",
    status_code=307,
    summary="Download the adapter of an alias",
    response_class=RedirectResponse,
    responses={
        307: {
            "description": "To the download of the adapter that the alias points to now",
            "headers": {"Location": {"schema": {"type": "string"}}},
        },
        **problem_responses(404),
    },
)
def download_alias(services: ServicesDep, principal: Reader, name: AliasName, wanted: Wanted) -> Response:
    """A redirect that is not to be cached: the next one may go elsewhere."""
    with services.database.read() as session:
        target = aliases.get_alias(session, name).adapter_id
    return RedirectResponse(
        f"/adapters/{target}/download?{wanted.text}", status_code=307, headers={"Cache-Control": "no-store"}
    )
