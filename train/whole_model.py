"""A whole model of transformers as files, rather than an adapter for one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from artifacts.adapter import TORCH_DTYPES
from artifacts.safetensors_writer import SafetensorsWriter, TensorEntry

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "model.safetensors"
_DTYPES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def write_model(model: Any, directory: Path) -> None:
    """Write configuration and weights, as `from_pretrained` reads them. The same model gives the same bytes."""
    directory.mkdir(parents=True, exist_ok=True)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(directory)
    tensors: Mapping[str, Tensor] = dict(sorted(model.state_dict().items()))
    entries = [TensorEntry(name, _DTYPES[value.dtype], tuple(value.shape)) for name, value in tensors.items()]
    with SafetensorsWriter(directory / WEIGHTS, entries, {"format": "pt"}) as file:
        for name, value in tensors.items():
            file.write(name, value.detach().to("cpu").contiguous())
