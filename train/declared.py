"""Adapters of our own types: a folder that says what it is, on what base it is valid and what loads it, and the loader.

Stock PEFT refuses such a folder by its `peft_type`. `load` puts it onto a base model; `fold` then makes ΔW part of the
weights, and the model is an ordinary one again that `save_pretrained` writes for every other program.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from artifacts.errors import BaseMismatch, FieldError, FileBroken, FormatUnknown, NotMergeable
from artifacts.layout import CONFIG_NAME, WEIGHTS_NAME, read_json
from train.adapted_layers import AdaptedLinear, exchange

LAYERS: Mapping[str, str] = {
    "RANKWISE_BAT_ROW": "train.bat_row:BatRowLinear",
    "RANKWISE_LOFTQ": "train.loftq_layer:LoftqLinear",
    "RANKWISE_SMORA": "train.smora_layer:SmoraLinear",
    "RANKWISE_LQ_LORA": "train.lq_layer:LqLinear",
}
"""`peft_type` → the class of its layers, as "module:class", with a classmethod `declared(base, configuration)`."""

LOADER = "train.declared.load"
PREFIX = "base_model.model."
NORM_TOLERANCE = 1e-3
"""Largest relative difference of ‖W‖_F: rounding to 16 bits stays far below, other weights seldom do."""
_NAMED = 20


def write(
    directory: Path,
    peft_type: str,
    layers: Mapping[str, AdaptedLinear],
    whole: Mapping[str, Tensor],
    config: Mapping[str, Any],
) -> None:
    """Write the folder. The same adapter gives the same bytes.

    Args:
        layers: path in the base model → trained layer.
        whole: tensors of modules that were trained as they are, under their paths.
        config: fields of the configuration that the type has besides those of every adapter.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {f"{PREFIX}{name}": value for name, value in whole.items()}
    for path, layer in layers.items():
        tensors |= {f"{PREFIX}{path}.{name}": value for name, value in layer.own_tensors()}
    on_cpu = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in sorted(tensors.items())}
    save_file(on_cpu, directory / WEIGHTS_NAME, metadata={"format": "pt"})
    document = {
        **config,
        "peft_type": peft_type,
        "loader": LOADER,
        "inference_mode": True,
        "target_modules": sorted(layers),
        "base_weight_norms": {path: layer.base_norm() for path, layer in sorted(layers.items())},
    }
    (directory / CONFIG_NAME).write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@torch.no_grad()
def load(model: nn.Module, directory: Path) -> nn.Module:
    """Put the adapter of `directory` onto `model`, the base model that it was trained on, and return the model.

    Raises:
        FormatUnknown: the folder is of another type.
        BaseMismatch: the model lacks a layer, has it with other sides, or with other weights.
        FileBroken: tensors are missing, superfluous, or have other shapes than the layers.
    """
    config = read_json(directory / CONFIG_NAME)
    peft_type = str(config.get("peft_type"))
    make = _layers_of(peft_type).declared
    bases = _bases(model, config)
    places: dict[str, Tensor] = {}
    for path in config.get("modules_to_save") or ():
        places |= {f"{path}.{name}": value for name, value in model.get_submodule(path).named_parameters()}
    layers: dict[str, AdaptedLinear] = {}
    for path, base in bases.items():
        try:
            layers[path] = make(base, config)
        except ValueError as error:
            raise BaseMismatch(f"{path}: {error}.") from error
        places |= {f"{path}.{name}": value for name, value in layers[path].own_tensors()}
    fill(places, directory)
    for path, layer in layers.items():
        layer.filled()
        exchange(model, path, layer)
    return model


def is_declared(directory: Path) -> bool:
    """Whether the adapter in a folder is of a type of ours."""
    return str(read_json(directory / CONFIG_NAME).get("peft_type")) in LAYERS


