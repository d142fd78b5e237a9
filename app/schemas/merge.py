"""The bodies of POST /merge and POST /merge/compare, and the parameters of their jobs."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, StringConstraints, model_validator

from app.dependencies import HEX_ID
from app.schemas.common import BaseModelName, Name, RequestModel, TargetEngine
from app.schemas.resources import Resources
from artifacts.menu import Number
from merge.catalog import MENU, METHODS
from merge.plan import MAX_ADAPTERS
from train.measurement_settings import MeasurementSettings

MAX_COMPARED = 32
MAX_DATASETS = 8
DatasetId = Annotated[str, StringConstraints(pattern=f"^dat_{HEX_ID}$")]
MergeMethodName = Annotated[str, Field(json_schema_extra={"enum": list(METHODS)})]
MergeParameters = Annotated[
    dict[str, Any],
    Field(
        default_factory=dict, description="Options of the method; GET /methods/merge/{method} has their JSON Schema."
    ),
]
Weight = Annotated[Number, Field(ge=-1e6, le=1e6)]


class MergeAdapter(RequestModel):
    """One input of a merge."""

    id: Annotated[str, StringConstraints(pattern=f"^adp_{HEX_ID}$")]
    weight: Weight = Field(1.0, description="A factor in a sum; `parameters.normalize` divides by the sum of all.")


class MergePool(RequestModel):
    """The adapters that are merged."""

    adapters: list[MergeAdapter] = Field(min_length=1, max_length=MAX_ADAPTERS)


class MergeEvaluation(MeasurementSettings):
    """Datasets on which merges are measured, on the base model, in the worker."""

    dataset: DatasetId | None = Field(None, description="The dataset, if it is one.")
    datasets: list[DatasetId] | None = Field(
        None,
        min_length=1,
        max_length=MAX_DATASETS,
        description="Several datasets, one for each task: every figure is the mean over them, whatever their sizes.",
    )
    base_model: BaseModelName | None = Field(
        None, description="Id or name; unset, the model that the adapters belong to."
    )

    @model_validator(mode="after")
    def _one_or_several(self) -> Self:
        if (self.dataset is None) == (self.datasets is None):
            raise ValueError("name a dataset, or several as datasets")
        if self.datasets is not None and len(set(self.datasets)) < len(self.datasets):
            raise ValueError("datasets names one of them twice")
        return self

    @property
    def named(self) -> list[tuple[str, str]]:
        """Where each dataset stands in the evaluation (a JSON pointer), and its id."""
        if self.dataset is not None:
            return [("/dataset", self.dataset)]
        return [(f"/datasets/{position}", item) for position, item in enumerate(self.datasets or ())]


class MergeParams(MergePool):
    """Merge adapters of one base model into one adapter."""

    method: Annotated[str, Field(json_schema_extra={"enum": list(MENU)})] = Field(
        "lego", description="See GET /methods; search tries several and keeps the best."
    )
    parameters: MergeParameters
    evaluation: MergeEvaluation | None = Field(
        None, description="Of method search: what it measures its trials on, and by which metric the best is chosen."
    )
    name: Name | None = Field(None, description="Name of the merged adapter or model.")
    output: Literal["adapter", "base"] = Field(
        "adapter", description="base: a copy of the base model with the merged ΔW added to its weights."
    )
    base_model: BaseModelName | None = Field(
        None, description="Id or name of the model for output base; unset, the one that the adapters belong to."
    )
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "auto", description="Of the written model; auto keeps that of each tensor."
    )
    force: Annotated[bool, Field(strict=True)] = Field(
        False, description="Write the model even if rounding loses much of the change (report: base.rounding)."
    )

    target_engine: TargetEngine = None
    convert: Annotated[bool, Field(strict=True)] = Field(
        False,
        description="Adapters of other types are made plain LoRAs first, as by POST /adapters/{id}/convert with "
        "nothing but `to`; report: conversions.",
    )

    @model_validator(mode="after")
    def _only_for_adapters(self) -> Self:
        if self.output == "base" and self.target_engine is not None:
            raise ValueError("target_engine belongs to output adapter")
        return self

    @model_validator(mode="after")
    def _only_for_models(self) -> Self:
        if self.output == "adapter" and (self.base_model is not None or self.dtype != "auto" or self.force):
            raise ValueError("base_model, dtype and force belong to output base")
        return self


class MergeCandidate(RequestModel):
    """One of the merges that are compared."""

    method: MergeMethodName = Field(description="See GET /methods.")
    parameters: MergeParameters
    label: Annotated[Name, StringConstraints(max_length=80)] | None = Field(
        None, description="What it is called in the report; unset, as its method."
    )


class CompareMergesParams(MergePool):
    """Merge the same adapters by several methods."""

    candidates: list[MergeCandidate] = Field(min_length=1, max_length=MAX_COMPARED)
    evaluation: MergeEvaluation | None = Field(
        None, description="Rank the candidates by what they do on data; unset, by the distance to the exact sum."
    )
    publish: Literal["none", "best", "all"] = Field(
        "none", description="Which of the merged adapters are stored: none, the first of the ranking, or all."
    )
    name: Name | None = Field(None, description="Name of the stored adapter; of several, with the label behind it.")


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


class CompareMergesRequest(CompareMergesParams):
    """A comparison of merges, and what it may ask of the machine that does it."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "adapters": [{"id": "adp_" + "0" * 32}, {"id": "adp_" + "1" * 32, "weight": 0.5}],
                "candidates": [{"method": "svd", "parameters": {"rank": 16}}, {"method": "lego"}],
                "publish": "best",
            }
        }
    )

    resources: Resources | None = None
