"""Which transformer layer of a model a linear layer lies in, by its path. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable

from artifacts.heat_map import by_number

# The UNet of diffusers numbers what its transformer layers lie in too; other models number their layers first.
_PLACES = (
    re.compile(r"(?:.*\.)?transformer_blocks\.\d+(?=\.)"),
    re.compile(r"(?:[^.0-9][^.]*\.)*\d+(?=\.)"),
)


def group_of(path: str) -> str | None:
    """The path of the transformer layer, such as model.layers.3 or encoder.block.0; None if no number says which.

    Two stacks, as an encoder and a decoder have, are two sets of layers; 1 and 11 are different layers.
    """
    for place in _PLACES:
        found = place.match(path)
        if found is not None:
            return found[0]
    return None


def grouped_by_layer(paths: Iterable[str]) -> dict[str, list[str]]:
    """The paths by their transformer layer, the layers in their order.

    Raises:
        ValueError: a path with no layer, which `group_of` is there to find first.
    """
    found: dict[str, list[str]] = {}
    for path in sorted(paths):
        group = group_of(path)
        if group is None:
            raise ValueError(f"{path} lies in no numbered layer")
        found.setdefault(group, []).append(path)
    return {group: found[group] for group in sorted(found, key=by_number)}
