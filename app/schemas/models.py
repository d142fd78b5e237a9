"""Base models as the interface shows them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    model_validator,
)

from app.dependencies import PLAIN
from app.schemas.common import Name, RequestModel, Timestamp
from storage.tables import ModelRow

_PART = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}"
HubId = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=f"^{_PART}(/{_PART})?$")]
Revision = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9._-]+$")]
ServerPath = Annotated[str, StringConstraints(min_length=1, max_length=4096, pattern=PLAIN)]


_NULL = {"type": "null"}
_HUB_BRANCH: dict[str, Any] = {
    "required": ["hub_id"],
    "properties": {"hub_id": {"type": "string"}, "path": _NULL},
}
_PATH_BRANCH: dict[str, Any] = {
    "required": ["path"],
    "properties": {"path": {"type": "string"}, "hub_id": _NULL, "revision": _NULL},
}


def _text_only(value: Any) -> Any:
    if value is not None and not isinstance(value, str):
        raise ValueError("must be a date and time as text (RFC 3339), or null")
    return value


def _in_utc(value: datetime | None) -> datetime | None:
    try:
        return None if value is None else value.astimezone(UTC)
    except OverflowError as error:
        raise ValueError("is outside of the years 1 to 9999 in UTC") from error


Moment = Annotated[AwareDatetime | None, BeforeValidator(_text_only), AfterValidator(_in_utc)]


class ModelRequest(RequestModel):
    """Either `hub_id` (with `revision`), or `path` on the server, under one of its model roots."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [_HUB_BRANCH, _PATH_BRANCH]})

    hub_id: HubId | None = Field(None, description="Name on the Hugging Face hub; nothing is downloaded.")
    revision: Revision | None = Field(None, description="Commit of the hub repository; a branch is not a proof.")
    path: ServerPath | None = Field(None, description="Folder of config.json and *.safetensors on the server.")
    name: Name | None = Field(None, description="A name to refer to it by; unset: the hub id or the folder's name.")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.hub_id is None) == (self.path is None):
            raise ValueError("give either hub_id or path")
        if self.path is not None and self.revision is not None:
            raise ValueError("revision belongs to hub_id; a path is identified by the digest of its weights")
        return self


class ModelPatch(RequestModel):
    """Fields that are left out stay; null clears them."""

    deprecated_at: Moment = None
    removed_at: Moment = None

    def changes(self) -> dict[str, datetime | None]:
        return {name: getattr(self, name) for name in self.model_fields_set}


class BaseModelResource(BaseModel):
    """A registered base model."""

    id: str
    name: str
    source: str
    location: str
    revision: str | None
    architecture: str | None
    pipeline: str | None = Field(description="Class of a diffusers pipeline; architecture is its UNet's then.")
    weights_digest: str | None
    tokenizer_digest: str | None
    fingerprint_digest: str | None
    parameter_count: int | None
    created_at: Timestamp
    deprecated_at: Timestamp | None
    removed_at: Timestamp | None

    @classmethod
    def of(cls, row: ModelRow) -> Self:
        return cls.model_validate(row, from_attributes=True)
