"""The body of POST /adapters/{id}/load-check, and the parameters of its job."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field, StringConstraints

from app.dependencies import HEX_ID
from app.schemas.common import BaseModelName, RequestModel
from app.schemas.resources import Resources
from artifacts.loading import LoadedEngine

LONGEST_SECONDS = 600.0


class LoadCheck(RequestModel):
    """What shall load an adapter, and into what."""

    engine: LoadedEngine = Field(description="The library that loads it.")
    base_model: BaseModelName | None = Field(
        None,
        description="Id or name of the base model, of which config.json is read and never the weights; unset, its own. "
        "With neither, PEFT gets layers of the adapter's own sizes, and the others refuse.",
    )


class LoadCheckParams(LoadCheck):
    """Load an adapter in an engine's own library, and count."""

    adapter: Annotated[str, StringConstraints(pattern=f"^adp_{HEX_ID}$")]


class LoadCheckRequest(LoadCheck):
    """A check, and what it may ask of the machine that does it."""

    model_config = ConfigDict(json_schema_extra={"example": {"engine": "peft"}})

    resources: Resources | None = Field(
        None, description=f"Unless timeout_seconds is set, the attempt ends after {LONGEST_SECONDS:g} s."
    )
