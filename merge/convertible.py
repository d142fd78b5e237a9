"""Which types of adapters can be made a plain LoRA, and what that needs of the base model. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Literal

from artifacts.errors import MergeRefused
from artifacts.manifest import LoraModule, TypedModule

MAX_EXACT_RANK = 1024
"""Largest rank of an exact form that is written without being asked for."""
MAX_FORM_RANK = 4096
"""Largest rank of a form that is worked with at all, to be cut to a smaller one."""

MAX_FORM_SIDE = 1 << 20
"""Longest side of a ΔW that is made of small factors."""
MAX_FORM_BYTES = 1 << 30
"""Of the factors of one module, in float32."""
MAX_RESULT_BYTES = 1 << 33
"""Of a whole result, in float32: as large as an upload may be, unless the settings say otherwise."""

Need = Literal["nothing", "sides", "weights"]

CONVERTIBLE: Mapping[str, Need] = MappingProxyType(
    {
        "adalora": "nothing",
        "full": "nothing",
        "loha": "nothing",
        "lokr": "nothing",
        "lq_lora": "nothing",
        "lycoris": "nothing",  # pairs and other modules in one file; see `need_of`
        "vera": "sides",
        "boft": "weights",
        "dora": "weights",
        "glora": "weights",
        "ia3": "weights",
        "loha-dora": "weights",
        "lokr-dora": "weights",
        "full-dora": "weights",
        "oft": "weights",
    }
)
"""Type of the adapter → what of its base model has to be known."""

PACKED = "lq_lora"
"""The type that was trained beside packed weights, and that becomes a model together with those."""


def need_of(method: str, modules: Iterable[LoraModule], typed: Iterable[TypedModule]) -> Need | None:
    """What has to be known of the base model; None: adapters of this type are not converted.

    A file of LyCORIS may hold modules of several types, of which one that needs the weights is enough.
    """
    need = CONVERTIBLE.get(method)
    if need == "nothing":
        magnitudes = any(module.magnitude_key for module in modules)
        if magnitudes or any(CONVERTIBLE.get(module.type) == "weights" for module in typed):
            return "weights"
    return need


def lost(lasting: Sequence[str]) -> str | None:
    """What a conversion would lose, in words; None if that is nothing.

    Args:
        lasting: reasons against merging that are not the adapter's type (`artifacts.refusals.lasting`).
    """
    if not lasting:
        return None
    more = "" if len(lasting) == 1 else f"; and {len(lasting) - 1} more"
    return f"a LoRA would lose a part of the adapter: {lasting[0]}{more}"


def check_form(path: str, rank: int) -> None:
    """Raises MergeRefused: a form of too large a rank to be worked with."""
    if rank > MAX_FORM_RANK:
        raise MergeRefused(f"{path} is a LoRA of rank {rank} exactly; forms above {MAX_FORM_RANK} are not converted.")
