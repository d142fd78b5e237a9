"""Webhooks and their deliveries as the interface shows them."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StringConstraints

from app.dependencies import PageQuery
from app.schemas.common import RequestModel, Timestamp
from artifacts.menu import NO_NUL
from storage.tables import WebhookDeliveryRow, WebhookRow
from storage.webhooks import URL_LIMIT

WebhookEvent = Literal["job.succeeded", "job.failed", "job.cancelled", "*"]
DeliveryState = Literal["pending", "delivered", "failed"]
MAX_DESCRIPTION = 1000

# No blanks and no control characters; what else makes a URL that is allowed is checked with words of its own.
WebhookUrl = Annotated[
    str, StringConstraints(min_length=9, max_length=URL_LIMIT, pattern=r"^https?://[^\s\x00-\x20\x7f]+$")
]
Events = Annotated[list[WebhookEvent], Field(min_length=1, max_length=4)]
Description = Annotated[str, StringConstraints(max_length=MAX_DESCRIPTION, pattern=NO_NUL)]

_EXAMPLE: dict[str, Any] = {"url": "https://hooks.example.com/rankwise", "events": ["job.succeeded", "job.failed"]}


class WebhookRequest(RequestModel):
    """Where to tell that jobs of this API key have ended."""

    model_config = ConfigDict(json_schema_extra={"example": _EXAMPLE})

    url: WebhookUrl = Field(description="https, to a public address, unless the server's settings allow others.")
    events: Events = Field(default=["*"], description="Which ends of jobs; `*` is every one.")
    description: Description = ""


class WebhookPatch(RequestModel):
    """Fields that are left out, or null, stay."""

    url: WebhookUrl | None = Field(None, description="A new address; what waits is sent there.")
    events: Events | None = None
    description: Description | None = None
    enabled: StrictBool | None = Field(None, description="false: nothing is sent, and what waits is given up.")


class WebhookResource(BaseModel):
    """A webhook. Its secret is shown when it is made and when it is rotated, never else."""

    id: str
    url: str
    events: list[WebhookEvent]
    description: str
    enabled: bool = Field(description="false also after the receiver has answered 410 Gone.")
    created_at: Timestamp

    @classmethod
    def of(cls, row: WebhookRow) -> Self:
        return cls.model_validate(row, from_attributes=True)


class WebhookWithSecret(WebhookResource):
    """A webhook and what its messages are signed with (Standard Webhooks)."""

    secret: str = Field(description="`whsec_…`. Keep it: it is not shown again.")


class DeliveryQuery(PageQuery):
    """Filters of the list of deliveries."""

    state: DeliveryState | None = None


class Delivery(BaseModel):
    """One message to one webhook, and how it goes."""

    id: str = Field(description="The message's `webhook-id`, the same in every try.")
    webhook_id: str
    job_id: str | None
    event: str
    state: DeliveryState
    attempts: int = Field(description="Tries so far.")
    next_attempt_at: Timestamp | None = Field(description="Not tried before; null when it has ended.")
    last_status: int | None = Field(description="HTTP status of the last answer.")
    last_error: str | None
    payload: dict[str, Any]
    created_at: Timestamp
    finished_at: Timestamp | None

    @classmethod
    def of(cls, row: WebhookDeliveryRow) -> Self:
        return cls(
            id=row.id,
            webhook_id=row.webhook_id,
            job_id=row.job_id,
            event=row.event,
            state=row.state,
            attempts=row.attempts,
            next_attempt_at=row.available_at if row.state == "pending" else None,
            last_status=row.last_status,
            last_error=row.last_error,
            payload=row.payload,
            created_at=row.created_at,
            finished_at=row.finished_at,
        )
