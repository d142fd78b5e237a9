"""What the variants of a comparison are called. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def labels_of(variants: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of each variant: its own, else its method's name, with a number where that is there already."""
    found: list[str] = []
    for variant in variants:
        wanted = variant.get("label") or variant["method"]
        label, number = wanted, 1
        while label in found:
            number += 1
            label = f"{wanted} {number}"
        found.append(label)
    return found
