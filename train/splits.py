"""Which rows are held out for validation: decided by a row's content alone."""

from __future__ import annotations

import hashlib
import json
from typing import Literal

from train.records import Row

Split = Literal["train", "validation"]


def canonical(row: Row) -> bytes:
    """The JSON text of a row in one form: keys sorted, no spaces, UTF-8. A null is as good as no value."""
    present = {name: value for name, value in row.items() if value is not None}
    return json.dumps(present, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def split_of(row: Row, fraction: float) -> Split:
    """The split of a row, of which about `fraction` (0 to 1) are for validation.

    It depends on the row's content and on nothing else: adding, removing or reordering other rows never moves it, equal
    rows are always on the same side, and with a larger fraction what was for validation stays so.

    Raises:
        ValueError: the fraction is not between 0 and 1.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"the fraction must be between 0 and 1, not {fraction}")
    place = int.from_bytes(hashlib.sha256(canonical(row)).digest()[:8], "big")
    return "validation" if place < int(fraction * 2**64) else "train"
