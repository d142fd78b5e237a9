"""The body of POST /merge, and the parameters of a merge job."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import ConfigDict, Field, StringConstraints

from app.dependencies import HEX_ID
from app.schemas.common import Name, RequestModel
from app.schemas.resources import Resources
from merge.catalog import METHODS
from merge.plan import MAX_ADAPTERS

Weight = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=-1e6, le=1e6)]


class MergeAdapter(RequestModel):
    """One input of a merge."""

    id: Annotated[str, StringConstraints(pattern=f"^adp_{HEX_ID}$")]
    weight: Weight = Field(1.0, description="A factor in a sum; `parameters.normalize` divides by the sum of all.")


class MergeParams(RequestModel):
    """Merge adapters of one base model into one adapter."""

    adapters: list[MergeAdapter] = Field(min_length=1, max_length=MAX_ADAPTERS)
    method: str = Field("lego", description="See GET /methods.", json_schema_extra={"enum": list(METHODS)})
    parameters: dict[str, Any] = Field(
        default_factory=dict, description="Options of the method; GET /methods/merge/{method} has their JSON Schema."
    )
    name: Name | None = Field(None, description="Name of the merged adapter.")


class MergeRequest(MergeParams):
    """A merge, and what it may ask of the machine that does it."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "adapters": [{"id": "adp_" + "0" * 32}, {"id": "adp_" + "1" * 32, "weight": 0.5}],
                "method": "lego",
                "parameters": {"rank": 16},
            }
        }
    )

    resources: Resources | None = None
