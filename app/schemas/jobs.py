"""Jobs as the interface shows them."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, Field
from sqlalchemy.orm import Session

from app.dependencies import FilterText, PageQuery
from app.schemas.common import Timestamp, as_json
from storage import jobs
from storage.tables import JobRow

State = Literal["queued", "running", "cancelling", "succeeded", "failed", "cancelled"]


class JobQuery(PageQuery):
    """Filters of the list."""

    kind: FilterText | None = Field(None, description="merge …")
    state: State | None = None


class JobProgress(BaseModel):
    fraction: float = Field(description="0 to 1.")
    step: int | None
    total: int | None
    message: str


class JobResult(BaseModel):
    adapters: list[str] = Field(description="Ids of the adapters that the job made.")
    images: list[str]
    report: dict[str, Any]


class JobError(BaseModel):
    code: str
    detail: str
    hint: str | None = None
    exit: dict[str, Any] | None = Field(None, description="Exit code, signal and peak memory of the worker process.")


class Job(BaseModel):
    """A job. Terminal states are succeeded, failed and cancelled."""

    id: str
    kind: str
    state: State
    attempt: int
    progress: JobProgress
    params: dict[str, Any]
    result: JobResult | None
    error: JobError | None
    created_at: Timestamp
    started_at: Timestamp | None
    finished_at: Timestamp | None
    position: int | None = Field(None, description="Place in the queue, 1 is next; only while queued.")
    cancel_requested: bool

    @classmethod
    def of(cls, session: Session, row: JobRow) -> Self:
        return cls(
            id=row.id,
            kind=row.kind,
            state=row.state,
            attempt=row.attempt,
            progress=JobProgress(fraction=row.fraction, step=row.step, total=row.total, message=row.message),
            params=row.params,
            result=None if row.result is None else JobResult.model_validate(row.result),
            error=None if row.error is None else JobError.model_validate(row.error),
            created_at=row.created_at,
            started_at=row.started_at,
            finished_at=row.finished_at,
            position=jobs.queue_position(session, row),
            cancel_requested=row.cancel_requested,
        )

    def body(self) -> Any:
        """The JSON value; `position` is there only while the job waits."""
        return as_json(self, exclude={"position"} if self.position is None else None)
