"""Datasets as the interface shows them."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from app.dependencies import PLAIN, FilterText, PageQuery
from app.schemas.common import Name, RequestModel, Timestamp
from storage.tables import DatasetRow
from train.rows import FORMATS, Format

MAX_OFFSET = 1_000_000


class DatasetForm(RequestModel):
    """The text fields of an upload."""

    name: Name | None = None
    format: Format | None = None


class DatasetQuery(PageQuery):
    """Filters of the list; all of them must hold."""

    name: FilterText | None = Field(None, description="Part of the name, in any case.")
    format: Format | None = None
    sha256: Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")] | None = Field(
        None, description="Digest of the file."
    )


class ColumnKind(BaseModel):
    """One of the types that the values of a column have."""

    type: str
    rows: int
    first_row: int = Field(description="Number of the first row that has it, from 1.")


class DatasetColumn(BaseModel):
    name: str
    type: str = Field(
        description="string, integer, number, boolean, list<string>, list<integer>, list, messages, object; "
        "null: no row has a value; mixed: several, which `kinds` lists."
    )
    nulls: int = Field(description="Rows without a value.")
    kinds: list[ColumnKind]


class DatasetTask(BaseModel):
    """Whether the dataset can serve one task, in one form of data."""

    task: str = Field(
        description="causal-lm, sequence-classification, token-classification, transcript-classification or "
        "text-to-image."
    )
    form: str = Field(description="chat, prompt-completion, text, text-label, tokens-tags, sequence-label or images.")
    columns: list[str] = Field(description="Those that the task reads.")
    usable: bool
    reason: str | None = Field(description="Why it can not serve it.")


class DatasetSummary(BaseModel):
    """A dataset, without its columns."""

    id: str
    name: str
    format: Format
    size: int = Field(description="Bytes of the file.")
    rows: int
    sha256: str = Field(description="Of the file.")
    created_at: Timestamp

    @classmethod
    def of(cls, row: DatasetRow) -> Self:
        return cls.model_validate(row, from_attributes=True)


class Dataset(DatasetSummary):
    """Everything that is known of a dataset."""

    columns: list[DatasetColumn]
    tasks: list[DatasetTask]
    warnings: list[str] = Field(description="What is odd about it, and no reason to refuse it.")

    @classmethod
    def of(cls, row: DatasetRow) -> Self:
        return cls.model_validate(row, from_attributes=True)


class RowQuery(BaseModel):
    """Which rows to show."""

    model_config = ConfigDict(extra="forbid")

    offset: int = Field(0, ge=0, le=MAX_OFFSET, description="Rows to leave out at the start.")
    limit: int = Field(20, ge=1, le=200, description="Most rows of one answer; long rows make it fewer.")


class NumberedRow(BaseModel):
    """A row of a dataset. `row` is its number, from 1."""

    row: int
    values: dict[str, Any]


class DatasetRows(BaseModel):
    """Some rows of a dataset, in order."""

    items: list[NumberedRow]
    total: int = Field(description="Rows of the whole dataset.")
    next: int | None = Field(description="`offset` of the rows that follow; null behind the last that can be shown.")


UPLOAD_FORM_SCHEMA: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["file"],
    "properties": {
        "file": {
            "description": "JSON Lines, CSV, FASTA (all also as .gz), Parquet, or a zip of images.",
            "type": "string",
            "format": "binary",
        },
        "name": {"type": "string", "minLength": 1, "maxLength": 200, "pattern": PLAIN},
        "format": {
            "description": "Unset: by the file's name or, failing that, by its content.",
            "type": "string",
            "enum": list(FORMATS),
        },
    },
}
