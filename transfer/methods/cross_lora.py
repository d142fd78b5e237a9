"""Cross-LoRA (arXiv:2508.05232) in the form that type-checks between widths.

As published, the source's singular vectors are first "aligned" by P = argmin ‖P·U_s − U_t‖_F. U_s has full column rank,
so the solution of least norm is P = U_t·U_sᵀ and the aligned basis is U_t itself: the alignment does nothing, and eq. 7
is a projection that needs equal widths. What is left of the idea, for all widths, is to carry ΔW's core over:
ΔW_t = U_t·(U_sᵀ·ΔW_s·V_s)·V_tᵀ, exactly of the source's rank.
"""

from __future__ import annotations

from transfer.options import WeightOptions
from transfer.weight_protocol import Delta, Pair


def transport(pair: Pair, options: WeightOptions) -> Delta:
    """B_t = U_t·(U_sᵀ·B_s), A_t = (A_s·V_s)·V_tᵀ. It depends on the signs of the singular vectors, which are fixed."""
    del options
    source, target = pair.source, pair.target
    assert source is not None
    assert target is not None
    return Delta(target.U @ (source.U.T @ pair.delta.B), (pair.delta.A @ source.V) @ target.V.T)
