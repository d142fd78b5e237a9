"""What a federated client on a machine of its own is told, and what it sends."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field

from app.schemas.common import RequestModel, Timestamp
from artifacts.safetensors_header import TensorInfo
from storage.tables import ClientUpdateRow, ModelRow
from train.options.ffa_lora import MAX_ROWS

Seconds = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]


class UpdateForm(RequestModel):
    """The text fields beside the file."""

    rows: Annotated[int, Field(ge=1, le=MAX_ROWS)]
    seconds: Seconds = 0.0
    loss: Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)] | None = None


UPDATE_FORM_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["file", "rows"],
    "additionalProperties": False,
    "properties": {
        "file": {"type": "string", "format": "binary", "description": "A safetensors file of the trained tensors."},
        "rows": {
            "type": "integer",
            "minimum": 1,
            "maximum": MAX_ROWS,
            "description": "How many rows it was trained on.",
        },
        "seconds": {"type": "number", "minimum": 0, "maximum": 1e9, "description": "That the steps took."},
        "loss": {
            "type": "number",
            "minimum": 0,
            "maximum": 1e9,
            "description": "Mean loss of the steps, if it may be told.",
        },
    },
}


class RemoteBase(BaseModel):
    """The base model that the client needs: its own copy must have the same weights."""

    name: str
    hub_id: str | None
    revision: str | None
    architecture: str | None
    weights_digest: str | None
    tokenizer_digest: str | None
    fingerprint_digest: str | None

    @classmethod
    def of(cls, row: ModelRow) -> Self:
        hub_id = row.location if row.source == "hub" else None
        names = ("name", "revision", "architecture", "weights_digest", "tokenizer_digest", "fingerprint_digest")
        return cls(hub_id=hub_id, **{name: getattr(row, name) for name in names})


class TrainedTensor(BaseModel):
    """A tensor that the client trains and gives back."""

    dtype: str = Field(description="As safetensors has it.")
    shape: list[int]


class WantedUpdate(BaseModel):
    """What the service takes for the round."""

    adapter: str = Field(description="Path of the common adapter that the round begins with (safetensors).")
    update: str = Field(description="Path that takes what was trained, with PUT.")
    tensors: dict[str, TrainedTensor]
    max_bytes: int = Field(description="Of the file.")
    min_rows: int
    max_rows: int
    max_norm: float | None = Field(
        description="Farthest from the adapter of the round: Frobenius norm over all tensors."
    )

    @classmethod
    def tensors_of(cls, trained: dict[str, TensorInfo]) -> dict[str, TrainedTensor]:
        return {name: TrainedTensor(dtype=info.dtype, shape=list(info.shape)) for name, info in trained.items()}


class GivenUpdate(BaseModel):
    """What the client gave in a round."""

    job_id: str
    round: int = Field(description="From 1.")
    client: int
    sha256: str
    bytes: int
    rows: int
    norm: float = Field(description="How far it is from the round's start: Frobenius norm.")
    finished_at: Timestamp

    @classmethod
    def of(cls, row: ClientUpdateRow) -> Self:
        told = {name: row.details[name] for name in ("sha256", "bytes", "rows", "norm")}
        return cls.model_validate(
            {
                "job_id": row.job_id,
                "round": row.round + 1,
                "client": row.client,
                "finished_at": row.finished_at,
                **told,
            }
        )


class RemoteTask(BaseModel):
    """What a remote client has to know and to do."""

    job_id: str
    client: int = Field(description="Its place in `parameters.clients`, from 0.")
    name: str
    training_state: Literal["queued", "running", "cancelling", "succeeded", "failed", "cancelled"]
    state: Literal["waiting", "asked", "answered", "late", "lost", "refused", "over"] = Field(
        description="waiting: no round is open yet; asked: the round waits for this client; answered, late, lost, "
        "refused: its part of the round is over, and a new round may follow; over: the training has ended."
    )
    reason: str | None = Field(description="Why its part of the round is over without a use.")
    round: int | None = Field(description="From 1; the newest that was opened.")
    deadline: Timestamp | None = Field(description="After which what it gives is late.")
    base_model: RemoteBase
    method: str
    task: Any
    parameters: dict[str, Any] = Field(description="With nothing but the number of the other clients.")
    training: dict[str, Any]
    seed: int
    wanted: WantedUpdate | None = Field(description="While it is asked.")
    given: GivenUpdate | None = Field(description="What it gave in this round.")
