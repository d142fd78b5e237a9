"""How adapters are measured on data that nobody trains on now. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StrictInt, model_validator

from train.settings import CausalLmTask, EvaluationSettings, TrainingSettings


class MeasurementSettings(BaseModel):
    """What is measured, on how many rows, and how."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    metric: Literal["loss", "perplexity", "exact_match"] = Field(
        "loss", description="What candidates are ranked by; exact_match writes greedy answers: slow."
    )
    task: Literal["causal-lm"] | CausalLmTask = Field(
        "causal-lm", description="How rows are read; by its name, with its defaults."
    )
    max_rows: Annotated[StrictInt, Field(ge=1, le=100_000)] = Field(
        200, description="Most rows that are measured, the first of the dataset."
    )
    batch_size: Annotated[StrictInt, Field(ge=1, le=65536)] = Field(8, description="Rows of one forward pass.")
    precision: Literal["float32", "bfloat16", "float16"] = Field("float32", description="Of the base model.")
    max_new_tokens: Annotated[StrictInt, Field(ge=1, le=8192)] = Field(64, description="Longest greedy answer.")
    bootstrap: Annotated[StrictInt, Field(ge=100, le=100_000)] = Field(
        2000, description="Resamples of the paired bootstrap that gives the 95 % intervals."
    )

    @model_validator(mode="after")
    def _rows_alone(self) -> Self:
        if self.full_task.packing:
            raise ValueError("rows are measured one by one: task.packing does not apply")
        return self

    @property
    def full_task(self) -> CausalLmTask:
        return CausalLmTask() if isinstance(self.task, str) else self.task

    def evaluation(self) -> EvaluationSettings:
        """As a task takes it; all rows are there to be measured."""
        return EvaluationSettings(
            validation_fraction=0.0,
            max_rows=self.max_rows,
            exact_match=self.metric == "exact_match",
            max_new_tokens=self.max_new_tokens,
            bootstrap=self.bootstrap,
        )

    def training(self) -> TrainingSettings:
        """As a task takes it: of a loop only how a batch is made."""
        return TrainingSettings(batch_size=self.batch_size, precision=self.precision)
