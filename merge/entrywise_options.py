"""The menu of the methods that look at single entries of the deltas. Imports no torch."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, StrictBool, StrictInt, model_validator

from merge.options import MAX_RANK, MergeOptions
from merge.peer_options import DENSITY, ELECTION, SEED, Density, Fraction, Seed


class EntrywiseOptions(MergeOptions):
    """Options of the methods whose result has full rank, and is truncated to the output rank."""

    beyond_span: ClassVar[bool] = True

    rank: Annotated[StrictInt, Field(ge=1, le=MAX_RANK)] | Literal["r", "2r"] = Field(
        "2r",
        description="Output rank k, or a multiple of r = the largest rank of the inputs. The result has full rank, so "
        "that k may be above Σ rᵢ; the report's truncation_error says what k leaves out.",
    )
    passes: Annotated[StrictInt, Field(ge=1, le=32)] = Field(
        1,
        description="Passes of the streaming SVD over the rows of a large module (above 2²⁰ entries; smaller ones are "
        "truncated exactly). Each multiplies with M and with Mᵀ; more of them come closer to the best approximation.",
    )


class PruneSvdOptions(EntrywiseOptions):
    """magnitude_prune_svd of PEFT: the largest entries of every ΔWᵢ, summed."""

    density: Density = Field(0.5, description=DENSITY)


class TiesSvdOptions(EntrywiseOptions):
    """ties_svd of PEFT, arXiv:2306.01708, on the deltas."""

    density: Density = Field(0.2, description=DENSITY + " The paper keeps 20 %.")
    majority_sign_method: Literal["total", "frequency"] = Field("total", description=ELECTION)


class TiesMergekitOptions(TiesSvdOptions):
    """ties of mergekit, arXiv:2306.01708: weights take part in the vote and in the divisor."""

    normalize: StrictBool = Field(True, description="Divide every entry by the sum of the weights that agree in it.")


class DareSvdOptions(PruneSvdOptions):
    """dare_linear_svd of PEFT, arXiv:2311.03099, on the deltas."""

    seed: Seed = Field(0, description=SEED)


class DareTiesSvdOptions(DareSvdOptions):
    """dare_ties_svd of PEFT, arXiv:2311.03099, on the deltas."""

    majority_sign_method: Literal["total", "frequency"] = Field("total", description=ELECTION)


class DellaLinearOptions(DareSvdOptions):
    """DELLA without election, arXiv:2406.11617: the larger an entry in its row, the likelier it stays."""

    epsilon: Fraction = Field(
        0.15,
        description="Keep probabilities rise from density − ε for the smallest entry of a row to density + ε for the "
        "largest; both must lie between 0 and 1.",
    )
    rescale: StrictBool = Field(True, description="Divide every kept entry by its own keep probability, as the paper.")

    @model_validator(mode="after")
    def _probabilities(self) -> DellaLinearOptions:
        if self.density < 1 and not (self.density - self.epsilon > 0 and self.density + self.epsilon < 1):
            raise ValueError("density − epsilon and density + epsilon must lie between 0 and 1")
        return self


class DellaOptions(DellaLinearOptions):
    """DELLA, arXiv:2406.11617, with the election of mergekit."""

    majority_sign_method: Literal["total", "frequency"] = Field("total", description=ELECTION)
    normalize: StrictBool = Field(True, description="Divide every entry by the sum of the weights that agree in it.")


class BreadcrumbsOptions(EntrywiseOptions):
    """Model Breadcrumbs, arXiv:2312.06795: neither the largest entries of every ΔWᵢ nor the smallest."""

    density: Density = Field(0.15, description="Share of the entries that are kept; 1 keeps all. The paper drops 85 %.")
    gamma: Fraction = Field(
        0.01, description="Share of the largest entries that are dropped; less, when density leaves less."
    )


class BreadcrumbsTiesOptions(BreadcrumbsOptions):
    """breadcrumbs_ties of mergekit: Model Breadcrumbs, then an election of signs."""

    majority_sign_method: Literal["total", "frequency"] = Field("total", description=ELECTION)
    normalize: StrictBool = Field(False, description="Divide every entry by the sum of the weights that agree in it.")


class SceOptions(EntrywiseOptions):
    """SCE, arXiv:2408.07990: select, calculate, erase, as mergekit."""

    density: Density = Field(
        0.1, description="Share of the positions that are selected, those where the deltas vary most; 1 selects all."
    )
