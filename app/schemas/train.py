"""The body of POST /train, and the parameters of a train job."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from app.dependencies import HEX_ID
from app.schemas.common import BaseModelName, Name, RequestModel, Timestamp
from app.schemas.resources import Resources
from storage.job_metrics import Point
from train.catalog import METHODS
from train.continuation import AdapterId, ContinueFrom
from train.estimate import Estimate
from train.settings import EvaluationSettings, TaskName, TaskSettings, TrainingSettings, parse_task

MAX_SEED = 2**32 - 1
"""The largest that numpy takes."""


class TrainParams(RequestModel):
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

    @property
    def start(self) -> ContinueFrom | None:
        """The adapter to go on from."""
        return ContinueFrom.of(self.continue_from)

    @property
    def full_task(self) -> TaskSettings:
        return parse_task(self.task) if isinstance(self.task, str) else self.task


class TrainRequest(TrainParams):
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

    resources: Resources | None = None


class TrainEstimate(BaseModel):
    """What a training will take, in parameters and bytes; all null when the base model's layers are not known yet."""

    trainable_parameters: int | None = None
    base_bytes: int | None = Field(None, description="Weights of the base model.")
    adapter_bytes: int | None = None
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
