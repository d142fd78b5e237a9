"""Jobs as the interface shows them."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Literal, Self

from pydantic import BaseModel, Field
from sqlalchemy.orm import Session

from app.dependencies import FilterText, PageQuery
from app.schemas.common import Timestamp, as_json
from app.schemas.imports import shown_params
from app.schemas.resources import Resources
from storage.outlook import Outlook, WaitReason, outlook_of, position_of
from storage.retirement import warnings_of
from storage.tables import JobRow

State = Literal["queued", "running", "cancelling", "succeeded", "failed", "cancelled"]


class JobQuery(PageQuery):
    """Filters of the list."""

    kind: FilterText | None = Field(None, description="merge, train …")
    state: State | None = None


class JobProgress(BaseModel):
    fraction: float = Field(description="0 to 1.")
    step: int | None
    total: int | None
    message: str


class JobResult(BaseModel):
    adapters: list[str] = Field(description="Ids of the adapters that the job made.")
    images: list[str]
    models: list[str] = Field([], description="Ids of the base models that the job made.")
    report: dict[str, Any]


class JobFinding(BaseModel):
    """One thing that is wrong, and where."""

    pointer: str = Field(description="A JSON pointer into the parameters, or a file name or tensor key.")
    message: str


class JobError(BaseModel):
    code: str
    detail: str
    hint: str | None = None
    exit: dict[str, Any] | None = Field(None, description="Exit code, signal and peak memory of the worker process.")
    errors: list[JobFinding] = Field(default_factory=list, description="The single findings, when there are several.")
    log: list[str] | None = Field(
        None, description="Last lines of the attempt's log, if they may explain the failure; null in lists."
    )


class JobWaiting(BaseModel):
    """Why a job waits: of several reasons the one that has to go first."""

    reason: WaitReason = Field(
        description="back_off: an attempt failed, the next one comes later; no_server: none is alive; quota: its API "
        "key's jobs hold all slots that they may; held: slots are kept free for it; devices: too few idle ones on one "
        "host; slots_busy: all are; starting: workers are; next: it is about to be taken; window: its schedule's hours "
        "have ended; clients: its federated clients are at work."
    )
    detail: str


class Job(BaseModel):
    """A job. Terminal states are succeeded, failed and cancelled."""

    id: str
    kind: str
    state: State
    attempt: int
    progress: JobProgress
    params: dict[str, Any]
    resources: dict[str, Any] = Field(description="devices and timeout_seconds, as asked for.")
    result: JobResult | None
    error: JobError | None
    retry_of: str | None = Field(description="The job that this one runs again.")
    schedule_id: str | None = Field(description="The schedule that made it.")
    created_at: Timestamp
    started_at: Timestamp | None
    finished_at: Timestamp | None
    position: int | None = Field(
        None,
        description="Place in the queue, 1 is next; only while queued, not in lists, and not beyond 10,000 jobs of the "
        "same API key. API keys take turns: with several the place is an estimate.",
    )
    waiting: JobWaiting | None = Field(None, description="Why it waits; only of a single job that is queued.")
    eta_seconds: float | None = Field(
        None,
        description="Estimated seconds until it ends; only of a single job. While it runs, from its progress and the "
        "run times of the newest jobs of its kind; while it waits, from its position and the run times of the kinds "
        "that wait. Null when these say too little.",
    )
    cancel_requested: bool
    warnings: list[str] = Field(
        [], description="Only of a single job: that the base model it loads is deprecated, until when, what to use."
    )

    @classmethod
    def of(cls, session: Session, row: JobRow) -> Self:
        """As the answer to a call that changes it: with its position."""
        return cls._of(row, Outlook(position=position_of(session, row)), with_log=True)._warned(session, row)

    @classmethod
    def in_list(cls, row: JobRow) -> Self:
        """Without what costs a query for every row, and without the lines of its log."""
        return cls._of(row, Outlook(), with_log=False)

    @classmethod
    def in_full(cls, session: Session, row: JobRow, alive_within: float) -> Self:
        """With all that lies ahead of it.

        Args:
            alive_within: see `outlook_of`.
        """
        return cls._of(row, outlook_of(session, row, alive_within), with_log=True)._warned(session, row)

    @classmethod
    def _of(cls, row: JobRow, outlook: Outlook, *, with_log: bool) -> Self:
        return cls(
            id=row.id,
            kind=row.kind,
            state=row.state,
            attempt=row.attempt,
            progress=JobProgress(fraction=row.fraction, step=row.step, total=row.total, message=row.message),
            params=shown_params(row.kind, row.params),
            resources={name: value for name, value in row.resources.items() if name in Resources.model_fields},
            retry_of=row.retry_of,
            schedule_id=row.schedule_id,
            result=None if row.result is None else JobResult.model_validate(row.result),
            error=None if row.error is None else _error(row.error, with_log),
            created_at=row.created_at,
            started_at=row.started_at,
            finished_at=row.finished_at,
            position=outlook.position,
            waiting=None if outlook.waiting is None else JobWaiting.model_validate(asdict(outlook.waiting)),
            eta_seconds=outlook.eta_seconds,
            cancel_requested=row.cancel_requested,
        )

    def _warned(self, session: Session, row: JobRow) -> Self:
        if row.affinity is not None:
            self.warnings = warnings_of(session, [row.affinity])
        return self

    def body(self) -> Any:
        """The JSON value; `position` is there only while the job waits."""
        return as_json(self, exclude={"position"} if self.position is None else None)


def _error(found: dict[str, Any], with_log: bool) -> JobError:
    return JobError.model_validate(found if with_log else {**found, "log": None})
