"""The body of POST /train, and the parameters of a train job."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator

from app.dependencies import HEX_ID
from app.schemas.common import BaseModelName, Name, RequestModel, TargetEngine, Timestamp, as_json
from app.schemas.resources import Resources
from artifacts.errors import RequestInvalid
from artifacts.menu import NO_NUL
from storage.job_metrics import Point
from train.catalog import METHODS
from train.continuation import AdapterId, ContinueFrom
from train.estimate import Estimate
from train.settings import EvaluationSettings, TaskName, TaskSettings, TrainingSettings, parse_task
from transfer.seeds import MAX_SEEDS, MIN_SEEDS, parse_seeds
from transfer.transferable import TransferableSettings

MAX_SEED = 2**32 - 1
"""The largest that numpy takes."""


class Training(RequestModel):
    """Train an adapter for a base model on a dataset."""

    method: str = Field("lora", description="See GET /methods.", json_schema_extra={"enum": list(METHODS)})
    base_model: BaseModelName = Field(description="Id (mdl_…) or name of a registered base model.")
    dataset: Annotated[str, StringConstraints(pattern=f"^dat_{HEX_ID}$")]
    task: TaskName | TaskSettings = Field(
        "causal-lm", description="A task by its name stands for the task with its defaults."
    )
    parameters: dict[str, Any] = Field(
        default_factory=dict, description="Options of the method; GET /methods/train/{method} has their JSON Schema."
    )
    training: TrainingSettings = Field(default_factory=TrainingSettings)
    evaluation: EvaluationSettings = Field(default_factory=EvaluationSettings)
    continue_from: AdapterId | ContinueFrom | None = Field(
        None,
        description="A stored adapter to go on from: its layers, rank and scaling hold, and `parameters` leaves them "
        "out. `capabilities.continues` of a method tells from which types it can.",
    )
    seed: Annotated[int, Field(strict=True, ge=0, le=MAX_SEED)] = Field(
        0, description="Of the adapter's first values, the order of the rows and dropout."
    )
    name: Name | None = Field(None, description="Name of the trained adapter.")
    target_engine: TargetEngine = None

    @property
    def start(self) -> ContinueFrom | None:
        """The adapter to go on from."""
        return ContinueFrom.of(self.continue_from)

    @property
    def full_task(self) -> TaskSettings:
        return parse_task(self.task) if isinstance(self.task, str) else self.task


class TransferableRequest(TransferableSettings):
    """What the adapter keeps so that it can be moved to other base models without the dataset. The seeds, confidential
    like the dataset, are shown by no call."""

    seeds: list[Annotated[str, StringConstraints(pattern=NO_NUL)]] = Field(
        description=f"{MIN_SEEDS} to {MAX_SEEDS} different examples of the task's inputs, without answers. By giving "
        "them their owner allows to keep them; none is ever taken from the dataset."
    )

    @field_validator("seeds")
    @classmethod
    def _usable(cls, seeds: list[str]) -> list[str]:
        try:
            return list(parse_seeds(seeds))
        except RequestInvalid as error:
            # One finding a request is enough of a hint, and the way in which bodies tell theirs.
            first = error.errors[0]
            place = first.pointer.removeprefix("/seeds").removeprefix("/")
            raise ValueError(f"seed {place} {first.message}" if place else first.message) from None


class TransferableParams(TransferableSettings):
    """What a job shows of it."""

    seeds: Annotated[int, Field(strict=True, ge=MIN_SEEDS, le=MAX_SEEDS)]


class TrainParams(Training):
    """The parameters of a train job: the request, but for what nobody may read."""

    transferable: TransferableParams | None = None


class TrainRequest(Training):
    """A training, and what it may ask of the machine that does it."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "method": "lora",
                "base_model": "mdl_" + "0" * 32,
                "dataset": "dat_" + "0" * 32,
                "parameters": {"rank": 16},
                "training": {"epochs": 3, "batch_size": 8, "learning_rate": 0.0002},
            }
        }
    )

    transferable: TransferableRequest | None = Field(
        None,
        description="Have the adapter keep what a transfer to another base model needs: seeds and a discriminator, "
        "which the same job trains. Task causal-lm, on one device.",
    )
    resources: Resources | None = None

    @field_validator("transferable", mode="before")
    @classmethod
    def _switched(cls, value: object) -> object:
        """True alone lacks what it needs, and is told so; false is null."""
        return {} if value is True else None if value is False else value

    def params(self) -> dict[str, Any]:
        """The job's parameters: of the seeds their number."""
        found: dict[str, Any] = as_json(self, exclude={"resources": True, "transferable": {"seeds"}})
        if self.transferable is not None:
            found["transferable"]["seeds"] = len(self.transferable.seeds)
        return found

    def sealed(self) -> dict[str, Any] | None:
        """What only the job's worker may read."""
        return None if self.transferable is None else {"seeds": self.transferable.seeds}


class TrainEstimate(BaseModel):
    """What a training will take, in parameters and bytes; all null when the base model's layers are not known yet."""

    trainable_parameters: int | None = None
    base_bytes: int | None = Field(None, description="Weights of the base model.")
    adapter_bytes: int | None = None
    gradient_bytes: int | None = Field(None, description="Of all gradients, or of the largest layer if each is freed.")
    optimizer_bytes: int | None = None
    activation_bytes: int | None = Field(None, description="A guess, for a batch of the longest rows.")
    floor_bytes: int | None = Field(None, description="Taken for certain: all but the activations.")
    peak_bytes: int | None = Field(None, description="With the activations.")

    @classmethod
    def of(cls, estimate: Estimate | None) -> Self:
        return cls() if estimate is None else cls.model_validate(estimate.to_dict())


class MetricPoint(BaseModel):
    """The numbers of one step."""

    step: int
    at: Timestamp
    numbers: dict[str, float]


class MetricSeries(BaseModel):
    """A piece of a job's series, in the order of the steps."""

    items: list[MetricPoint]
    next_step: int | None = Field(description="Ask again with `after` of this for the rest; null at the end.")

    @classmethod
    def of(cls, points: list[tuple[Point, Any]], limit: int) -> Self:
        items = [MetricPoint(step=p.step, at=at, numbers=dict(p.numbers)) for p, at in points]
        return cls(items=items, next_step=items[-1].step if len(items) == limit else None)
