"""Numbers out of the files that stand beside an adapter's weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from artifacts.errors import ConfigRefused


def number(document: Mapping[str, Any], name: str, place: str, *, hint: str | None = None) -> float:
    """Raises ConfigRefused: the field is missing, or no finite number; `place` is what is said before its name."""
    value = document.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigRefused(f"{place}{name} is {str(value)[:40]}, no number.", hint=hint)
    return float(value)


def whole(document: Mapping[str, Any], name: str, place: str, *, hint: str | None = None) -> int:
    """Raises ConfigRefused: the field is missing, or no positive whole number."""
    value = document.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigRefused(f"{place}{name} is {str(value)[:40]}, no positive whole number.", hint=hint)
    return value


def head_rows(document: Mapping[str, Any], place: str, *, hint: str | None = None) -> int:
    """`head_dim`, by which rows change places. Raises ConfigRefused: it is missing, or odd."""
    value = whole(document, "head_dim", place, hint=hint)
    if value % 2:
        raise ConfigRefused(f"{place}head_dim is {value}: the rows of a head are pairs.")
    return value
