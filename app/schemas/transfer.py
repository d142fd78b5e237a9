"""The body of POST /transfer, the parameters of a transfer job, and transfers as the interface shows them."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from app.dependencies import HEX_ID, PageQuery
from app.schemas.aliases import ALIAS_PATTERN
from app.schemas.common import BaseModelName, Name, RequestModel, TargetEngine, Timestamp
from app.schemas.jobs import JobProgress, State
from app.schemas.resources import Resources
from app.schemas.train import MAX_SEED
from artifacts.menu import NO_NUL
from storage.tables import JobRow, TransferRow
from transfer.catalog import METHODS
from transfer.gate_settings import GateSettings
from transfer.prompts import PromptFormat, TaskName

MAX_CONTROLS = 8
MAX_REASON = 2000

DatasetName = Annotated[str, StringConstraints(pattern=f"^dat_{HEX_ID}$")]
AdapterName = Annotated[str, StringConstraints(pattern=f"^adp_{HEX_ID}$")]
Verdict = Literal["pass", "hold", "fail"]
Decision = Literal["publish", "discard"]


class SeedsDigest(RequestModel):
    """Seeds, without their texts, which no answer ever holds."""

    count: Annotated[int, Field(strict=True, ge=1, le=1000)]
    digest: Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")] = Field(
        description="SHA-256 of the texts in their order."
    )


class FleetParams(RequestModel):
    """What transfers of several adapters share: where to, how, and how it is measured. Seeds are each adapter's own."""

    target_model: BaseModelName = Field(description="Id (mdl_…) or name of the registered base model to move it to.")
    method: str = Field("trans-lora", description="See GET /methods.", json_schema_extra={"enum": list(METHODS)})
    parameters: dict[str, Any] = Field(
        default_factory=dict, description="Options of the method; GET /methods/transfer/{method} has their JSON Schema."
    )
    task: TaskName | None = Field(None, description="Short name of the task, as people call it.")
    format: PromptFormat | None = Field(
        None,
        description="How an input becomes a prompt: as it did when the adapter was trained. Unset: the input itself.",
    )
    inputs: DatasetName | None = Field(
        None, description="Inputs that were kept (column prompt), for the methods that need them."
    )
    holdout: DatasetName | None = Field(
        None,
        description="Inputs with right answers (columns prompt and completion) that were not trained on: the gate "
        "measures with them.",
    )
    gate: GateSettings = Field(default_factory=GateSettings)
    controls: list[Annotated[str, StringConstraints(max_length=100, pattern=NO_NUL)]] = Field(
        default_factory=list,
        max_length=MAX_CONTROLS,
        description="Methods that are measured beside it: those that compute, and seeds-only.",
    )
    seed: Annotated[int, Field(strict=True, ge=0, le=MAX_SEED)] = Field(0, description="Of all that is drawn.")
    name: Name | None = Field(None, description="Name of the new adapter.")
    target_engine: TargetEngine = None


class _Transfer(FleetParams):
    """What is moved where, how, and how it is measured."""

    adapter: AdapterName = Field(description="The adapter to move.")
    alias: Annotated[str, StringConstraints(pattern=ALIAS_PATTERN)] | None = Field(
        None,
        description="An alias of the adapter: if the gate says pass, and only then, it is switched to the new one "
        "in the moment in which that is published.",
    )


class TransferParams(_Transfer):
    """The parameters of a transfer's job: seeds are there by their digest alone."""

    seeds: SeedsDigest | None = Field(
        None, description="Seeds that were given with an earlier transfer of this adapter, or with this one."
    )


class TransferRequest(_Transfer):
    """Move an adapter to another base model, without its training data."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "adapter": "adp_" + "0" * 32,
                "target_model": "mdl_" + "0" * 32,
                "method": "trans-lora",
                "parameters": {"filter": "excess", "rows": 250},
                "seeds": ["not True", "True and False", "not not False", "True or True", "False or not True"],
                "holdout": "dat_" + "0" * 32,
            }
        }
    )

    seeds: list[Annotated[str, StringConstraints(pattern=NO_NUL)]] | None = Field(
        None,
        description="3 to 50 different examples of the task's inputs, without answers, that may be used. They are "
        "confidential: no answer, event, log or metric holds them. Unset: those that are kept with the adapter.",
    )
    resources: Resources | None = None


class TransferQuery(PageQuery):
    """Filters of the list; all of them must hold."""

    adapter: AdapterName | None = Field(None, description="The adapter that is moved.")
    source_model: Annotated[str, StringConstraints(pattern=f"^mdl_{HEX_ID}$")] | None = None
    target_model: Annotated[str, StringConstraints(pattern=f"^mdl_{HEX_ID}$")] | None = None
    schedule: Annotated[str, StringConstraints(pattern=f"^sch_{HEX_ID}$")] | None = Field(
        None, description="The schedule that made it."
    )
    verdict: Verdict | None = None
    state: State | None = Field(None, description="Of its job.")


class DecisionRequest(RequestModel):
    """What becomes of an adapter that the gate holds."""

    model_config = ConfigDict(json_schema_extra={"example": {"decision": "publish", "reason": "looked at by hand"}})

    decision: Decision
    reason: Annotated[str, StringConstraints(max_length=MAX_REASON, pattern=NO_NUL)] | None = None


class DecisionShown(BaseModel):
    decision: Decision
    by: str | None = Field(description="The API key of who decided; null where keys are off.")
    at: Timestamp
    reason: str | None


class Transfer(BaseModel):
    """A transfer, without its report."""

    id: str = Field(description="Id of its job.")
    key: str = Field(description="SHA-256 of all that decides the new adapter.")
    adapter: str
    adapter_name: str
    source_model: str
    target_model: str
    method: str
    state: State
    progress: JobProgress
    verdict: Verdict | None = Field(description="Of the gate; null until it has judged. hold: it waits for a decision.")
    degraded: bool = Field(description="Too few generated inputs were accepted, and the best of the others were taken.")
    waiting: bool = Field(description="The adapter is made, and waits for a decision.")
    decision: DecisionShown | None
    new_adapter: str | None = Field(description="The published adapter.")
    seeds: SeedsDigest | None
    schedule_id: str | None
    superseded_by: str | None = Field(description="The job that does the same after this one failed.")
    created_at: Timestamp
    finished_at: Timestamp | None
    link: str = Field(description="Where the report is.")

    @classmethod
    def of(cls, row: TransferRow, job: JobRow) -> Self:
        decided = None
        if row.decision is not None:
            decided = {"decision": row.decision, "by": row.decided_by, "at": row.decided_at, "reason": row.reason}
        names = ("key", "adapter_name", "source_model", "target_model", "method", "verdict", "degraded", "new_adapter")
        return cls.model_validate(
            {
                **{name: getattr(row, name) for name in (*names, "schedule_id", "superseded_by", "created_at")},
                "id": row.job_id,
                "adapter": row.adapter_id,
                "state": job.state,
                "progress": {
                    "fraction": job.fraction,
                    "step": job.step,
                    "total": job.total,
                    "message": job.message,
                },
                "waiting": row.held is not None,
                "decision": decided,
                "seeds": job.params.get("seeds"),
                "finished_at": job.finished_at,
                "link": f"/transfers/{row.job_id}/report",
            }
        )


class TransferReport(BaseModel):
    """What a transfer did, measured: counts and rates, no text of any input and no score of the discriminator."""

    transfer: Transfer
    report: dict[str, Any]
