"""Schedules as the interface shows them."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StringConstraints, model_validator

from app.dependencies import HEX_ID, PLAIN
from app.job_kinds import JOB_KINDS
from app.schemas.common import Name, RequestModel, Timestamp, as_json
from app.schemas.fleets import FleetSelector, StartWindow
from app.schemas.imports import shown_params
from app.schemas.resources import Resources
from storage import schedules
from storage.schedules import Pace
from storage.tables import FiringRow, ScheduleRow
from storage.timetable import CRON_LIMIT

MaxParallel = Annotated[int, Field(strict=True, ge=1, le=1000)]
Overlap = Literal["skip", "queue", "replace"]
Misfire = Literal["run-once", "skip"]
EventType = Literal["base_model.registered", "base_model.deprecated", "base_model.removed"]
Outcome = Literal["job", "fleet", "skipped", "missed", "refused"]

_NULL = {"type": "null"}
_CRON_BRANCH: dict[str, Any] = {
    "required": ["cron"],
    "properties": {"cron": {"type": "string"}, "event": _NULL, "subject": _NULL},
}
_EVENT_BRANCH: dict[str, Any] = {
    "required": ["event"],
    "properties": {"event": {"type": "string"}, "cron": _NULL, "timezone": _NULL},
}


class ScheduleTrigger(RequestModel):
    """Either `cron` (in `timezone`), or `event` (of one `subject`, or of all)."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [_CRON_BRANCH, _EVENT_BRANCH],
            "example": {"cron": "30 3 * * MON-FRI", "timezone": "Europe/Berlin"},
        }
    )

    cron: Annotated[str, StringConstraints(min_length=1, max_length=CRON_LIMIT, pattern=PLAIN)] | None = Field(
        None, description="Minute, hour, day of month, month, day of week."
    )
    timezone: Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=PLAIN)] | None = Field(
        None, description="IANA name; UTC unless given."
    )
    event: EventType | None = None
    subject: Annotated[str, StringConstraints(pattern=f"^mdl_{HEX_ID}$")] | None = Field(
        None, description="Id of the base model whose events count; unset: of any."
    )

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if (self.cron is None) == (self.event is None):
            raise ValueError("give either cron or event")
        if self.cron is not None and self.subject is not None:
            raise ValueError("subject belongs to event")
        if self.event is not None and self.timezone is not None:
            raise ValueError("timezone belongs to cron")
        return self

    def trigger(self) -> schedules.Trigger:
        return schedules.Trigger(cron=self.cron, timezone=self.timezone, event=self.event, subject=self.subject)


class ScheduledJob(RequestModel):
    """The job that every firing makes; checked now, and again whenever it is made."""

    kind: str = Field(description="merge …", json_schema_extra={"enum": list(JOB_KINDS)})
    params: dict[str, Any] = Field(description="As the kind's own call takes them: those of POST /merge.")
    resources: Resources | None = None
    selector: FleetSelector | None = Field(
        None, description="Of the kind transfer: a job for each adapter that matches; `params` are without `adapter`."
    )

    def asked(self) -> dict[str, Any]:
        return {} if self.resources is None else as_json(self.resources, exclude_none=True)


_EXAMPLE: dict[str, Any] = {
    "name": "nightly merge",
    "trigger": {"cron": "0 3 * * *", "timezone": "Europe/Berlin"},
    "job": {
        "kind": "merge",
        "params": {"adapters": [{"id": "adp_" + "0" * 32}, {"id": "adp_" + "1" * 32}], "method": "cat"},
    },
}


class ScheduleRequest(RequestModel):
    """A job that is to be made again and again."""

    model_config = ConfigDict(json_schema_extra={"example": _EXAMPLE})

    name: Name | None = Field(None, description="Unset: made of the job's kind and the trigger.")
    trigger: ScheduleTrigger
    job: ScheduledJob
    overlap: Overlap = Field("skip", description="What a firing does while a job of an earlier one is unfinished.")
    misfire: Misfire = Field(
        "run-once", description="What comes of firings that no server was there for: one job for all of them, or none."
    )
    enabled: StrictBool = True
    max_parallel: MaxParallel | None = Field(
        None, description="Of a fleet: how many of its jobs may be unfinished at once; unset: 8."
    )
    window: StartWindow | None = Field(None, description="Of a fleet: when its jobs may start; unset: always.")

    def pace(self) -> Pace:
        return Pace(self.max_parallel, None if self.window is None else self.window.document())


