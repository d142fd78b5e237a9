"""The body of POST /models/{id}/quantize, and the parameters of a quantize job."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, StringConstraints

from app.dependencies import HEX_ID
from app.schemas.common import BaseModelName, Name, RequestModel
from app.schemas.resources import Resources
from train.options.fisher import FisherSettings
from train.options.quantisation import QuantisationOptions


class FisherRequest(FisherSettings):
    """Where the Fisher is estimated."""

    dataset: Annotated[str, StringConstraints(pattern=f"^dat_{HEX_ID}$")]


class Quantisation(RequestModel):
    """How a base model shall be quantised."""

    method: Literal["lq-lora"] = Field("lq-lora", description="Q + L1·L2, arXiv:2311.12023.")
    parameters: QuantisationOptions = Field(default_factory=QuantisationOptions)
    fisher: FisherRequest | None = Field(
        None,
        description="Weigh the errors by how much the loss feels each weight, estimated on a dataset: causal language "
        "models only. Needs a copy of all quantised weights in float32 twice in memory.",
    )
    name: Name | None = Field(None, description="Name of the quantised model.")


class QuantizeParams(Quantisation):
    """Make a base model one in a few bits."""

    model: BaseModelName = Field(description="Id (mdl_…) or name of the registered base model.")


class QuantizeRequest(Quantisation):
    """A quantisation, and what it may ask of the machine that does it."""

    model_config = ConfigDict(
        json_schema_extra={"example": {"parameters": {"rank": 16, "budget_bits": 2.75}, "name": "base in 2.75 bits"}}
    )

    resources: Resources | None = None
