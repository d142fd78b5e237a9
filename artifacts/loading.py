"""What an engine's own library is given of an adapter when it shall really load it, and which adapters it is not given.
Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

from artifacts.manifest import AdapterManifest

LoadedEngine = Literal["peft", "transformers", "diffusers"]
"""The engines whose libraries are installed wherever jobs run."""

_ELSEWHERE: Mapping[str, str] = MappingProxyType(
    {"XLORA": "its experts are adapters of their own", "SHADOW": "it is another model"}
)


def layout_for(manifest: AdapterManifest, engine: LoadedEngine) -> Literal["peft", "diffusers", "safetensors"]:
    """The format of the download that the engine reads; "safetensors" is the stored file itself."""
    if engine != "diffusers":
        return "peft"
    return "safetensors" if "diffusers" in manifest.format.split("+") else "diffusers"


def reads_other_files(manifest: AdapterManifest) -> str | None:
    """Why the library would open files that the adapter's configuration names; None if it would not."""
    kind = str(manifest.config.get("peft_type", "LORA"))
    if kind in _ELSEWHERE:
        return f"it is of type {kind}: {_ELSEWHERE[kind]}, which its configuration names and the service does not have"
    if manifest.config.get("prompt_tuning_init_state_dict_path"):
        return "prompt_tuning_init_state_dict_path names a file, which the library would read"
    return None


def describes_its_layers(manifest: AdapterManifest) -> bool:
    """Whether layers of the right sizes can be made of the adapter alone."""
    modules, elsewhere = manifest.modules, manifest.config.get("trainable_token_indices")
    alone = bool(modules) and not elsewhere and not manifest.report.facts.typed
    return alone and all(module.complete for module in modules)
