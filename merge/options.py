"""The menu of merge methods: every hyper-parameter with its default, range, unit and source. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    model_validator,
)

from artifacts.base_model import Level
from artifacts.menu import Number

MAX_RANK = 16384
"""No weight matrix of a current model has a smaller side above this, so no useful rank does either."""


def _finite_non_zero(value: float) -> float:
    if value == 0.0:
        raise ValueError("must not be 0: the merged adapter would do nothing")
    return value


def _no_number(value: Any) -> Any:
    """0 equals False, and is another value all the same."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise ValueError("must be 'inf', 'l2' or false")
    return value


Scale = Annotated[Number, Field(ge=-1e6, le=1e6), AfterValidator(_finite_non_zero)]


class MergeOptions(BaseModel):
    """What every merge method understands."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, populate_by_name=True)

    default_rank: ClassVar[str] = "exact"
    """The output rank of a method without an option `rank`: all of Σ rᵢ, or "r", the largest rank of the inputs."""

    beyond_span: ClassVar[bool] = False
    """Whether the result leaves the span of the components, so that ranks above Σ rᵢ mean something."""

    missing_modules: Literal["union", "intersection", "error"] = Field(
        "union",
        description="Modules that only some adapters have: merge each over its owners (union), leave out and list all "
        "that not every adapter has (intersection), or refuse (error).",
    )
    minimum_compatibility: Level | None = Field(
        None,
        description="The weakest proof that the adapters share a base model: weights > revision > architecture > "
        "shape. Unset: any proof will do unless the base models are known to differ; set, it also overrules such "
        "a known difference down to that level. Module shapes must always agree.",
    )
    scale: Scale = Field(1.0, description="Factor on the merged ΔW (λ of task arithmetic, arXiv:2212.04089).")
    norm_equalize: Literal["none", "adapter", "module"] = Field(
        "none",
        description="Before the method, scale every ΔWᵢ to the median Frobenius norm of all (arXiv:2508.01148): by one "
        "factor for the whole adapter, or by one of its own in each module. The report compares with the sum of the "
        "scaled deltas.",
    )
    compute_dtype: Literal["float32", "float64"] = Field("float32", description="Precision of the computation.")
    output_dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "auto", description="Precision of the written factors, rounded once; auto takes that of the first adapter."
    )


class SumOptions(MergeOptions):
    """Options of the methods that form the weighted sum Σ wᵢ·sᵢ·Bᵢ·Aᵢ."""

    normalize: StrictBool = Field(False, description="Divide the weights by their sum (refused when that is 0).")


class CatOptions(SumOptions):
    """Concatenation: the exact weighted sum at rank Σ rᵢ."""


class SvdOptions(SumOptions):
    """The best rank-k approximation of the weighted sum (Eckart-Young)."""

    rank: Annotated[StrictInt, Field(ge=1, le=MAX_RANK)] | Literal["r", "2r"] = Field(
        "2r",
        description="Output rank k, or a multiple of r = the largest rank of the inputs; capped per module at Σ rᵢ.",
    )


class RankedOptions(MergeOptions):
    """Options of the methods whose result has a natural rank of at most Σ rᵢ, and may be truncated."""

    rank: Annotated[StrictInt, Field(ge=1, le=MAX_RANK)] | Literal["exact", "r", "2r"] = Field(
        "exact",
        description="Output rank k: the best approximation of the result at that rank, or at a multiple of r = the "
        "largest rank of the inputs; exact keeps all of it, at a rank of at most Σ rᵢ.",
    )


class LinearOptions(SumOptions, RankedOptions):
    """Task arithmetic on ΔW, arXiv:2212.04089: λ·Σ wᵢ·ΔWᵢ, without the cross terms of averaging A and B apart."""


class LegoOptions(MergeOptions):
    """LoRA-LEGO, arXiv:2409.16167: rank-wise clustering of minimal semantic units."""

    rank: Annotated[StrictInt, Field(ge=1, le=MAX_RANK)] | Literal["r", "2r"] = Field(
        "2r",
        alias="k",
        description="Number of clusters = output rank k, or a multiple of r = the largest rank of the inputs; capped "
        "per module at Σ rᵢ. The paper's experiments use 2r. Also accepted as `k`.",
    )
    preset: Literal["recommended", "paper"] = Field(
        "recommended",
        description="paper fixes sign_alignment=none, canonicalize=none, feature=raw and reweight_cap=null.",
    )
    parameter_reweight: Annotated[Literal["inf", "l2", False], BeforeValidator(_no_number)] = Field(
        "inf",
        description="Norm that each centroid regains after averaging (eq. of the parameter reweighting), or false.",
    )
    output_reweight: StrictBool = Field(True, description="Multiply ΔW once by √(r/k) (Theorem 3.1).")
    reference_rank: Annotated[Number, Field(gt=0, le=MAX_RANK)] | None = Field(
        None, description="r of √(r/k); unset, the weighted mean rank of the adapters that own the module."
    )
    reweight_cap: Annotated[Number, Field(ge=1)] | None = Field(
        10.0, description="Upper bound of a cluster's reweighting factor; near-opposite members would make it explode."
    )
    sign_alignment: Literal["none", "canonical", "cluster"] = Field(
        "cluster",
        description="(b, a) and (−b, −a) are one matrix but opposite points. cluster: align signs inside the "
        "clustering; canonical: make the largest |entry| of a positive; none: as the paper.",
    )
    canonicalize: Literal["none", "balanced", "svd"] = Field(
        "none",
        description="balanced: give a and b of each unit equal norms; svd: re-express each adapter in its singular "
        "basis, so that the result depends on ΔWᵢ only (up to signs and ties).",
    )
    feature: Literal["raw", "unit"] = Field(
        "raw", description="What is clustered: the unit itself, or a and b each scaled to norm 1."
    )
    n_init: Annotated[StrictInt, Field(ge=1, le=1000)] = Field(10, description="Restarts of greedy k-means++.")
    max_iter: Annotated[StrictInt, Field(ge=1, le=100_000)] = Field(300, description="Lloyd iterations per restart.")
    tol: Annotated[Number, Field(ge=0, le=1)] = Field(
        1e-4, description="Lloyd stops when the squared shift of all centres is below tol × mean feature variance."
    )
    refine: StrictBool = Field(True, description="Improve the best restart by single-point moves and centre swaps.")
    seed: Annotated[StrictInt, Field(ge=0, lt=2**63)] = Field(0, description="Seed of the k-means++ draws.")

    _paper: ClassVar[dict[str, Any]] = {
        "sign_alignment": "none",
        "canonicalize": "none",
        "feature": "raw",
        "reweight_cap": None,
    }

    @model_validator(mode="before")
    @classmethod
    def _one_name_for_the_rank(cls, data: Any) -> Any:
        if isinstance(data, dict) and "k" in data and "rank" in data:
            raise ValueError("give the output rank once: `rank` and `k` are the same parameter")
        return data

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, data: Any) -> Any:
        if not isinstance(data, dict) or data.get("preset") != "paper":
            return data
        for name, value in cls._paper.items():
            if name in data and data[name] != value:
                raise ValueError(f"preset 'paper' fixes {name}={value!r}; leave it out or drop the preset")
        return {**data, **cls._paper}
