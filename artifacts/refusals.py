"""Why an adapter can not be merged as it is: which of the reasons a conversion to a plain LoRA sees to."""

from __future__ import annotations

from collections.abc import Iterable


class OfType(str):
    """A reason that only names the type of the adapter: the conversion is there for that."""

    __slots__ = ()


class OfVectors(str):
    """A reason that names vectors which the conversion reads: it refuses what is not zero."""

    __slots__ = ()


def lasting(reasons: Iterable[str]) -> tuple[str, ...]:
    """The reasons that keep an adapter from being converted too: what a LoRA would lose."""
    return tuple(reason for reason in reasons if not isinstance(reason, OfType | OfVectors))
