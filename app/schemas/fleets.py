"""Fleets as the interface shows them: which adapters are moved, how far it is, and what would come of it."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, StrictBool, StringConstraints

from app.dependencies import HEX_ID, PLAIN, FilterText
from app.schemas.adapters import MAX_TAGS, Tag
from app.schemas.common import BaseModelName, RequestModel, Timestamp
from app.schemas.resources import Resources
from app.schemas.transfer import FleetParams
from storage.fleets import FleetFigures
from storage.tables import FiringItemRow, FiringRow, JobRow, TransferRow

KeyName = Annotated[str, StringConstraints(pattern=f"^key_{HEX_ID}$")]
ClockTime = Annotated[str, StringConstraints(pattern="^([01][0-9]|2[0-3]):[0-5][0-9]$")]
ItemState = Literal[
    "pending", "already", "refused", "queued", "running", "cancelling", "succeeded", "failed", "cancelled"
]


class FleetSelector(RequestModel):
    """Which adapters: all of it must hold."""

    base_model: BaseModelName = Field(description="Id or name of the registered base model that they belong to.")
    owner: KeyName | None = Field(None, description="The API key that made them.")
    tags: list[Tag] = Field(default_factory=list, max_length=MAX_TAGS, description="Each of them.")
    name: FilterText | None = Field(None, description="Part of the name, in any case.")
    transferable: StrictBool | None = Field(
        None, description="Only those that keep a discriminator and seeds, or only those that do not."
    )
    without_transfer_to: StrictBool | None = Field(
        None, description="true: only those that have no published transfer to the target base model."
    )


class StartWindow(RequestModel):
    """The hours of the day in which jobs may start; over midnight if `to` comes before `from`."""

    from_: ClockTime = Field(alias="from", description="HH:MM, included.")
    to: ClockTime = Field(description="HH:MM, not included.")
    timezone: Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=PLAIN)] | None = Field(
        None, description="IANA name; unset: the trigger's, or UTC."
    )

    def document(self) -> dict[str, Any]:
        return self.model_dump(by_alias=True)


class FleetItem(BaseModel):
    """One adapter of a fleet."""

    adapter: str
    adapter_name: str
    state: ItemState = Field(
        description="pending: has no job yet; already: another job does or did the same; refused: can not be moved, "
        "see detail; else the state of its job."
    )
    detail: str | None
    job_id: str | None
    verdict: str | None = Field(description="Of the gate: pass, hold or fail.")
    new_adapter: str | None = Field(description="The published adapter.")

    @classmethod
    def of(cls, row: FiringItemRow, job: JobRow | None, transfer: TransferRow | None) -> Self:
        return cls(
            adapter=row.adapter_id,
            adapter_name=row.adapter_name,
            state=job.state if row.state == "job" and job is not None else row.state,
            detail=row.detail,
            job_id=row.job_id,
            verdict=None if transfer is None else transfer.verdict,
            new_adapter=None if transfer is None else transfer.new_adapter,
        )


class FleetProgress(BaseModel):
    """How far a fleet is, counted over all its adapters."""

    total: int
    finished: bool = Field(description="Whether nothing of it waits or runs any more.")
    states: dict[str, int] = Field(description="State of the item → adapters; only of those that there are.")
    verdicts: dict[str, int] = Field(description="Verdict of the gate → adapters.")

    @classmethod
    def of(cls, found: FleetFigures) -> Self:
        return cls(total=found.total, finished=found.finished, states=dict(found.states), verdicts=dict(found.verdicts))


class FiringDetail(BaseModel):
    """What came of one firing; of a fleet, with its adapters."""

    occurrence: str
    due_at: Timestamp
    outcome: str
    detail: str | None
    job_id: str | None
    created_at: Timestamp
    fleet: FleetProgress | None = Field(None, description="Null if the firing made one job, or none.")
    items: list[FleetItem] = Field([], description="A page of the fleet's adapters.")
    next: str | None = Field(None, description="Cursor of the next page; null on the last.")

    @classmethod
    def of(cls, row: FiringRow) -> Self:
        """Without its fleet."""
        names = ("occurrence", "due_at", "outcome", "detail", "job_id", "created_at")
        return cls.model_validate({name: getattr(row, name) for name in names})


class PlanRequest(RequestModel):
    """Which adapters would be moved, and how: the job of a schedule without the schedule."""

    selector: FleetSelector
    params: FleetParams = Field(description="As POST /transfer takes them, without `adapter` and `seeds`.")
    resources: Resources | None = None


class TransferCost(BaseModel):
    """The most that a transfer takes, in tokens of the models that do the work; 0 for what is not done."""

    generated_tokens: int = Field(description="Inputs that the target base writes.")
    scored_tokens: int = Field(description="What the filter reads.")
    answered_tokens: int = Field(description="Answers that the source adapter writes.")
    trained_tokens: int = Field(description="What the new adapter is trained on, every epoch counted.")
    measured_tokens: int = Field(description="Answers to the holdout by every arm; without the prompts.")


class PlanItem(BaseModel):
    """What would come of one adapter."""

    adapter: str
    adapter_name: str
    moves: bool
    code: str | None = Field(description="Why not: already_moved, or the code of the refusal.")
    detail: str | None
    hint: str | None = Field(description="What to do about it.")
    job_id: str | None = Field(description="The job that does or did the same.")
    cost: TransferCost | None


class FleetPlan(BaseModel):
    """What a firing would do now. Nothing is made by asking."""

    total: int = Field(description="Adapters that match.")
    truncated: bool = Field(description="Whether only the first of them were looked at.")
    moves: int
    reasons: dict[str, int] = Field(description="Code → adapters that would not be moved.")
    cost: TransferCost = Field(description="The most that all of them take together.")
    seconds: float | None = Field(
        description="Of one device, from the newest transfers between the two base models by this method; null if "
        "there are none: unknown."
    )
    measured: int = Field(description="How many transfers `seconds` rests on.")
    items: list[PlanItem]
