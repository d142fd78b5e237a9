"""What the gate asks for. Imports neither torch nor numpy."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StrictInt

from artifacts.menu import Number


class GateSettings(BaseModel):
    """What a transferred adapter has to reach: S_t ≥ max(S_source, S_target_base) − ε."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    epsilon: Annotated[Number, Field(ge=0, le=1)] = Field(
        0.02, description="ε: how far below the better of source and untouched target a score may be."
    )
    minimum_items: Annotated[StrictInt, Field(ge=1, le=100_000)] = Field(
        20, description="Fewer measured items than this never decide: a human does."
    )
    resamples: Annotated[StrictInt, Field(ge=100, le=100_000)] = Field(
        2000, description="Resamples of the paired bootstrap that gives the 95 % interval."
    )
