"""Adapters of Rankwise's own types, which no other library knows: what intake may say of them. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class DeclaredType:
    """One type.

    Attributes:
        method: what such an adapter is called.
        reason: why its factors can not be merged; completes "it is of Rankwise's type …, ".
    """

    method: str
    reason: str


DECLARED_TYPES: Mapping[str, DeclaredType] = MappingProxyType(
    {
        "RANKWISE_BAT_ROW": DeclaredType(
            "bat_row", "whose ΔW has full rank and depends on the base weights; train.declared.load puts it on its base"
        ),
        "RANKWISE_LOFTQ": DeclaredType(
            "loftq",
            "whose factors are for a quantised base and not for the original; train.declared.load quantises it again "
            "and puts them on it",
        ),
        "RANKWISE_SMORA": DeclaredType(
            "smora",
            "whose ΔW is another one for every token; train.declared.load puts it on its base",
        ),
        "RANKWISE_LQ_LORA": DeclaredType(
            "lq_lora",
            "whose factors are for a quantised base and not for the original; train.declared.load puts them on it",
        ),
    }
)
"""`peft_type` → type. `train.declared` has what loads each."""
