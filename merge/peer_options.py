"""The menu of the peers of LoRA-LEGO: every hyper-parameter with its default, range, unit and source. No torch."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, StrictInt

from artifacts.menu import Number
from merge.options import MAX_RANK, MergeOptions, RankedOptions

Density = Annotated[Number, Field(gt=0, le=1)]
Fraction = Annotated[Number, Field(ge=0, le=1)]
Seed = Annotated[StrictInt, Field(ge=0, lt=2**63)]

DENSITY = "Share of the entries that are kept, by size in ties and magnitude pruning, by chance in dare; 1 keeps all."
ELECTION = "How the sign of an entry is elected: that of the sum over the adapters, or of most of them."
SEED = "Seed of the random masks; they also depend on the numbers of each adapter, not on the order of the request."


class SlerpOptions(RankedOptions):
    """Spherical interpolation between two deltas, as mergekit's slerp on the deltas in place of the weights."""

    t: Fraction | None = Field(
        None, description="0 is the first adapter, 1 the second; unset, w₂/(w₁ + w₂). Give either t or weights."
    )


class KarcherOptions(RankedOptions):
    """Karcher mean of the deltas on the sphere, as mergekit's karcher."""

    max_iter: Annotated[StrictInt, Field(ge=1, le=100_000)] = Field(100, description="Most steps of the iteration.")
    tol: Annotated[Number, Field(gt=0, le=1)] = Field(
        1e-10, description="The iteration stops at a gradient of this length, in radians."
    )


class ModelStockOptions(RankedOptions):
    """Model Stock, arXiv:2403.19522: the mean of the deltas, shortened by how little they agree."""


class CoreRuleOptions(RankedOptions):
    """What a rule on small matrices needs."""

    rule: Literal["sum", "ties", "dare", "tsv", "iso"] = Field(
        "ties", description="What merges the matrices: their sum, TIES, DARE, TSV-Merge or Iso-C."
    )
    density: Density = Field(0.2, description=DENSITY + " Read by ties and dare.")
    majority_sign_method: Literal["total", "frequency"] = Field("total", description=ELECTION + " Read by ties.")
    seed: Seed = Field(0, description=SEED + " Read by dare.")


class CoreSpaceOptions(CoreRuleOptions):
    """Core Space, arXiv:2509.17786: a rule on the exact small matrices of all deltas in shared bases."""


class TsvOptions(RankedOptions):
    """TSV-Merge, arXiv:2412.00081, in the core space: singular vectors of all adapters made orthogonal together."""


class IsoOptions(RankedOptions):
    """Iso-C, arXiv:2502.04959, in the core space: all singular values of the sum set to their mean."""


class IsoCtsOptions(RankedOptions):
    """Iso-CTS, arXiv:2502.04959, in the core space: common and task-specific directions, all of one size."""

    common_fraction: Fraction = Field(0.8, description="Share of the directions that are taken from the sum.")


class KnotsOptions(RankedOptions):
    """KnOTS, arXiv:2410.19735: a rule on the parts ΣVᵢᵀ of the SVD of all deltas side by side."""

    rule: Literal["sum", "ties", "dare", "dare_ties"] = Field("ties", description="What merges the parts.")
    density: Density = Field(0.2, description=DENSITY + " Read by ties, dare and dare_ties.")
    majority_sign_method: Literal["total", "frequency"] = Field("total", description=ELECTION + " Read by ties.")
    seed: Seed = Field(0, description=SEED + " Read by dare and dare_ties.")


class PicoOptions(CoreRuleOptions):
    """Pico, arXiv:2604.16826: output directions that many adapters share are scaled down before the rule."""

    rule: Literal["sum", "ties", "tsv"] = Field(
        "sum", description="What merges the calibrated deltas: their sum, or TIES or TSV-Merge on their core matrices."
    )


class CtmOptions(CoreRuleOptions):
    """Compress then merge, arXiv:2606.03723: shared subspaces of the output rank first, then a rule in them.

    Only the abstract was at hand: the subspaces are the ones that hold most of the energy of all deltas together,
    which the paper is not confirmed to use.
    """

    rank: Annotated[StrictInt, Field(ge=1, le=MAX_RANK)] | Literal["exact", "r", "2r"] = Field(
        "r",
        description="Dimension of the shared subspaces = output rank k, or a multiple of r = the largest rank of the "
        "inputs; exact is Σ rᵢ, where nothing is compressed.",
    )
    rule: Literal["sum", "ties", "dare", "tsv", "iso"] = Field(
        "sum", description="What merges the k×k coordinates: their sum, TIES, DARE, TSV-Merge or Iso-C."
    )
    sweeps: Annotated[StrictInt, Field(ge=0, le=1000)] = Field(
        20,
        description="Sweeps that improve the two subspaces in turn; 0 keeps the leading directions of either side. "
        "Not confirmed by the paper's abstract.",
    )


class FactorwiseOptions(MergeOptions):
    """What the combinations of PEFT share that treat A and B apart: A' = f(A₁ … A_N), B' = f(B₁ … B_N)."""

    default_rank: ClassVar[str] = "r"

    unequal_ranks: Literal["pad", "error"] = Field(
        "pad", description="Adapters of a smaller rank: pad their factors with zeros, or refuse, as PEFT does."
    )


class FactorwisePruneOptions(FactorwiseOptions):
    """magnitude_prune of PEFT: the largest entries of A and of B, then a sum of either."""

    density: Density = Field(0.5, description=DENSITY)


class FactorwiseTiesOptions(FactorwiseOptions):
    """ties of PEFT, arXiv:2306.01708, on A and on B apart."""

    density: Density = Field(0.2, description=DENSITY + " The paper keeps 20 %.")
    majority_sign_method: Literal["total", "frequency"] = Field("total", description=ELECTION)


class FactorwiseDareOptions(FactorwisePruneOptions):
    """dare_linear of PEFT, arXiv:2311.03099, on A and on B apart."""

    seed: Seed = Field(0, description=SEED)


class FactorwiseDareTiesOptions(FactorwiseDareOptions):
    """dare_ties of PEFT, on A and on B apart."""

    majority_sign_method: Literal["total", "frequency"] = Field("total", description=ELECTION)


class RobustMergeOptions(FactorwiseOptions):
    """RobustMerge, arXiv:2502.17159, as its official code."""

    density: Density = Field(0.2, description=DENSITY + " The official code keeps 20 %.")
    tail: Fraction = Field(
        0.2,
        description="Share of an adapter's largest component scales that stay as they are; smaller ones are raised to "
        "the least of them.",
    )
    coefficient: Annotated[Number, Field(gt=0, le=1e6)] = Field(
        2.0, description="Factor on the merged A and on the merged B, 2 in the official code."
    )


class RobustMergeProductOptions(RankedOptions):
    """RobustMerge on the products of the pruned factors instead of their sums, as a public port has it."""

    density: Density = Field(0.2, description=DENSITY)
    tail: Fraction = Field(0.2, description="As in robustmerge.")
    coefficient: Annotated[Number, Field(gt=0, le=1e6)] = Field(
        2.0, description="Factor on the merged ΔW, 2 in the port."
    )
