"""Datasets: upload, list, show, look into, download, delete."""

from __future__ import annotations

from typing import Annotated

import anyio.to_thread
from fastapi import APIRouter, Query, Request
from starlette.responses import JSONResponse, Response

from app.dataset_files import GZIP_TYPE, MEDIA_TYPES, download, preview
from app.dataset_intake import TEXT_FIELDS, store_upload
from app.dependencies import DatasetId, IdempotencyKey, Reader, ServicesDep, Writer
from app.file_answers import answer_file, file_responses, file_route
from app.json_body import JsonRoute
from app.problems import problem_responses
from app.schemas.common import PageOf
from app.schemas.datasets import UPLOAD_FORM_SCHEMA, Dataset, DatasetQuery, DatasetRows, DatasetSummary, RowQuery
from app.upload_answers import answer_upload
from storage import datasets
from storage.datasets import DatasetFilter

router = APIRouter(tags=["datasets"], route_class=JsonRoute)

_LOCATION = {"Location": {"description": "Path of the dataset.", "schema": {"type": "string"}}}


@router.post(
    "/datasets",
    status_code=201,
    summary="Upload a dataset",
    response_model=Dataset,
    responses={
        201: {"description": "A new dataset", "headers": _LOCATION},
        200: {"description": "The same file is here already", "model": Dataset, "headers": _LOCATION},
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
async def upload_dataset(
    request: Request, services: ServicesDep, principal: Writer, idempotency_key: IdempotencyKey = None
) -> JSONResponse:
    """One file of JSON Lines, CSV, Parquet or FASTA, or a zip of images; each row is validated, bad ones are named.

    The body is streamed to disk and hashed on the way; the same file again gives the dataset that is there.
    """
    return await answer_upload(request, services, principal, idempotency_key, store_upload, TEXT_FIELDS)


@router.get("/datasets", summary="List datasets", responses=problem_responses())
def list_datasets(
    services: ServicesDep, principal: Reader, query: Annotated[DatasetQuery, Query()]
) -> PageOf[DatasetSummary]:
    """Newest first. `next` is the cursor of the next page, with the same filters."""
    filters = DatasetFilter(name=query.name, format=query.format, sha256=query.sha256)
    with services.database.read() as session:
        page = datasets.list_datasets(session, filters, cursor=query.cursor, limit=query.limit)
        return PageOf[DatasetSummary](items=[DatasetSummary.of(row) for row in page.items], next=page.next)


@router.get("/datasets/{dataset_id}", summary="Show a dataset", responses=problem_responses(404))
def get_dataset(services: ServicesDep, principal: Reader, dataset_id: DatasetId) -> Dataset:
    """Its columns, and for each task whether it can serve it or why not."""
    with services.database.read() as session:
        return Dataset.of(datasets.get_dataset(session, dataset_id))


@router.delete(
    "/datasets/{dataset_id}", status_code=204, summary="Delete a dataset", responses=problem_responses(404, 409, 507)
)
def delete_dataset(services: ServicesDep, principal: Writer, dataset_id: DatasetId) -> Response:
    """The dataset disappears, its bytes a day later. Refused while jobs that wait or run need it."""
    with services.database.write() as session:
        datasets.delete_dataset(session, dataset_id)
    return Response(status_code=204)


@router.get("/datasets/{dataset_id}/rows", summary="Look into a dataset", responses=problem_responses(404))
async def list_rows(
    services: ServicesDep, principal: Reader, dataset_id: DatasetId, query: Annotated[RowQuery, Query()]
) -> DatasetRows:
    """Some rows in the order of the file, from among the first million. For all of them, download the file."""

    def look() -> DatasetRows:
        with services.database.read() as session:
            row = datasets.get_dataset(session, dataset_id)
        return preview(services.blobs, row, query.offset, query.limit)

    return await anyio.to_thread.run_sync(look, limiter=services.preview_limiter)


_DOWNLOAD_RESPONSES = file_responses((*MEDIA_TYPES.values(), GZIP_TYPE))


@file_route(
    router,
    "/datasets/{dataset_id}/download",
    summary="Download a dataset",
    head_summary="Ask for the size and ETag of a download",
    responses=_DOWNLOAD_RESPONSES,
)
def download_dataset(request: Request, services: ServicesDep, principal: Reader, dataset_id: DatasetId) -> Response:
    """The file as it was sent. Takes Range, If-Range and If-None-Match."""
    with services.database.read() as session:
        row = datasets.get_dataset(session, dataset_id)
    return answer_file(request, services, download(services.blobs, row))
