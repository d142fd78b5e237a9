"""Stored adapters as tensors with the names that diffusers' loaders know: from PEFT directories and single files."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from artifacts.adapter import Adapter
from artifacts.errors import ComposeRefused, FieldError, FormatUnknown, PickleRefused
from artifacts.layout import CONFIG_NAME, METADATA_KEY, WEIGHTS_NAME, is_pickle_name, parse_json, read_json
from artifacts.safetensors_header import SafetensorsHeader, read_header

UNET = "unet"
COMPONENTS = (UNET, "text_encoder", "text_encoder_2")

_PEFT_PREFIX = "base_model.model."
_DOWN = re.compile(r"(?P<path>.+?)\.(lora_A|lora\.down|lora_linear_layer\.down)\.weight")
_OLD_DOWN = re.compile(r"(?P<attention>.+)\.processor\.(?P<layer>to_q|to_k|to_v|to_out)_lora\.down\.weight")
_HARMLESS_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Initialisations that leave the base weights as they are."""
_UNABLE = ("modules_to_save", "trainable_token_indices", "layer_replication", "target_parameters")


@dataclass(frozen=True, slots=True)
class AdapterWeights:
    """An adapter in memory.

    Attributes:
        state: tensors by `component.module.lora_A.weight` and the like.
        metadata: fields of its LoraConfig as `component.field`; None where the file has none.
        alphas: alpha of single modules, where the file has no metadata but those.
    """

    state: Mapping[str, Tensor]
    metadata: Mapping[str, Any] | None
    alphas: Mapping[str, float] | None

    def of(self, component: str) -> dict[str, Tensor]:
        """The tensors of one component, with their full names."""
        return {name: value for name, value in self.state.items() if name.startswith(f"{component}.")}


def weights_file(path: Path) -> Path:
    """The one safetensors file of an adapter.

    Raises:
        PickleRefused: there are only pickles. FormatUnknown: there is none, or there are several.
    """
    if path.is_file():
        return _no_pickle(path)
    if (path / WEIGHTS_NAME).is_file():
        return path / WEIGHTS_NAME
    found = sorted(entry for entry in path.glob("*.safetensors") if entry.is_file()) if path.is_dir() else []
    if len(found) == 1:
        return found[0]
    for entry in sorted(path.iterdir()) if path.is_dir() and not found else ():
        _no_pickle(entry)
    raise FormatUnknown(
        f"{path.name} holds {len(found)} safetensors files; an adapter is one.",
        hint=f"Give a PEFT directory with {WEIGHTS_NAME}, or one safetensors file.",
    )


def read_adapter(path: Path, pipeline: Any, name: str) -> AdapterWeights:
    """Read an adapter for this pipeline.

    Raises:
        PickleRefused, FormatUnknown, ConfigRefused, FileBroken: as `artifacts.layout.read_layout`.
        ComposeRefused: it is no LoRA, or has parts that can not be switched on and off.
    """
    file = weights_file(path)
    text = read_header(file).metadata.get(METADATA_KEY)
    config = path / CONFIG_NAME
    if path.is_dir() and config.is_file():
        document = read_json(config)
        _check_config(document, name)
        if _names_components(read_header(file)):
            return _by_factors(path, name)
        return _from_peft(load_file(file), document, pipeline, name)
    if text is not None:
        state = load_file(file)
        document = parse_json(text, METADATA_KEY)
        if "r" in document:
            return _from_peft(state, document, pipeline, name)
        for component in COMPONENTS:
            _check_config(_fields(document, component), name)
        return AdapterWeights(state, _loadable(document), None)
    return _by_factors(path, name)


def check_fits(weights: AdapterWeights, pipeline: Any, name: str, pointer: str) -> None:
    """Raises ComposeRefused when the adapter matches no module, or modules that the pipeline has otherwise or not."""
    unknown, matched = [], 0
    for key, value in weights.state.items():
        component, _, rest = key.partition(".")
        path = _layer_path(rest)
        if path is None:
            continue
        module = _module(getattr(pipeline, component, None), path)
        shape = None if module is None else tuple(module.weight.shape)
        if shape is None or shape[1:] != tuple(value.shape[1:]):
            has = "is not there" if shape is None else f"takes {shape[1]} inputs, not {value.shape[1]}"
            unknown.append(f"{component}.{path} {has}")
        matched += 1
    if not matched or len(unknown) == matched:
        raise ComposeRefused(
            f"The adapter {name!r} matches no module of the base model"
            + (f": {unknown[0]}." if unknown else ", or has no LoRA factors at all."),
            hint="It belongs to another family of models. Take adapters that were trained on this one.",
            errors=_found(pointer, unknown or ["matches no module of the base model"]),
        )
    if unknown:
        raise ComposeRefused(
            f"{len(unknown)} of {matched} modules of the adapter {name!r} do not fit the base model: {unknown[0]}.",
            hint="It belongs to another base model.",
            errors=_found(pointer, unknown),
        )