class SchedulePatch(RequestModel):
    """What is left out, or null, stays; `trigger` and `job` are replaced as a whole. A null `max_parallel` or `window`
    is one that is unset: 8, and always."""

    name: Name | None = None
    trigger: ScheduleTrigger | None = None
    job: ScheduledJob | None = None
    overlap: Overlap | None = None
    misfire: Misfire | None = None
    enabled: StrictBool | None = Field(None, description="false pauses it, and the fleet that it is at.")
    max_parallel: MaxParallel | None = Field(None, description="null: 8 again.")
    window: StartWindow | None = Field(None, description="null: always again.")

    def unset(self) -> set[str]:
        """Which of the fleet's limits are to be as if they had never been given."""
        return {name for name in {"max_parallel", "window"} & self.model_fields_set if getattr(self, name) is None}


class TriggerShown(BaseModel):
    cron: str | None = None
    timezone: str | None = None
    event: str | None = None
    subject: str | None = None


class JobShown(BaseModel):
    kind: str
    params: dict[str, Any]
    resources: dict[str, Any]
    selector: dict[str, Any] | None = None


class ScheduleResource(BaseModel):
    """A schedule. `version` counts its changes and is its ETag."""

    id: str
    name: str
    trigger: TriggerShown
    job: JobShown
    overlap: Overlap
    misfire: Misfire
    enabled: bool
    max_parallel: int | None = None
    window: dict[str, str] | None = None
    next_fire_at: Timestamp | None = Field(description="Null while it is disabled, and when events start it.")
    version: int
    created_by: str | None = Field(description="The API key that owns its jobs.")
    created_at: Timestamp
    updated_at: Timestamp

    @classmethod
    def of(cls, row: ScheduleRow) -> Self:
        return cls(
            id=row.id,
            name=row.name,
            trigger=TriggerShown(cron=row.cron, timezone=row.timezone, event=row.event, subject=row.subject),
            job=JobShown(
                kind=row.job_kind,
                params=shown_params(row.job_kind, row.job_params),
                resources=row.job_resources,
                selector=row.job_selector,
            ),
            overlap=row.overlap,
            misfire=row.misfire,
            enabled=row.enabled,
            max_parallel=row.max_parallel,
            window=row.window,
            next_fire_at=row.next_fire_at,
            version=row.version,
            created_by=row.created_by,
            created_at=row.created_at,
            updated_at=row.updated_at,
        )

    def body(self) -> Any:
        """The JSON value; of the trigger and the job only what their kind has."""
        document: dict[str, Any] = as_json(self)
        kept = ("cron", "timezone") if self.trigger.cron is not None else ("event", "subject")
        document["trigger"] = {name: document["trigger"][name] for name in kept}
        if self.job.selector is None:  # what only a fleet has
            for part, name in ((document["job"], "selector"), (document, "max_parallel"), (document, "window")):
                del part[name]
        return document


class UpcomingFiring(BaseModel):
    at: Timestamp
    local: str = Field(description="The same moment as the clocks of the schedule's time zone show it.")


class Upcoming(BaseModel):
    """When a schedule fires next: nothing while it is disabled, and when events start it."""

    words: str = Field(description="The trigger in English.")
    timezone: str | None
    enabled: bool
    items: list[UpcomingFiring]

    @classmethod
    def of(cls, row: ScheduleRow, moment: datetime, number: int) -> Self:
        """The next `number` firings after `moment`."""
        timetable = schedules.timetable_of(row)
        if timetable is None:
            subject = f" to {row.subject}" if row.subject else ""
            return cls(words=f"Whenever {row.event} happens{subject}", timezone=None, enabled=row.enabled, items=[])
        items = [
            UpcomingFiring(at=time, local=timetable.local(time).isoformat())
            for time in (timetable.upcoming(moment, number) if row.enabled else ())
        ]
        return cls(words=timetable.words(), timezone=row.timezone, enabled=row.enabled, items=items)


class Firing(BaseModel):
    """What came of one time, one event or one request."""

    occurrence: str = Field(description="The time, the id of the event, or an id of the request; unique.")
    due_at: Timestamp
    outcome: Outcome
    detail: str | None
    job_id: str | None
    created_at: Timestamp

    @classmethod
    def of(cls, row: FiringRow) -> Self:
        return cls.model_validate(row, from_attributes=True)
