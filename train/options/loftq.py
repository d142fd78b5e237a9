"""Options of LoftQ. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StrictInt

from artifacts.menu import Number
from train.options.common import LowRankOptions


class LoftqOptions(LowRankOptions):
    """LoftQ, arXiv:2310.08659: W becomes a quantised Q, and B·A starts at the best low-rank part of what that loses."""

    bits: Literal[2, 3, 4, 8] = Field(
        4, description="Bits of a weight in Q: NormalFloat in blocks of 64 weights, each with its largest value."
    )
    iterations: Annotated[StrictInt, Field(ge=1, le=100)] = Field(
        1,
        description="Rounds of quantising and decomposing (algorithm 1 of the paper, which takes 5). With 1, Q is what "
        "plain quantisation makes of W.",
    )
    dropout: Annotated[Number, Field(ge=0, le=0)] = Field(
        0.0, description="Nothing but 0 is taken: B·A holds a part of the base weights, which dropout would disturb."
    )
