"""A safetensors file under other names: the bytes of its tensors are copied as they are."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from artifacts.safetensors_header import SafetensorsHeader, packed_header

_BUFFER_BYTES = 4 * 1024 * 1024


def rename_tensors(weights: Path, header: SafetensorsHeader, names: Mapping[str, str]) -> None:
    """Write the file anew with other names in its header; a hard link elsewhere keeps the old one.

    Args:
        names: old → new name of every tensor.
    """
    document: dict[str, Any] = {"__metadata__": dict(header.metadata)} if header.metadata else {}
    for name, info in header.tensors.items():
        offsets = [info.begin - header.data_start, info.end - header.data_start]
        document[names[name]] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": offsets}
    partial = weights.with_name(weights.name + ".partial")
    with weights.open("rb") as source, partial.open("wb") as target:
        target.write(packed_header(document))
        source.seek(header.data_start)
        shutil.copyfileobj(source, target, _BUFFER_BYTES)
    partial.replace(weights)
