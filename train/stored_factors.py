"""The tensors of a stored adapter that a training goes on from, at the places that they have in the new model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from safetensors.torch import load_file
from torch import Tensor

from artifacts.adapter import Adapter
from artifacts.errors import FileBroken
from artifacts.layout import read_layout
from artifacts.manifest import LoraModule
from train.adapted_layers import LowRank
from train.continuation import Start

PREFIX = "base_model.model."
MAGNITUDE = "lora_magnitude_vector"


def low_rank(start: Start) -> dict[str, LowRank]:
    """Path in the base model → ΔW, in float32."""
    adapter = Adapter.open(start.directory)
    found = {}
    for path, module in start.layers.items():
        factors = adapter[module.path]
        found[path] = LowRank(factors.A.to(torch.float32), factors.B.to(torch.float32), factors.scaling)
    return found


def peft_tensors(start: Start) -> dict[str, Tensor]:
    """Name in PEFT's state → tensor; factors in float32."""
    layout = read_layout(start.directory)
    stored = load_file(layout.weights_path)
    if not start.layers:
        return stored
    found: dict[str, Tensor] = {}
    for path, module in start.layers.items():
        for name, key in _names(module).items():
            found[f"{PREFIX}{path}.{name}"] = stored.pop(key).to(torch.float32)
    return found | stored  # what is left are modules that were trained whole


def whole_tensors(start: Start) -> Mapping[str, Tensor]:
    """The modules that were trained whole: path of the parameter → tensor.

    Raises:
        FileBroken: a tensor has no place in the base model.
    """
    stored = load_file(read_layout(start.directory).weights_path)
    for module in start.layers.values():
        for key in _names(module).values():
            del stored[key]
    strange = [name for name in stored if not name.startswith(PREFIX)]
    if strange:
        raise FileBroken(f"The adapter to go on from has the tensor {strange[0]!r}, which has no place.")
    return {name.removeprefix(PREFIX): value for name, value in stored.items()}


def _names(module: LoraModule) -> dict[str, str]:
    """End of the name in PEFT's state → key in the file."""
    if module.block_key is not None:
        return {"miss_block": module.block_key}
    names = {"lora_A.weight": module.a_key, "lora_B.weight": module.b_key}
    if module.magnitude_key is not None:
        names[MAGNITUDE] = module.magnitude_key
    return names
