"""Transcripts that must not be parted: those of one gene, and those that a classifier could not tell apart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def groups_of(keys: Sequence[Iterable[str]]) -> list[str]:
    """Join items that share a key, directly or over others.

    Args:
        keys: of each item at least one.

    Returns:
        Of each item the name of its group: the least key of all its members, so that it goes by what is in the group
        and not by the order or the number of other items.
    """
    parents: dict[str, str] = {}

    def root(key: str) -> str:
        parents.setdefault(key, key)
        while parents[key] != key:
            parents[key] = parents[parents[key]]
            key = parents[key]
        return key

    firsts = []
    for found in keys:
        first, *others = found
        firsts.append(first)
        for other in others:
            low, high = sorted((root(first), root(other)))
            parents[high] = low
    return [root(first) for first in firsts]
