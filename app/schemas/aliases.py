"""Aliases as the interface shows them."""

from __future__ import annotations

from typing import Annotated, Self

from fastapi import Path
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.orm import Session

from app.schemas.common import RequestModel, Timestamp
from storage import aliases
from storage.tables import AliasRow
from train.continuation import AdapterId

ALIAS_PATTERN = "^[a-z0-9][a-z0-9._-]{0,99}$"
AliasName = Annotated[
    str, Path(pattern=ALIAS_PATTERN, description="Small letters, digits, dot, underscore, hyphen; at most 100.")
]


class AliasRequest(RequestModel):
    """Where the alias shall point."""

    model_config = ConfigDict(json_schema_extra={"example": {"adapter": "adp_" + "0" * 32}})

    adapter: AdapterId


class Alias(BaseModel):
    """A name that points to an adapter."""

    name: str
    adapter: str
    version: int = Field(description="Counts its switches; the ETag.")
    created_at: Timestamp
    updated_at: Timestamp = Field(description="Of the last switch.")

    @classmethod
    def of(cls, row: AliasRow) -> Self:
        return cls(
            name=row.name,
            adapter=row.adapter_id,
            version=row.version,
            created_at=row.created_at,
            updated_at=row.updated_at,
        )


class AliasSwitch(BaseModel):
    """From `version` on the alias pointed to `adapter`, which may be deleted by now."""

    version: int
    adapter: str
    job: str | None = Field(description="The transfer that passed its gate; null: a call switched it.")
    created_by: str | None = Field(description="The API key.")
    created_at: Timestamp


class AliasDetail(Alias):
    """An alias with its history."""

    switches: list[AliasSwitch] = Field(description=f"Newest first, the last {aliases.HISTORY}.")

    @classmethod
    def in_full(cls, session: Session, row: AliasRow) -> Self:
        switches = [
            AliasSwitch(
                version=item.version,
                adapter=item.adapter_id,
                job=item.job_id,
                created_by=item.created_by,
                created_at=item.created_at,
            )
            for item in aliases.switches_of(session, row.name)
        ]
        return cls(**Alias.of(row).model_dump(), switches=switches)
