"""Small layers of ALLoRA, for the tests of its gradients and of its growth."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from train.methods.allora import AlloraLinear

RANK, D_IN, D_OUT = 3, 10, 7


def drawn(*sizes: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def factors(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """A and B whose rows of B·A have norms of many sizes."""
    sizes = torch.logspace(-2, 1, D_OUT, dtype=dtype)[:, None]
    A, B = drawn(RANK, D_IN, dtype=dtype), drawn(D_OUT, RANK, seed=1, dtype=dtype) * sizes
    return A.requires_grad_(), B.requires_grad_()


def layer_of(rank: int = RANK, eta: float = 2.0, *, scale_B: bool = True, seed: int = 0) -> AlloraLinear:
    torch.manual_seed(seed)
    return AlloraLinear(nn.Linear(D_IN, D_OUT), rank, eta**-2, scale_B=scale_B)


def trained_once(layer: AlloraLinear, optimizer: torch.optim.Optimizer | None = None) -> None:
    """One step on the same tokens; plain descent with rate 0.1 unless told otherwise."""
    optimizer = optimizer or torch.optim.SGD([layer.lora_A, layer.lora_B], lr=0.1)
    x, target = drawn(20, D_IN, dtype=torch.float32), drawn(20, D_OUT, seed=9, dtype=torch.float32)
    layer.renew_row_factor()
    optimizer.zero_grad()
    (layer(x) - target).square().sum(1).mean().backward()
    optimizer.step()