def load_for_a_while(model: nn.Module, directory: Path) -> nn.Module:
    """As `load`, for `take_off` later.

    Raises:
        NotMergeable: the adapter would change the weights of the base model, which no one could take back.
        As `load`.
    """
    peft_type = str(read_json(directory / CONFIG_NAME).get("peft_type"))
    if not _layers_of(peft_type).keeps_base:
        raise NotMergeable(f"An adapter of type {peft_type} changes the weights of its base model.")
    return load(model, directory)


def take_off(model: nn.Module) -> dict[str, AdaptedLinear]:
    """Put the base layers back, bit for bit, and return ours, for `put_back`."""
    found = {path: layer for path, layer in model.named_modules() if isinstance(layer, AdaptedLinear)}
    for path, layer in found.items():
        exchange(model, path, layer.base)
    return found


def put_back(model: nn.Module, layers: Mapping[str, AdaptedLinear]) -> None:
    """Put layers that `take_off` gave in the places that they had."""
    for path, layer in layers.items():
        exchange(model, path, layer)


@torch.no_grad()
def fold(model: nn.Module) -> nn.Module:
    """Add ΔW to the weights of every layer of ours, in float32, and put the base layers back; in place.

    Packed weights become ordinary ones. There is no way back from the folded weights: with a block D_c = −I the
    original is lost. Load the base again.
    """
    dtype = next(value.dtype for value in model.parameters() if value.is_floating_point())
    for path, layer in [item for item in model.named_modules() if isinstance(item[1], AdaptedLinear)]:
        exchange(model, path, layer.with_delta(dtype))
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    return model


def _layers_of(peft_type: str) -> Any:
    """The class of the type's layers. Raises FormatUnknown."""
    if peft_type not in LAYERS:
        raise FormatUnknown(f"{peft_type[:40]!r} is no type of Rankwise's own.", hint=f"Known are {', '.join(LAYERS)}.")
    module, _, name = LAYERS[peft_type].partition(":")
    return getattr(importlib.import_module(module), name)


def _bases(model: nn.Module, config: Mapping[str, Any]) -> dict[str, nn.Module]:
    """The layers that the adapter is for, checked against what it says of their weights."""
    modules = dict(model.named_modules())
    found, faults = {}, []
    norms: Mapping[str, Any] = config.get("base_weight_norms") or {}
    for path in config.get("target_modules") or ():
        layer, stored = modules.get(path), norms.get(path)
        weight = getattr(layer, "weight", None)
        if layer is None or not isinstance(weight, Tensor):
            faults.append(FieldError(path, "the model has no such layer"))
        elif not isinstance(stored, int | float) or abs(_norm(weight) - stored) > NORM_TOLERANCE * stored:
            faults.append(FieldError(path, "its weights are not those that the adapter was trained on"))
        else:
            found[path] = layer
    if faults or not found:
        first = f"{faults[0].pointer}: {faults[0].message}" if faults else "it names no layer"
        raise BaseMismatch(
            f"The adapter is not for this model: {first}.",
            hint=f"It was trained on {config.get('base_model_name_or_path') or 'a model without a name'}.",
            errors=faults[:_NAMED],
        )
    return found


@torch.no_grad()
def fill(places: Mapping[str, Tensor], directory: Path) -> None:
    """Put what the folder stores into the tensors that are named as `write` names them.

    Raises:
        FileBroken: tensors are missing, superfluous, or have other shapes.
    """
    stored = load_file(directory / WEIGHTS_NAME)
    saved = {name.removeprefix(PREFIX): value for name, value in stored.items()}
    odd = saved.keys() ^ places.keys()
    odd |= {name for name in saved.keys() & places.keys() if saved[name].shape != places[name].shape}
    if odd:
        raise FileBroken(f"The tensors are not those of the adapter's layers: {', '.join(sorted(odd)[:5])}.")
    for name, place in places.items():
        place.copy_(saved[name])


def _norm(weight: Tensor) -> float:
    return float(weight.detach().double().norm())
