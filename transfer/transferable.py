"""What a training is asked for beside its adapter, so that the adapter can be moved to other base models later: the
menu of stage 0 (arXiv:2405.17258, section 3). Imports no torch.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, model_validator

from artifacts.menu import Number
from train.catalog import parse_parameters
from train.options.common import LowRankOptions, TrainOptions
from train.settings import TrainingSettings
from transfer.options import MAX_CANDIDATES, MAX_ROWS, BatchSize, Share, Tokens
from transfer.prompts import PromptFormat, TaskName

CANDIDATES_EACH = 4
"""Inputs that are invented at most for each one that is wanted."""


class DiscriminatorSettings(BaseModel):
    """How the discriminator is trained: a LoRA on the same base that tells the data's inputs from invented ones."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    parameters: dict[str, Any] = Field(
        {}, description="Of the method lora. rank and target_modules that are not given are those of the adapter."
    )
    training: TrainingSettings | None = Field(
        None, description="Its loop; unset, as the adapter's own (without early stopping)."
    )
    chat: StrictBool | None = Field(
        None, description="Whether its question is a user's turn in a chat; unset, as the format of the prompts has it."
    )
    examples: Annotated[StrictInt, Field(ge=5, le=MAX_ROWS)] | None = Field(
        None, description="Most inputs of either kind, real and invented; unset, as many as the dataset has (paper)."
    )
    max_candidates: Annotated[StrictInt, Field(ge=16, le=MAX_CANDIDATES)] | None = Field(
        None, description=f"Most inputs that are invented; unset, {CANDIDATES_EACH} for each that is wanted."
    )
    temperature: Annotated[Number, Field(gt=0, le=10)] = Field(1.0, description="Of the inventing.")
    top_p: Share = Field(1.0, description="Draw from the fewest tokens whose probabilities reach this sum.")
    input_tokens: Tokens = Field(
        128, description="Longest invented input, tokens; one that has not ended by then is left out."
    )
    generation_batch: BatchSize = Field(
        32, description="Inputs that are invented together, and kept together if the job is interrupted."
    )

    @model_validator(mode="after")
    def _trainable(self) -> DiscriminatorSettings:
        if self.training is not None and self.training.early_stopping is not None:
            raise ValueError("training.early_stopping: a discriminator trains for all its steps")
        return self

    def options(self, adapter: TrainOptions) -> TrainOptions:
        """Of the method lora, for a discriminator beside an adapter of these options.

        Raises:
            RequestInvalid: at /parameters/….
        """
        same: dict[str, Any] = {"target_modules": adapter.target_modules} if adapter.adapts_layers else {}
        if isinstance(adapter, LowRankOptions):
            same["rank"] = adapter.rank
        return parse_parameters("lora", same | self.parameters)

    def loop(self, adapter: TrainingSettings) -> TrainingSettings:
        """The discriminator's loop beside a training of the adapter with these settings."""
        return adapter.model_copy(update={"early_stopping": None}) if self.training is None else self.training

    def candidates(self, wanted: int) -> int:
        """The most inputs that are invented to have so many."""
        return CANDIDATES_EACH * wanted if self.max_candidates is None else self.max_candidates


class TransferableSettings(BaseModel):
    """What a transfer will need of this training, but for the seeds, which are confidential."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    task: TaskName = Field(
        description='Short human name of the task, such as "boolean expressions": the discriminator is asked whether '
        "an input is of that dataset. It is shown."
    )
    format: PromptFormat | None = Field(
        None,
        description="How an input becomes a prompt of the dataset. Unset: the prompt is the input; of chats, the "
        "user's turn is, and the system's turn, if all have the same, belongs to the format.",
    )
    discriminator: DiscriminatorSettings = Field(default_factory=DiscriminatorSettings)
    drop_dataset: StrictBool = Field(
        False,
        description="Remove the dataset, row and bytes, when the adapter is published. Refused while other "
        "unfinished jobs or schedules name it.",
    )
