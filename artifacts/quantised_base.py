"""What a base model in a few bits says of itself in its config.json. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

METHOD = "rankwise-lq"
"""`quant_method` of base models that the method lq-lora trains on (`train.quantised`)."""
START_NAME = "start_factors.safetensors"
"""The factors L1 and L2 that belong to the quantised weights, beside them in the folder."""
NOTES_NAME = "quantisation.json"
"""How the quantised model was made, and with what error."""


def quantisation_of(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The field `quantization_config` of a config.json; None for a model that is not quantised."""
    found = config.get("quantization_config")
    return dict(found) if isinstance(found, Mapping) else None


def packed_layers(quantisation: Mapping[str, Any] | None) -> dict[str, tuple[int, int]]:
    """Path → (d_out, d_in) of the layers that are packed our way; empty for every other model."""
    if quantisation is None or quantisation.get("quant_method") != METHOD:
        return {}
    layers = quantisation.get("layers")
    found = {}
    for path, told in (layers if isinstance(layers, Mapping) else {}).items():
        shape = told.get("shape") if isinstance(told, Mapping) else None
        if isinstance(shape, list) and len(shape) == 2 and all(isinstance(side, int) for side in shape):
            found[str(path)] = (int(shape[0]), int(shape[1]))
    return found
