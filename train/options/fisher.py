"""How the Fisher of a base model is estimated, which may weigh the errors of quantising it. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt

from train.settings import CausalLmTask


class FisherSettings(BaseModel):
    """On which rows, and how it is used."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: CausalLmTask = Field(
        default_factory=lambda: CausalLmTask(type="causal-lm"), description="How rows become text, and the loss."
    )
    samples: Annotated[StrictInt, Field(ge=1, le=1_000_000)] = Field(
        1000,
        description="Rows at most, the first ones of the dataset; each takes a pass forward and back. 10,000 were "
        "studied.",
    )
    heuristic: Literal["two-sided", "row", "col"] = Field(
        "two-sided",
        description="Which means of the Fisher weigh the low-rank part: of rows and columns, or of one.",
    )
