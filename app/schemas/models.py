"""Base models as the interface shows them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    AliasChoices,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    model_validator,
)
from sqlalchemy.orm import Session

from app.dependencies import PLAIN
from app.schemas.common import BaseModelName, Name, RequestModel, Timestamp
from artifacts.menu import NO_NUL
from storage import made_models, retirement
from storage.dependents import dependents_of
from storage.retirement import REASON_LIMIT, Retirement
from storage.tables import MadeModelRow, ModelFileRow, ModelRow

_PART = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}"
HubId = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=f"^{_PART}(/{_PART})?$")]
Revision = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9._-]+$")]
ServerPath = Annotated[str, StringConstraints(min_length=1, max_length=4096, pattern=PLAIN)]

Reason = Annotated[str, StringConstraints(min_length=1, max_length=REASON_LIMIT, pattern=NO_NUL)]

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


def _counted(value: Any) -> Any:
    """What a configuration says of the quantisation, without a word for each layer."""
    layers = value.get("layers") if isinstance(value, dict) else None
    return value if layers is None else {**value, "layers": len(layers)}


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

    deprecated_at: Moment = Field(None, description="With null also successor and reason are gone.")
    remove_at: Moment = None
    removed_at: Moment = Field(
        None, description="A date that lies ahead is taken as `remove_at`; null lets a removed model be used again."
    )

    def changes(self) -> dict[str, datetime | None]:
        return {name: getattr(self, name) for name in self.model_fields_set}


class DeprecationRequest(RequestModel):
    """When the model is deprecated and removed, and what to use instead."""

    deprecate_at: Moment = Field(
        None, description="May lie ahead. Unset: now, or as it is if it is deprecated already."
    )
    remove_at: Moment = Field(
        None, description="Removed at this time, or later, as soon as nothing depends on it. Unset: not by itself."
    )
    successor: BaseModelName | None = Field(None, description="Id or name of the base model to use instead.")
    reason: Reason | None = None

    def plan(self) -> Retirement:
        return Retirement(self.deprecate_at, self.remove_at, self.successor, self.reason)


class Removal(BaseModel):
    """What keeps a deprecated model from being removed."""

    blocked_by: dict[str, int] = Field(
        description="adapters (without a published transfer or a waiver), jobs (unfinished), schedules (enabled), "
        "aliases → number; empty if it can be removed."
    )


class ModelFile(BaseModel):
    """A file of a model that a job made."""

    name: str = Field(validation_alias=AliasChoices("path", "name"))
    sha256: str
    size: int
    media_type: str
    link: str

    @classmethod
    def of(cls, row: ModelFileRow) -> Self:
        return cls(
            name=row.path,
            sha256=row.sha256,
            size=row.size,
            media_type=row.media_type,
            link=f"/models/{row.model_id}/files/{row.path}",
        )


class MadeModel(BaseModel):
    """How a job made a model."""

    job_id: str
    recipe: dict[str, Any] = Field(description="The base model, the adapters with their weights, method, parameters.")
    size: int = Field(description="Bytes of all files together.")
    files: list[ModelFile]

    @classmethod
    def of(cls, row: MadeModelRow) -> Self:
        files = [ModelFile.of(file) for file in row.files]
        return cls(job_id=row.job_id, recipe=row.recipe, size=row.size, files=files)


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
    quantisation: Annotated[dict[str, Any] | None, BeforeValidator(_counted)] = Field(
        description="Of a quantised model: the field quantization_config of its configuration, with the number of the "
        "layers instead of each. rankwise-lq is what POST /models/{id}/quantize makes."
    )
    parameter_count: int | None
    created_at: Timestamp
    deprecated_at: Timestamp | None
    remove_at: Timestamp | None = Field(description="When it is to be removed, if nothing depends on it then.")
    removed_at: Timestamp | None
    successor: str | None = Field(
        description="Id of the base model to use instead.", validation_alias=AliasChoices("successor_id", "successor")
    )
    deprecation_reason: str | None
    made: MadeModel | None = Field(None, description="Of a single model that a job made: how, and its files.")
    warnings: list[str] = Field([], description="Of a single deprecated model: what to tell whoever uses it.")
    removal: Removal | None = Field(None, description="Of a single model that is on its way out.")

    @classmethod
    def of(cls, row: ModelRow) -> Self:
        """As in lists: without what costs queries for every model."""
        return cls.model_validate(row, from_attributes=True)

    @classmethod
    def in_full(cls, session: Session, row: ModelRow) -> Self:
        """With its warnings, and what depends on it if it is to go."""
        found = cls.of(row)
        made = made_models.made_model(session, row.id)
        found.made = None if made is None else MadeModel.of(made)
        found.warnings = retirement.warnings_of(session, [row.id])
        if row.removed_at is None and (row.deprecated_at is not None or row.remove_at is not None):
            found.removal = Removal(blocked_by=dependents_of(session, row).counts)
        return found
