"""Typed dependencies of the handlers."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Header, Path, Query, Request
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from app.auth import Principal, require
from app.state import Services
from app.waiting import parse_prefer


async def services(request: Request) -> Services:
    """The parts of the server, from the application that answers."""
    found: Services = request.app.state.services
    return found


ServicesDep = Annotated[Services, Depends(services)]
Reader = Annotated[Principal, Depends(require("read"))]
Writer = Annotated[Principal, Depends(require("write"))]
JobRunner = Annotated[Principal, Depends(require("jobs"))]
FederatedClient = Annotated[Principal, Depends(require("client"))]

HEX_ID = "[0-9a-f]{32}"
AdapterId = Annotated[str, Path(pattern=f"^adp_{HEX_ID}$", description="Id of the adapter.")]
DatasetId = Annotated[str, Path(pattern=f"^dat_{HEX_ID}$", description="Id of the dataset.")]
JobId = Annotated[str, Path(pattern=f"^job_{HEX_ID}$", description="Id of the job.")]
ModelId = Annotated[str, Path(pattern=f"^mdl_{HEX_ID}$", description="Id of the base model.")]
ScheduleId = Annotated[str, Path(pattern=f"^sch_{HEX_ID}$", description="Id of the schedule.")]
WebhookId = Annotated[str, Path(pattern=f"^whk_{HEX_ID}$", description="Id of the webhook.")]
DeliveryId = Annotated[str, Path(pattern=f"^msg_{HEX_ID}$", description="Id of the delivery, its `webhook-id`.")]

PLAIN = r"^[^\x00-\x1f\x7f]*$"
"""Text on one line. A pattern that every database can store."""

IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        pattern=r"^[\x21-\x7e]{1,255}$",
        description="Makes the call repeatable: the same key with the same body gives the first answer again.",
    ),
]


def wait_seconds(
    request: Request,
    prefer: Annotated[
        str | None,
        Header(description="`wait=30`: answer when the job has ended, or after that many seconds (RFC 7240)."),
    ] = None,
) -> float:
    """How long the client is willing to wait for the job's end, capped by the server's own limit."""
    found: Services = request.app.state.services
    return min(parse_prefer(prefer), found.settings.max_wait_seconds)


WaitSeconds = Annotated[float, Depends(wait_seconds)]

FilterText = Annotated[str, StringConstraints(min_length=1, max_length=300, pattern=PLAIN)]


class PageQuery(BaseModel):
    """The paging parameters of every list."""

    model_config = ConfigDict(extra="forbid")

    limit: int = Field(50, ge=1, le=200, description="Most items of one page.")
    cursor: str | None = Field(
        None, min_length=1, max_length=2000, pattern=r"^[A-Za-z0-9_.=-]+$", description="`next` of the page before."
    )


Paging = Annotated[PageQuery, Query()]
