"""Webhooks: who is told that jobs have ended, and what became of each message."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from sqlalchemy.orm import Session
from starlette.responses import JSONResponse, Response

from app.dependencies import DeliveryId, IdempotencyKey, Paging, Reader, ServicesDep, WebhookId, Writer
from app.egress_policies import webhook_policy
from app.idempotency import Answer, answer_once, request_key
from app.json_body import JsonRoute
from app.problems import problem_responses
from app.schemas.common import PageOf, as_json
from app.schemas.webhooks import (
    Delivery,
    DeliveryQuery,
    WebhookPatch,
    WebhookRequest,
    WebhookResource,
    WebhookWithSecret,
)
from storage import deliveries, webhooks

router = APIRouter(tags=["webhooks"], route_class=JsonRoute)
_LOCATION = {"Location": {"description": "Path of the webhook.", "schema": {"type": "string"}}}


@router.post(
    "/webhooks",
    status_code=201,
    summary="Make a webhook",
    response_model=WebhookWithSecret,
    responses={201: {"headers": _LOCATION}, **problem_responses(409, 413, 415, 507)},
)
def create_webhook(
    services: ServicesDep, principal: Writer, body: WebhookRequest, idempotency_key: IdempotencyKey = None
) -> JSONResponse:
    """The answer alone holds the secret that messages are signed with. Only the caller's own jobs are told of."""
    webhook_policy(services.settings).check_url(body.url)

    def act(session: Session) -> Answer:
        row = webhooks.create_webhook(
            session,
            body.url,
            body.events,
            description=body.description,
            owner=principal.owner,
            created_by=principal.key_id,
        )
        return Answer(201, as_json(WebhookWithSecret.of(row)), {"Location": f"/webhooks/{row.id}"})

    key = request_key(principal.owner, idempotency_key, "POST /webhooks", as_json(body))
    return answer_once(services, key, act).response()


@router.get("/webhooks", summary="List webhooks", responses=problem_responses())
def list_webhooks(services: ServicesDep, principal: Reader, query: Paging) -> PageOf[WebhookResource]:
    """The caller's own, newest first."""
    with services.database.read() as session:
        page = webhooks.list_webhooks(session, principal.owner, cursor=query.cursor, limit=query.limit)
        return PageOf[WebhookResource](items=[WebhookResource.of(row) for row in page.items], next=page.next)


@router.get("/webhooks/{webhook_id}", summary="Show a webhook", responses=problem_responses(404))
def get_webhook(services: ServicesDep, principal: Reader, webhook_id: WebhookId) -> WebhookResource:
    """Without its secret."""
    with services.database.read() as session:
        return WebhookResource.of(webhooks.get_webhook(session, webhook_id, principal.owner))


@router.patch("/webhooks/{webhook_id}", summary="Change a webhook", responses=problem_responses(404, 413, 415, 507))
def patch_webhook(
    services: ServicesDep, principal: Writer, webhook_id: WebhookId, body: WebhookPatch
) -> WebhookResource:
    """What is left out stays. Disabling gives up the messages that wait; `replay` sends them after all."""
    if body.url is not None:
        webhook_policy(services.settings).check_url(body.url)
    with services.database.write() as session:
        row = webhooks.update_webhook(
            session,
            webhook_id,
            principal.owner,
            url=body.url,
            events=body.events,
            description=body.description,
            enabled=body.enabled,
        )
        return WebhookResource.of(row)


@router.delete(
    "/webhooks/{webhook_id}",
    status_code=204,
    summary="Delete a webhook",
    responses=problem_responses(404, 507),
)
def delete_webhook(services: ServicesDep, principal: Writer, webhook_id: WebhookId) -> Response:
    """Messages that wait are given up."""
    with services.database.write() as session:
        webhooks.delete_webhook(session, webhook_id, principal.owner)
    return Response(status_code=204)


@router.post(
    "/webhooks/{webhook_id}/test",
    status_code=202,
    summary="Send a test message",
    response_model=Delivery,
    responses=problem_responses(404, 409, 413, 507),
)
def send_test_message(
    services: ServicesDep, principal: Writer, webhook_id: WebhookId, idempotency_key: IdempotencyKey = None
) -> JSONResponse:
    """A `webhook.test` message, on the same road as all others; the list of deliveries tells how it went."""

    def act(session: Session) -> Answer:
        return Answer(202, as_json(Delivery.of(webhooks.enqueue_test(session, webhook_id, principal.owner))))

    key = request_key(principal.owner, idempotency_key, f"POST /webhooks/{webhook_id}/test", None)
    return answer_once(services, key, act).response()


@router.post(
    "/webhooks/{webhook_id}/rotate-secret",
    summary="Give a webhook a new secret",
    response_model=WebhookWithSecret,
    responses=problem_responses(404, 409, 413, 507),
)
def rotate_webhook_secret(
    services: ServicesDep, principal: Writer, webhook_id: WebhookId, idempotency_key: IdempotencyKey = None
) -> JSONResponse:
    """From now on every message, also one that is tried again, is signed with the new secret."""

    def act(session: Session) -> Answer:
        row = webhooks.rotate_secret(session, webhook_id, principal.owner)
        return Answer(200, as_json(WebhookWithSecret.of(row)))

    key = request_key(principal.owner, idempotency_key, f"POST /webhooks/{webhook_id}/rotate-secret", None)
    return answer_once(services, key, act).response()


@router.get(
    "/webhooks/{webhook_id}/deliveries", summary="List a webhook's deliveries", responses=problem_responses(404)
)
def list_deliveries(
    services: ServicesDep, principal: Reader, webhook_id: WebhookId, query: Annotated[DeliveryQuery, Query()]
) -> PageOf[Delivery]:
    """Newest first. Those that have ended are kept for 30 days."""
    with services.database.read() as session:
        page = deliveries.list_deliveries(
            session, webhook_id, principal.owner, query.state, cursor=query.cursor, limit=query.limit
        )
        return PageOf[Delivery](items=[Delivery.of(row) for row in page.items], next=page.next)


@router.post(
    "/webhooks/{webhook_id}/deliveries/{delivery_id}/replay",
    status_code=202,
    summary="Send a message again",
    response_model=Delivery,
    responses=problem_responses(404, 409, 413, 507),
)
def replay_delivery(
    services: ServicesDep,
    principal: Writer,
    webhook_id: WebhookId,
    delivery_id: DeliveryId,
    idempotency_key: IdempotencyKey = None,
) -> JSONResponse:
    """One that was delivered or given up, with the same id and content, and with all tries again."""

    def act(session: Session) -> Answer:
        return Answer(202, as_json(Delivery.of(deliveries.replay(session, webhook_id, delivery_id, principal.owner))))

    key = request_key(
        principal.owner, idempotency_key, f"POST /webhooks/{webhook_id}/deliveries/{delivery_id}/replay", None
    )
    return answer_once(services, key, act).response()
