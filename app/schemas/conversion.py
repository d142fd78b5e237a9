"""The body of POST /adapters/{id}/convert, and the parameters of its job."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, StringConstraints

from app.dependencies import HEX_ID
from app.schemas.common import BaseModelName, Name, RequestModel
from app.schemas.resources import Resources
from artifacts.menu import Number
from merge.options import MAX_RANK


class Conversion(RequestModel):
    """What an adapter shall become."""

    to: Literal["lora", "unpacked_lora", "merged"] = Field(
        description="lora: a plain LoRA, which every merge takes. Of an LQ-LoRA also unpacked_lora: its base model "
        "with ordinary weights in place of the packed ones, and the adapter as a plain LoRA on that; merged: one model "
        "of both."
    )
    rank: Annotated[int, Field(strict=True, ge=1, le=MAX_RANK)] | None = Field(
        None,
        description="Of the result, at most; the nearest of that rank is made. Unset, the exact form, of a rank up to "
        "1024, and twice the rank of a DoRA, whose change has full rank.",
    )
    max_error: Annotated[Number, Field(ge=0, le=1)] | None = Field(
        None,
        description="Largest ‖ΔW' − ΔW‖/‖ΔW‖ of the whole adapter; the job fails if more is lost. Unset, any will do; "
        "the report tells it.",
    )
    base_model: BaseModelName | None = Field(
        None,
        description="Id or name of the base model, for BOFT, DoRA, GLoRA, IA3 and OFT (its weights), VeRA (its layers) "
        "and LQ-LoRA (its packed weights, unless it becomes a lora); unset, its own.",
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="Of the model that unpacked_lora and merged write; unset float32, which is exact."
    )
    name: Name | None = Field(None, description="Name of the converted adapter.")


class ConvertParams(Conversion):
    """Make an adapter of another type a plain LoRA."""

    adapter: Annotated[str, StringConstraints(pattern=f"^adp_{HEX_ID}$")]


class ConvertRequest(Conversion):
    """A conversion, and what it may ask of the machine that does it."""

    model_config = ConfigDict(json_schema_extra={"example": {"to": "lora", "rank": 16}})

    resources: Resources | None = None
