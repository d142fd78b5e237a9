"""The body of POST /adapters/{id}/convert, and the parameters of its job."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, StringConstraints

from app.dependencies import HEX_ID
from app.schemas.common import BaseModelName, Name, RequestModel
from app.schemas.resources import Resources
from merge.options import MAX_RANK


class Conversion(RequestModel):
    """What an adapter shall become."""

    to: Literal["lora"] = Field(description="A plain LoRA, which every merge takes.")
    rank: Annotated[int, Field(strict=True, ge=1, le=MAX_RANK)] | None = Field(
        None,
        description="Of the result, at most; the nearest of that rank is made. Unset, the exact form of AdaLoRA, LoHa, "
        "LoKr, LQ-LoRA and VeRA, and twice the rank of a DoRA, whose change has full rank.",
    )
    base_model: BaseModelName | None = Field(
        None,
        description="Id or name of the base model, for DoRA (its weights) and VeRA (its layers); unset, its own.",
    )
    name: Name | None = Field(None, description="Name of the converted adapter.")


class ConvertParams(Conversion):
    """Make an adapter of another type a plain LoRA."""

    adapter: Annotated[str, StringConstraints(pattern=f"^adp_{HEX_ID}$")]


class ConvertRequest(Conversion):
    """A conversion, and what it may ask of the machine that does it."""

    model_config = ConfigDict(json_schema_extra={"example": {"to": "lora", "rank": 16}})

    resources: Resources | None = None
