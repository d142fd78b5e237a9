"""Adapters whose ΔW depends on the base weight W: DoRA, OFT, BOFT, IA3 and GLoRA, each as its own library computes it.

PEFT's act on a matrix W: (d_out, d_in). LyCORIS' act on W: (d_out, c_in, taps), a convolution's kernel flattened to its
taps, of which a linear layer has one; what they give has W's shape too.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from artifacts.low_rank_forms import Pair


def dora(W: Tensor, change: Tensor, magnitude: Tensor, axis: int) -> Tensor:
    """ΔW = m·(W + change)/‖W + change‖ − W (DoRA, arXiv:2402.09353, eq. 5).

    Args:
        W, change: (d_out, c_in, taps).
        magnitude: (d_out,) for axis 0, the norms of outputs; (c_in,) for axis 1, those of inputs over outputs and taps.
    """
    directed = W + change
    norm = directed.norm(dim=(1, 2), keepdim=True) if axis == 0 else directed.norm(dim=(0, 2), keepdim=True)
    shape = (-1, 1, 1) if axis == 0 else (1, -1, 1)
    # LyCORIS adds this to the norm; PEFT adds nothing, and the difference is below rounding for every norm but 0.
    delta: Tensor = directed * (magnitude.view(shape) / (norm + torch.finfo(W.dtype).eps)) - W
    return delta


def cayley(Q: Tensor) -> Tensor:
    """(I + Q)·(I − Q)⁻¹ of skew-symmetric blocks (…, b, b): rotations (OFT, arXiv:2306.07280, section 3.2)."""
    eye = torch.eye(Q.shape[-1], dtype=Q.dtype)
    found: Tensor = torch.linalg.solve(eye - Q, eye + Q, left=False)
    return found


def neumann_cayley(Q: Tensor, terms: int) -> Tensor:
    """`cayley` with (I − Q)⁻¹ as a series, cut as PEFT cuts it: I + 2Q + 2Q² + … + Q^(terms−1).

    Args:
        terms: at least 1; with less than 3 the last is not halved.
    """
    eye = torch.eye(Q.shape[-1], dtype=Q.dtype).expand_as(Q)
    if terms < 3:
        return eye + 2 * Q if terms == 2 else eye.clone()
    total, power, last = eye + 2 * Q, Q @ Q, max(terms - 1, 3)
    total = total + 2 * power
    for _ in range(3, last):
        power = power @ Q
        total = total + 2 * power
    return total + power @ Q


def skew(upper: Tensor, size: int) -> Tensor:
    """Blocks (n, size, size) from their entries above the diagonal, (n, size·(size−1)/2), row by row."""
    Q = upper.new_zeros(upper.shape[0], size, size)
    rows, columns = torch.triu_indices(size, size, 1)
    Q[:, rows, columns] = upper
    return Q - Q.transpose(1, 2)


def bounded(Q: Tensor, limit: float) -> Tensor:
    """Each block, its norm at most `limit`/√(number of blocks) (constrained OFT as PEFT has it)."""
    allowed = limit / math.sqrt(Q.shape[0])
    norm = Q.norm(dim=(1, 2), keepdim=True)
    return torch.where(norm <= allowed, Q, Q * (allowed / norm.clamp_min(torch.finfo(Q.dtype).tiny)))


def oft_of_inputs(W: Tensor, R: Tensor) -> Tensor:
    """ΔW = W·diag(R₁ … Rₙ)ᵀ − W: PEFT rotates what comes in.

    Args:
        W: (d_out, n·b); R: (n, b, b), or (1, b, b) for one rotation of all blocks.
    """
    blocks = W.reshape(W.shape[0], -1, R.shape[-1])
    return torch.einsum("okb,kcb->okc", blocks, R.expand(blocks.shape[1], -1, -1)).flatten(1) - W


def boft_of_inputs(W: Tensor, R: Tensor, scales: Tensor) -> Tensor:
    """ΔW = diag(s)·W·(B_m ⋯ B_1)ᵀ − W with the butterfly factors Bᵢ of BOFT (arXiv:2311.06243, section 4).

    Bᵢ is diag(Rᵢ₁ … Rᵢₙ) between a permutation of the inputs and its inverse.

    Args:
        W: (d_out, n·b); R: (m, n, b, b); scales: (d_out,).
    """
    turned = W
    for position, blocks in enumerate(R):
        order = _butterfly(W.shape[1], R.shape[1], R.shape[2], position) if R.shape[0] > 1 else torch.arange(W.shape[1])
        moved = torch.empty_like(order)
        moved[order] = torch.arange(len(order))
        # PEFT permutes a column vector by P[i, order[i]] = 1 on the left of the blocks, and back on their right.
        mixed = turned[:, moved].reshape(W.shape[0], -1, R.shape[2])
        turned = torch.einsum("okb,kcb->okc", mixed, blocks).flatten(1)[:, order]
    return turned * scales[:, None] - W


def _butterfly(size: int, blocks: int, width: int, position: int) -> Tensor:
    """Order of the inputs before factor `position`: within each group of size/(blocks/2^position) the even
    runs of width/2 entries come first, then the odd ones."""
    run, groups = width // 2, blocks // 2**position
    order = torch.arange(size).view(groups, -1, run)
    return torch.cat([order[:, 0::2], order[:, 1::2]], dim=1).flatten()


def oft_of_outputs(W: Tensor, blocks: Tensor, limit: float) -> Tensor:
    """R·W of LyCORIS' and kohya's OFT: block k of the outputs becomes Cayley(Qₖ)ᵀ·Wₖ.

    Args:
        W: (n·b, c_in, taps); blocks: (n, b, b), whose Q is the difference from their transpose.
        limit: largest norm of all Q together; 0 for none.
    """
    R = cayley(_limited(blocks - blocks.transpose(-1, -2), limit))
    return torch.einsum("knm,knit->kmit", R, W.reshape(-1, R.shape[-1], *W.shape[1:])).flatten(0, 1)


def boft_of_outputs(W: Tensor, blocks: Tensor, limit: float) -> Tensor:
    """R_m ⋯ R_1·W of LyCORIS' BOFT: stage i mixes outputs that are 2^i·b/2 apart.

    Args:
        W: (n·b, c_in, taps); blocks: (m, n, b, b); `limit` as in `oft_of_outputs`.
    """
    R = cayley(_limited(blocks - blocks.transpose(-1, -2), limit))
    turned, size = W, R.shape[-1]
    for stage, mixing in enumerate(R):
        run = 2**stage * (size // 2)
        # (c g k) → (c k g): an output stands beside the one that is a run away
        near = turned.reshape(-1, 2, run, *W.shape[1:]).transpose(1, 2).reshape(-1, size, *W.shape[1:])
        mixed = torch.einsum("bij,bjct->bict", mixing, near)
        turned = mixed.reshape(-1, run, 2, *W.shape[1:]).transpose(1, 2).reshape(W.shape)
    return turned


def _limited(Q: Tensor, limit: float) -> Tensor:
    norm = float(Q.norm()) + 1e-8
    return Q * (limit / norm) if 0 < limit < norm else Q


def glora(W: Tensor, a: Pair, b: Pair, scaling: float) -> Pair:
    """(A, B) of ΔW = scaling·(W·(L_a·R_a) + L_b·R_b) (GLoRA, arXiv:2306.07967), of rank r·taps + r at most.

    With taps the product W·L_a·R_a is one of rank r for every tap.

    Args:
        W: (d_out, c_in, taps).
        a: R_a (r, c_in) and L_a (c_in, r); b: R_b (r, c_in·taps) and L_b (d_out, r).
    """
    (R_a, L_a), (R_b, L_b) = a, b
    taps, rank = W.shape[2], R_a.shape[0]
    left = torch.einsum("oit,ir->ort", W, L_a).flatten(1)
    right = W.new_zeros(rank, taps, R_a.shape[1], taps)
    at = torch.arange(taps)
    right[:, at, :, at] = R_a
    return torch.cat([right.reshape(rank * taps, -1), R_b]), torch.cat([left, L_b], dim=1) * scaling
