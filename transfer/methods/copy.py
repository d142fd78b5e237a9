"""Copy: the factors as they are, for a base that is a light continuation of the source."""

from __future__ import annotations

from transfer.options import WeightOptions
from transfer.weight_protocol import Delta, Pair, Unfit


def transport(pair: Pair, options: WeightOptions) -> Delta:
    """A and B unchanged. Raises Unfit where the sides differ."""
    del options
    own = (pair.delta.B.shape[0], pair.delta.A.shape[1])
    if own != pair.sides:
        raise Unfit(f"{own[0]}×{own[1]} in the source base, {pair.sides[0]}×{pair.sides[1]} in the target base")
    return pair.delta
