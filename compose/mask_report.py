"""What a report says of the concepts' masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

LOST_ABOVE = 0.95
"""A concept whose mask covers more than this, or nothing, has no place of its own."""


def labels(nouns: Sequence[str]) -> list[str]:
    """A name of its own for each concept: its noun, numbered where it occurs again."""
    found: list[str] = []
    for noun in nouns:
        count = sum(item == noun or item.startswith(f"{noun} ") for item in found)
        found.append(noun if not count else f"{noun} {count + 1}")
    return found


def lost_concepts(shares: Mapping[str, Sequence[float]]) -> list[str]:
    """The concepts of which a mask covered nothing or nearly everything; by name the covered shares of the image."""
    return [name for name, covered in shares.items() if any(not 0 < share <= LOST_ABOVE for share in covered)]


def lost_warnings(names: Sequence[str]) -> list[str]:
    """A sentence for each lost concept."""
    return [
        f"concept_lost: the mask of {name!r} covered nothing or nearly everything in a step; see coverage."
        for name in names
    ]
