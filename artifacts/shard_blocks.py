"""MiSS and the tile form of Bone (arXiv:2409.15371) as a plain LoRA: all shards of the inputs share one block D."""

from __future__ import annotations

import torch
from torch import Tensor


def lora_factors(block: Tensor, d_out: int, d_in: int) -> tuple[Tensor, Tensor]:
    """A and B with B·A = ΔW exactly, where ΔW[o, j] = D[j mod r, o mod m].

    With E: (r, d_in), E[j mod r, j] = 1, and D: (r, m), whose columns repeat along the outputs, ΔW is tile(Dᵀ)·E. Where
    m is below r the same matrix has rank m: tile(I)·(Dᵀ·E), the smaller pair.

    Args:
        block: D, (r, m); m divides d_out. m = d_out is the default form, a smaller one the form "mini".

    Returns:
        A: (k, d_in) and B: (d_out, k), contiguous, in the block's dtype; k = min(r, m).
    """
    r, m = block.shape
    columns = torch.arange(d_in, device=block.device) % r
    if m < r:
        A = block.T[:, columns]
        B = torch.eye(m, dtype=block.dtype, device=block.device).repeat(d_out // m, 1)
    else:
        A = torch.zeros(r, d_in, dtype=block.dtype, device=block.device)
        A[columns, torch.arange(d_in, device=block.device)] = 1
        B = block.T.repeat(d_out // m, 1)
    return A.contiguous(), B.contiguous()
