"""What a job may ask of the machine that runs it."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from app.schemas.common import RequestModel
from artifacts.menu import Number

MAX_DEVICES = 1024
MAX_TIMEOUT_SECONDS = 366 * 86400


class Resources(RequestModel):
    """What is left out: one device, and no limit of time."""

    devices: Annotated[int, Field(strict=True, ge=1, le=MAX_DEVICES)] | None = Field(
        None, description="Device slots, all of one host."
    )
    timeout_seconds: Annotated[Number, Field(gt=0, le=MAX_TIMEOUT_SECONDS)] | None = Field(
        None, description="Longest run of one attempt; over it the job fails."
    )
