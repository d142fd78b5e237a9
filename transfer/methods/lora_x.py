"""LoRA-X (arXiv:2501.16559): ΔW projected onto the leading singular vectors of the target's weight.

The paper's adapters are trained inside their base's subspace; any other loses what lies outside of it here.
"""

from __future__ import annotations

from typing import cast

from transfer.options import LoraXOptions, WeightOptions
from transfer.subspaces import similarity
from transfer.weight_protocol import Delta, Pair, Unfit


def transport(pair: Pair, options: WeightOptions) -> Delta:
    """ΔW_t = U_t·U_tᵀ·ΔW_s·V_t·V_tᵀ; on a side of another width U_t·U_sᵀ takes the place of U_t·U_tᵀ, the solution of
    least norm of argmin ‖P·U_s − U_t‖_F.

    Raises Unfit where the column spaces are less alike than the options ask for.
    """
    source, target = pair.source, pair.target
    assert source is not None
    assert target is not None
    phi, least = similarity(source, target), cast("LoraXOptions", options).minimum_similarity
    if phi is not None and phi < least:
        raise Unfit(f"similarity {phi:.3f} is below {least}")
    left = target.U if phi is not None else source.U
    right = target.V if source.V.shape[0] == target.V.shape[0] else source.V
    return Delta(target.U @ (left.T @ pair.delta.B), (pair.delta.A @ right) @ target.V.T)
