"""LoRA-SB (arXiv:2411.19557)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from train.full_gradients import full_gradients, grouped, pick_rows, random_apart, shared_weights
from train.methods.three_factor import ThreeFactorMethod, ThreeFactors
from train.options.three_factor import LoraSbOptions
from train.protocol import MethodContext
from train.truncated_svd import truncated_svd

MIB = 1024 * 1024


class LoraSb(ThreeFactorMethod[LoraSbOptions]):
    """B·R·A begins as the best approximation of the first step of full fine-tuning; B and A stay, R is trained.

    With orthonormal B and A and s = 1 the gradient of R is Bᵀ·(∂L/∂W)·Aᵀ, so that plain descent on R is full
    fine-tuning with its gradient projected on the columns of B and the rows of A.
    """

    def prepare(self, model: nn.Module, context: MethodContext) -> nn.Module:
        self._first: dict[str, ThreeFactors] = {}
        told = self._estimate(model, context) if context.checkpoint is None else {}
        prepared = super().prepare(model, context)
        self.told = told
        return prepared

    def start(self, path: str, weight: Tensor) -> ThreeFactors:
        del weight
        return self._first.pop(path)

    def _estimate(self, model: nn.Module, context: MethodContext) -> dict[str, Any]:
        """Fill `_first`, and say how it was found."""
        options, settings = self.options, context.settings
        eta = options.step_length(settings)
        with random_apart(model, context.seed):  # a task may draw when it makes a batch
            rows = pick_rows(context.batches, options.samples, context.seed)
        memory = options.gradient_memory * MIB
        paths = sorted(context.targets)
        generator = torch.Generator().manual_seed(context.seed)
        kept: dict[str, float] = {}
        found = full_gradients(
            model,
            paths,
            rows,
            memory_bytes=memory,
            seed=context.seed,
            loss=context.loss,
            checkpointing=settings.gradient_checkpointing,
        )
        for gradient in found:
            step = first_update(gradient.total, eta, len(rows), raw=options.update == "raw")
            factors, share = best_factors(step, options.rank, generator)
            for path in gradient.paths:
                self._first[path], kept[path] = factors, share
        return {
            "first_update": {
                "samples": len(rows),
                "passes": len(grouped(shared_weights(model, paths), memory)),
                "eta": eta,
                "update": options.update,
                "weighting": "every row counts alike, with the mean loss of its tokens",
                "energy_kept": {"mean": sum(kept.values()) / len(kept), "least": min(kept.values())},
                "least_kept_in": min(kept, key=lambda path: kept[path]),
            }
        }


def first_update(total: Tensor, eta: float, rows: int, *, raw: bool = False) -> Tensor:
    """The first step of full fine-tuning: −eta·sign(G) as AdamW takes it, or −eta·G/n.

    Args:
        total: G, (d_out, d_in): the sum of the gradients of `rows` rows; is overwritten.
    """
    return total.mul_(-eta / rows) if raw else total.sign_().mul_(-eta)


def best_factors(step: Tensor, rank: int, generator: torch.Generator) -> tuple[ThreeFactors, float]:
    """The best approximation B·R·A of rank r (Eckart–Young), R diagonal, and the share of the squared norm in it."""
    u, s, vt = truncated_svd(step, rank, generator)
    share = float(s.square().sum() / step.square().sum())
    return ThreeFactors(A=vt, R=torch.diag(s), B=u), share
