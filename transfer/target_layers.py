"""Which layers of a base model are meant when none are named. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from artifacts.errors import FieldError, TransferRefused

QUERY_VALUE: tuple[tuple[str, ...], ...] = (
    ("q_proj", "v_proj"),
    ("query", "value"),
    ("query_key_value",),
    ("c_attn",),
    ("qkv_proj",),
    ("Wqkv",),
    ("q", "v"),
)
"""What the layers of queries and values are called, family by family; the first of which a base has all is meant."""


def query_and_value(layers: Iterable[str]) -> Sequence[str]:
    """What a base model with layers at these paths calls those of queries and values: names are resolved for every base
    anew.

    Raises:
        TransferRefused: it calls them nothing that is known.
    """
    leaves = {path.rpartition(".")[2] for path in layers}
    for names in QUERY_VALUE:
        if leaves.issuperset(names):
            return names
    raise TransferRefused(
        "The target base model's layers of queries and values have no name that is known.",
        hint=f"Name the layers in target_modules. It has: {', '.join(sorted(leaves)[:20])}.",
        errors=[FieldError("/parameters/target_parameters/target_modules", "name the layers")],
    )
