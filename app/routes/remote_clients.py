"""Federated clients on machines of their own: what is asked of one, the round's adapter, and what it trained."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from app.dependencies import FederatedClient, JobId, ServicesDep
from app.file_answers import answer_file, file_responses, file_route
from app.json_body import JsonRoute
from app.problems import problem_responses
from app.remote_clients import TEXT_FIELDS, adapter_file, describe, expect, store_update, watched
from app.schemas.remote_clients import UPDATE_FORM_SCHEMA, GivenUpdate, RemoteTask
from app.upload_answers import answer_upload
from storage.downloads import SAFETENSORS_TYPE
from train.options.ffa_lora import MAX_CLIENTS, MAX_ROUNDS

router = APIRouter(tags=["train"], route_class=JsonRoute)
Number = Annotated[int, Path(ge=0, lt=MAX_CLIENTS, description="Place of the client in `parameters.clients`, from 0.")]
RoundNumber = Annotated[int, Path(alias="round", ge=1, le=MAX_ROUNDS, description="The round, from 1.")]
_ADAPTER = {**file_responses((SAFETENSORS_TYPE,)), **problem_responses(404, 409, 410, 416)}


@router.get(
    "/jobs/{job_id}/clients/{client}",
    summary="See what a remote client is asked for",
    responses=problem_responses(404, 409, 410),
)
def get_remote_client(services: ServicesDep, principal: FederatedClient, job_id: JobId, client: Number) -> RemoteTask:
    """The base model, the options, the round that is open and its deadline, and what the service takes for it."""
    return describe(services, principal, job_id, client)


@file_route(
    router,
    "/jobs/{job_id}/clients/{client}/rounds/{round}/adapter",
    summary="Download the adapter that a round begins with",
    head_summary="Ask for the size and ETag of a round's adapter",
    responses=_ADAPTER,
)
def get_round_adapter(
    request: Request,
    services: ServicesDep,
    principal: FederatedClient,
    job_id: JobId,
    client: Number,
    number: RoundNumber,
) -> Response:
    """lora_A as drawn and lora_B as last averaged, under the names of PEFT. Takes Range, If-Range, If-None-Match."""
    return answer_file(request, services, adapter_file(services, principal, job_id, client, number - 1))


@router.put(
    "/jobs/{job_id}/clients/{client}/rounds/{round}/update",
    status_code=201,
    summary="Give what a remote client trained",
    response_model=GivenUpdate,
    responses={
        201: {"description": "It is taken, and lasts"},
        200: {"description": "The same was given before", "model": GivenUpdate},
        **problem_responses(404, 409, 410, 413, 415, 507),
    },
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "multipart/form-data": {
                    "schema": UPDATE_FORM_SCHEMA,
                    "encoding": {"file": {"contentType": "application/octet-stream"}},
                }
            },
        }
    },
)
async def put_update(
    request: Request,
    services: ServicesDep,
    principal: FederatedClient,
    job_id: JobId,
    client: Number,
    number: RoundNumber,
) -> JSONResponse:
    """The trained tensors alone, with the number of rows. Names, shapes, types, finiteness and norm are checked here.

    The same bytes again give the same answer; other bytes are refused (409), late ones too, and with 410 all that
    comes when the training has ended.
    """
    expected = await run_in_threadpool(expect, services, principal, job_id, client, number - 1)
    chunks = watched(request.stream(), expected)
    return await answer_upload(request, services, principal, None, store_update(expected), TEXT_FIELDS, chunks)
