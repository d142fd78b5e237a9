"""What a way to move weights without training is: one module's factors in, the target module's factors out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from transfer.options import WeightOptions
from transfer.subspaces import Subspace


@dataclass(frozen=True, slots=True, eq=False)
class Delta:
    """ΔW = B·A with the scaling folded in: B (d_out×r), A (r×d_in), float32."""

    B: Tensor
    A: Tensor

    @property
    def energy(self) -> float:
        """‖ΔW‖²_F, without forming ΔW."""
        return max(float(((self.B.T @ self.B).double() * (self.A @ self.A.T).double()).sum()), 0.0)


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """A layer of the source base, and the one of the target base with the same path.

    Attributes:
        sides: (d_out, d_in) of the target's.
        source, target: leading singular vectors, as many of either; None for a method that uses none.
    """

    path: str
    delta: Delta
    sides: tuple[int, int]
    source: Subspace | None
    target: Subspace | None


class Unfit(Exception):
    """The module can not be moved; the message says why, and the module is left out."""


class WeightMethod(Protocol):
    """Raises Unfit."""

    def __call__(self, pair: Pair, options: WeightOptions) -> Delta: ...
