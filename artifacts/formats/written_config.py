"""PEFT's configuration for pairs that are to be written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Sequence
from typing import Any

from artifacts.formats.architectures import Architecture
from artifacts.formats.pairs import Pair


def config_of_pairs(
    paths: Sequence[str], pairs: Sequence[Pair], known: Architecture | None, *, whole: bool = True
) -> dict[str, Any]:
    """The fields for pairs that are to be written at these paths of one component, which `known` has if it is not None.

    Names of `target_modules` are meant as ends of paths. A module of the model that ends like one of them, and has no
    pair, is excluded by its whole path.

    Args:
        whole: the paths begin where the component's begin; else there may be levels before them.
    """
    # "^": an expression that begins so is matched from the beginning of the path
    start = "^" if whole else ""
    rank = most_common(pair.rank for pair in pairs)
    alpha = most_common(pair.alpha for pair in pairs)
    wanted = set(paths)
    others = () if known is None or not wanted <= known.modules.keys() else known.modules.keys() - wanted
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": short(alpha),
        "target_modules": sorted(wanted),
        "exclude_modules": sorted(path for path in others if _ends_in(path, wanted)) or None,
        "rank_pattern": {
            f"{start}{path}": pair.rank for path, pair in zip(paths, pairs, strict=True) if pair.rank != rank
        },
        "alpha_pattern": {
            f"{start}{path}": short(pair.alpha) for path, pair in zip(paths, pairs, strict=True) if pair.alpha != alpha
        },
    }


def _ends_in(path: str, names: Container[str]) -> bool:
    parts = path.split(".")
    return any(".".join(parts[start:]) in names for start in range(1, len(parts)))


def most_common(values: Any) -> Any:
    """Of equally common ones the largest, so that the order of keys does not matter."""
    counts = Counter(values)
    return max(counts, key=lambda value: (counts[value], value), default=0)


def short(value: float) -> float:
    """A whole number as such, as PEFT writes it."""
    return int(value) if value == int(value) else value
