"""NLoRA, LoRA with the Nyström start (arXiv:2502.14482)."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from train.methods.three_factor import ALL, ThreeFactorMethod, ThreeFactors
from train.options.three_factor import NloraOptions
from train.protocol import MethodContext

Options = TypeVar("Options", bound=NloraOptions)


class NystromMethod(ThreeFactorMethod[Options]):
    """The factors begin as the first rows and columns of W and the block where they cross.

    Unless `residual` is set this adds s·B·R·A to the base model before the first step, as the authors have it.
    """

    def prepare(self, model: nn.Module, context: MethodContext) -> nn.Module:
        self._shares: dict[str, float] = {}
        prepared = super().prepare(model, context)
        if self._shares:
            self.told = _told(self._shares, self.changes_base)
        return prepared

    @property
    def changes_base(self) -> bool:
        return self.options.changes_base

    def start(self, path: str, weight: Tensor) -> ThreeFactors:
        found = nystrom(weight, self.options.rank, inverse=self.options.initialisation == "nystrom_pinv")
        self._shares[path] = self.options.scaling * found.norm() / float(weight.norm().clamp(min=1e-30))
        return found


class Nlora(NystromMethod[NloraOptions]):
    """All three factors are trained."""

    trained = ALL


def nystrom(weight: Tensor, rank: int, *, inverse: bool = False) -> ThreeFactors:
    """Blocks of W (d_out×d_in): its first r rows, its leading r×r block, its first r columns.

    Args:
        inverse: R is the pseudo-inverse of the block, which makes B·R·A equal to a W of rank r.
    """
    block = weight[:rank, :rank]
    if inverse:
        block = torch.linalg.pinv(block.double()).to(weight.dtype)
    return ThreeFactors(A=weight[:rank], R=block, B=weight[:, :rank])


def _told(shares: dict[str, float], changes_base: bool) -> dict[str, Any]:
    largest = max(shares, key=lambda path: shares[path])
    return {
        "start": {
            "taken_out_of_base": changes_base,
            "share_of_weight": {"mean": sum(shares.values()) / len(shares), "largest": shares[largest]},
            "largest_in": largest,
        }
    }