def _layer_path(key: str) -> str | None:
    """The layer of a lora_A, in new names and in those of diffusers' first LoRAs; None for other tensors."""
    found = _DOWN.fullmatch(key)
    if found is not None:
        return found["path"]
    old = _OLD_DOWN.fullmatch(key)
    if old is None:
        return None
    return f"{old['attention']}.{'to_out.0' if old['layer'] == 'to_out' else old['layer']}"


def _found(pointer: str, messages: list[str]) -> list[FieldError]:
    return [FieldError(pointer, message) for message in messages[:20]]


def _module(component: Any, path: str) -> Any:
    """The layer itself, also where adapters wrap it; None if there is none."""
    if component is None:
        return None
    for candidate in (path, path.removeprefix("text_model.")):
        try:
            module: Any = component.get_submodule(candidate)
        except AttributeError:
            continue
        layer = module.get_base_layer() if hasattr(module, "get_base_layer") else module
        return layer if isinstance(layer, nn.Module) and hasattr(layer, "weight") else None
    return None


def _no_pickle(path: Path) -> Path:
    if is_pickle_name(path.name):
        raise PickleRefused(f"The weights are a pickle: {path.name}.", hint="Convert them to safetensors.")
    return path


def _fields(document: Mapping[str, Any], component: str) -> dict[str, Any]:
    return {
        key.removeprefix(f"{component}."): value for key, value in document.items() if key.startswith(f"{component}.")
    }


def _check_config(config: Mapping[str, Any], name: str) -> None:
    kind = str(config.get("peft_type") or "LORA").rpartition(".")[2]
    if kind != "LORA":
        raise ComposeRefused(
            f"The adapter {name!r} is of type {kind}; images are composed of LoRAs.",
            hint="Train or convert it as a LoRA.",
        )
    start = config.get("init_lora_weights")
    if start not in _HARMLESS_STARTS:
        raise ComposeRefused(
            f"The adapter {name!r} was started with {start!r}, which changes the base weights.",
            hint="Convert it to a plain LoRA of twice the rank first.",
        )
    bad = [field for field in _UNABLE if config.get(field)]
    bad += [f"bias={config['bias']!r}"] if config.get("bias") not in (None, "none") else []
    if bad:
        raise ComposeRefused(f"The adapter {name!r} has {', '.join(bad)}, which can not be switched on and off.")


def _from_peft(state: dict[str, Tensor], config: Mapping[str, Any], pipeline: Any, name: str) -> AdapterWeights:
    """PEFT's names say nothing of the component: it is the one that has the modules; the UNet if none does."""
    _check_config(config, name)
    plain = {key.removeprefix(_PEFT_PREFIX): value for key, value in state.items()}
    paths = [found["path"] for key in plain if (found := _DOWN.fullmatch(key))]
    counts = {
        component: sum(_module(getattr(pipeline, component, None), path) is not None for path in paths)
        for component in COMPONENTS
    }
    component = max(COMPONENTS, key=lambda item: counts[item])
    return AdapterWeights(
        {f"{component}.{key}": value for key, value in plain.items()},
        _loadable({f"{component}.{key}": value for key, value in config.items()}),
        None,
    )


def _loadable(document: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that the installed LoraConfig has; nothing that would start the weights in a way of its own."""
    from peft import LoraConfig

    known = {field.name for field in dataclasses.fields(LoraConfig)} - {
        "peft_type",
        "init_lora_weights",
        "auto_mapping",
    }
    return {key: value for key, value in document.items() if key.partition(".")[2] in known}


def _names_components(header: SafetensorsHeader) -> bool:
    """Whether PEFT's names begin with a component: so are merges of adapters for a whole pipeline written."""
    starts = tuple(f"{_PEFT_PREFIX}{component}." for component in COMPONENTS)
    return bool(header.tensors) and all(key.startswith(starts) for key in header.tensors)


def _by_factors(path: Path, name: str) -> AdapterWeights:
    """Files of kohya, LyCORIS, old ones of diffusers and others, and merges of adapters for a whole pipeline: read as
    an upload is, so that no key is passed over."""
    adapter = Adapter.open(path)
    composable = adapter.facts.composable
    if not composable.able:
        raise ComposeRefused(f"The adapter {name!r} can not be composed: {composable.reason}.")
    if any(module.magnitude_key for module in adapter.modules.values()):
        raise ComposeRefused(f"The adapter {name!r} is a DoRA whose components are mixed in one PEFT directory.")
    state, alphas = {}, {}
    for module in adapter.modules.values():
        factors = adapter.factors(module)
        state[f"{module.path}.lora_A.weight"] = factors.A.reshape(module.a_shape)
        state[f"{module.path}.lora_B.weight"] = factors.B.reshape(module.b_shape)
        alphas[f"{module.path}.alpha"] = factors.scaling * factors.rank
    return AdapterWeights(state, None, alphas)
