"""Uploads that come in pieces, as the interface shows them."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from app.dependencies import PLAIN, PageQuery
from app.schemas.adapters import AdapterForm
from app.schemas.common import Timestamp
from storage.tables import UploadRow

UploadState = Literal["open", "done", "failed"]
Digest = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]


class UploadRequest(AdapterForm):
    """A file that is about to come, and what is known of the adapter that it is."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {"length": 31_457_280, "sha256": "0" * 64, "file_name": "support.tar.gz", "name": "support"}
        }
    )

    length: Annotated[int, Field(strict=True, ge=1, le=2**53)] = Field(description="Bytes of the whole file.")
    sha256: Digest = Field(description="Of the whole file: what comes must have it.")
    file_name: Annotated[str, StringConstraints(min_length=1, max_length=300, pattern=PLAIN)] = Field(
        "adapter.safetensors", description="The client's name for it: a .safetensors, .gguf, .zip, .tar or .tar.gz."
    )

    def form(self) -> AdapterForm:
        """What `POST /adapters` takes beside the file."""
        return AdapterForm.model_validate(self.model_dump(include=set(AdapterForm.model_fields)))


class UploadQuery(PageQuery):
    """Filters of the list; all of them must hold."""

    sha256: Digest | None = Field(None, description="Of the whole file.")
    state: UploadState | None = None


class UploadFailure(BaseModel):
    code: str
    detail: str


class Upload(BaseModel):
    """A file on its way."""

    id: str
    state: UploadState = Field(description="open: it takes bytes; done: it is an adapter; failed: see error.")
    offset: int = Field(description="Bytes that are stored; the next append begins there.")
    length: int
    sha256: str
    file_name: str
    name: str | None = Field(description="Of the adapter, with the other fields of POST /adapters.")
    base_model: str | None
    description: str
    tags: list[str]
    adapter: str | None = Field(description="Id of the adapter that it has become.")
    error: UploadFailure | None
    created_at: Timestamp
    expires_at: Timestamp = Field(description="When it is given up, unless more bytes come.")

    @classmethod
    def of(cls, row: UploadRow) -> Self:
        form = AdapterForm.model_validate(row.form)
        return cls.model_validate(
            {
                **{name: getattr(row, name) for name in ("id", "state", "length", "sha256", "file_name", "error")},
                **form.model_dump(),
                "offset": row.received,
                "adapter": row.adapter_id,
                "created_at": row.created_at,
                "expires_at": row.expires_at,
            }
        )
