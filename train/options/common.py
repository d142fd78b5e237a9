"""What the options of every training method have in common. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StringConstraints

from artifacts.errors import FieldError
from artifacts.menu import Number

if TYPE_CHECKING:
    from train.settings import TrainingSettings

MAX_RANK = 16384
"""No weight matrix of a current model has a smaller side above this, so no useful rank does either."""
MAX_TARGETS = 1000
ADAM_STATE_BYTES = 8
"""Two moments in float32, per trainable parameter."""

ModuleName = Annotated[str, StringConstraints(min_length=1, max_length=300, pattern=r"^[A-Za-z0-9_.\-]+$")]
Rank = Annotated[StrictInt, Field(ge=1, le=MAX_RANK)]
Alpha = Annotated[Number, Field(gt=0, le=1e6)]
Dropout = Annotated[Number, Field(ge=0, lt=1)]


@dataclass(frozen=True, slots=True)
class Target:
    """A linear layer that is adapted; y = W x with W: d_out×d_in."""

    path: str
    d_out: int
    d_in: int


@dataclass(frozen=True, slots=True)
class Circumstances:
    """What is known of a training before anything is loaded.

    Attributes:
        targets: the layers that will be adapted.
        steps: optimiser steps of the whole training; None while the number of rows is not known.
        packed: several rows are joined to one.
        grouped: the rows are told apart by a column, and some of them are held out.
        devices: that share the rows of every batch.
        rows: those that are trained on, with which `steps` goes. Before the dataset is read both are the most that it
            can come to: rows may be held out, dropped or packed.
    """

    targets: Sequence[Target]
    training: TrainingSettings
    steps: int | None = None
    rows: int | None = None
    packed: bool = False
    grouped: bool = False
    devices: int = 1


class TrainOptions(BaseModel):
    """What every training method understands."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    layers_may_differ: ClassVar[bool] = False
    """Whether the method can go on from an adapter whose layers have several ranks or scalings."""

    adapts_layers: ClassVar[bool] = True
    """Whether `target_modules` mean anything."""

    target_modules: Literal["all-linear"] | Annotated[list[ModuleName], Field(min_length=1, max_length=MAX_TARGETS)] = (
        Field(
            "all-linear",
            description="Which linear layers are adapted: the ends of their paths, such as q_proj or "
            "layers.0.mlp.down_proj; all-linear is every one but the output head.",
        )
    )

    @property
    def federated(self) -> bool:
        """Whether the training is one of several clients (`train.federation`)."""
        return False

    @property
    def trains_base(self) -> bool:
        """Whether the base model's own weights are trained, so that a model comes out and no adapter."""
        return False

    @property
    def frees_gradients(self) -> bool:
        """Whether every gradient is used and freed before the next one is made."""
        return False

    @property
    def largest_rank(self) -> int | None:
        """A rank that must not be above the smaller side of any adapted weight; None if there is no such limit."""
        return None

    @property
    def certain_rank(self) -> int:
        """A rank that the adapter's largest is sure to reach; 1 where only the training can tell."""
        return 1

    @property
    def gives_beside(self) -> bool:
        """Whether other adapters come out of the training beside its own."""
        return False

    def parameters_of(self, d_out: int, d_in: int) -> int:
        """How many are trained for a weight of d_out×d_in."""
        raise TypeError(f"{type(self).__name__} is no method's options")

    def optimizer_bytes_of(self, d_out: int, d_in: int) -> int:
        """What the optimiser keeps for them."""
        return ADAM_STATE_BYTES * self.parameters_of(d_out, d_in)

    def parameters_beside(self, width: int) -> int:
        """How many are trained beside the layers of a base model whose hidden states are `width` long."""
        del width
        return 0

    def decided_by(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Name → value of the options, besides the rank, that follow from the configuration of the stored adapter that
        the training goes on from; for methods whose adapters are of a type of their own. Values are not checked yet."""
        del config
        return {}

    def problems(self, known: Circumstances) -> list[FieldError]:
        """Why the training can not be done: found when it is submitted, and again before it starts."""
        del known
        return []

    def warnings(self, known: Circumstances) -> list[str]:
        """What the user should know although it can be done: whole sentences."""
        del known
        return []


class LowRankOptions(TrainOptions):
    """Options of the methods that learn ΔW = scaling·B·A with lora_A (r×d_in) and lora_B (d_out×r)."""

    rank: Rank = Field(
        8, description="r; at most the smaller side of every adapted weight (arXiv:2106.09685, table 6: 4 to 8 do)."
    )
    alpha: Alpha | None = Field(
        None, description="Numerator of the scaling; unset, it is chosen so that the scaling is 2."
    )
    dropout: Dropout = Field(0.0, description="Share of the layer's inputs that lora_A does not see in a step.")

    @property
    def largest_rank(self) -> int | None:
        return self.rank

    @property
    def certain_rank(self) -> int:
        return self.rank

    def parameters_of(self, d_out: int, d_in: int) -> int:
        return self.rank * (d_out + d_in)

    @property
    def numerator(self) -> float:
        """The alpha in force."""
        return self.alpha if self.alpha is not None else self.alpha_of(2.0, self.rank)

    def alpha_of(self, scaling: float, rank: int) -> float:
        """The alpha with which a layer of this rank has this scaling."""
        return scaling * rank
