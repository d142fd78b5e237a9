"""ProLoRA (arXiv:2506.04244): the parts of ΔW inside and outside of the source's spaces, each put where the target has
the same.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from transfer.options import ProloraOptions, WeightOptions
from transfer.subspaces import similarity
from transfer.weight_protocol import Delta, Pair, Unfit


def transport(pair: Pair, options: WeightOptions) -> Delta:
    """ΔW_t = P_t·(P_s·ΔW·Q_s)·Q_t + P_t⊥·(P_s⊥·ΔW·Q_s⊥)·Q_t⊥ with P = U·Uᵀ and Q = V·Vᵀ: of twice the rank.

    The cross terms P_s·ΔW·Q_s⊥ and P_s⊥·ΔW·Q_s are dropped, as published.

    Raises Unfit where the widths differ, or the column spaces are less alike than the options ask for.
    """
    source, target = pair.source, pair.target
    assert source is not None
    assert target is not None
    phi, least = similarity(source, target), cast("ProloraOptions", options).minimum_similarity
    if phi is None or source.V.shape[0] != target.V.shape[0]:
        raise Unfit("the widths differ")
    if phi < least:
        raise Unfit(f"similarity {phi:.3f} is below {least}")
    B, At = pair.delta.B, pair.delta.A.T
    inner_B, outer_B = _parts(B, source.U)
    inner_A, outer_A = _parts(At, source.V)
    left = torch.cat([_parts(inner_B, target.U)[0], _parts(outer_B, target.U)[1]], dim=1)
    right = torch.cat([_parts(inner_A, target.V)[0], _parts(outer_A, target.V)[1]], dim=1)
    return Delta(left, right.T)


def _parts(columns: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """The columns inside the span of an orthonormal basis, and what is left of them."""
    inside = basis @ (basis.T @ columns)
    return inside, columns - inside
