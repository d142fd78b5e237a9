"""Whether an adapter that was trained for several ranks has the one that is asked for."""

from __future__ import annotations

from artifacts.errors import FieldError, RequestInvalid
from artifacts.manifest import NestedRanks


def check_rank(nested: NestedRanks | None, rank: int, pointer: str) -> NestedRanks:
    """Refuse a rank that the adapter was not trained for.

    Raises:
        RequestInvalid: at `pointer`.
    """
    if nested is None:
        raise RequestInvalid(
            "The adapter was not trained for smaller ranks: its first components alone are no adapter.",
            hint="Take it at its own rank, or train one with the method dylora, which serves every rank.",
            errors=[FieldError(pointer, "only adapters of the method dylora have other ranks than their own")],
        )
    if rank not in nested.ranks:
        problem = f"must be one of the ranks that the adapter was trained for: {_listed(nested.ranks)}"
        raise RequestInvalid(f"The adapter was not trained for rank {rank}.", errors=[FieldError(pointer, problem)])
    return nested


def _listed(ranks: tuple[int, ...]) -> str:
    """All ranks, or the first of them when there are very many."""
    if len(ranks) > 2 and ranks == tuple(range(ranks[0], ranks[-1] + 1)):
        return f"{ranks[0]} to {ranks[-1]}"
    return ", ".join(map(str, ranks[:40])) + (f" … {ranks[-1]}" if len(ranks) > 40 else "")
