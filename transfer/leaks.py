"""Whether answers repeat what should stay private: counts, never texts. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from transfer.synthetic import SyntheticRow

OVERLAP_CHARACTERS = 40
"""So many characters in a row that an answer shares with a seed, and its own input has not, are no accident."""
_PATTERNS = {
    "addresses": re.compile(r"[\w.+-]{1,64}@[\w-]{1,63}\.[\w.-]{2,63}"),
    "long_numbers": re.compile(r"(?<!\d)(?:\d[ -]?){12,19}(?!\d)"),
    "keys": re.compile(r"\b(?:sk|pk|ghp|AKIA|xox[abp])[-_A-Za-z0-9]{14,}"),
}


@dataclass(frozen=True, slots=True)
class LeakReport:
    """Answers that share a long passage with a seed, and answers that look like they hold something private."""

    seed_overlaps: int
    addresses: int
    long_numbers: int
    keys: int

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


def count_leaks(rows: Sequence[SyntheticRow], seeds: Sequence[str]) -> LeakReport:
    """Count them; what the input itself holds is no leak of its answer."""
    passages = {
        seed[start : start + OVERLAP_CHARACTERS]
        for seed in seeds
        for start in range(len(seed) - OVERLAP_CHARACTERS + 1)
    }
    overlaps = sum(_overlaps(row, passages) for row in rows)
    found = {
        name: sum(any(match not in row.x for match in pattern.findall(row.answer)) for row in rows)
        for name, pattern in _PATTERNS.items()
    }
    return LeakReport(overlaps, **found)


def _overlaps(row: SyntheticRow, passages: set[str]) -> bool:
    windows = (row.answer[start : start + OVERLAP_CHARACTERS] for start in range(len(row.answer)))
    return any(window in passages and window not in row.x for window in windows)
