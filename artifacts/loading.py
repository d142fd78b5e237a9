"""What an engine's own library is given of an adapter when it shall really load it, and which adapters it is not given.
Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

from artifacts.manifest import AdapterManifest

LoadedEngine = Literal["peft", "transformers", "diffusers"]
"""The engines whose libraries are installed wherever jobs run."""

_NOT_COUNTED: Mapping[str, str] = MappingProxyType(
    {
        "XLORA": "its experts are adapters of their own, which its configuration names and the service does not have",
        "SHADOW": "it is another model, which its configuration names and the service does not have",
        "ADAMSS": "its layers are laid out by the numbers of the base model, and these are not read here",
        "OSF": "every weight of the base model is decomposed while it is loaded, and these are not read here",
        "PSOFT": "every weight of the base model is decomposed while it is loaded, and these are not read here",
    }
)
"""Types that can not be loaded into a model without numbers from the adapter's file alone."""


def layout_for(manifest: AdapterManifest, engine: LoadedEngine) -> Literal["peft", "diffusers", "safetensors"]:
    """The format of the download that the engine reads; "safetensors" is the stored file itself."""
    if engine != "diffusers":
        return "peft"
    own = "diffusers" in manifest.format.split("+") and other_diffusers_key(manifest) is None
    return "safetensors" if own or stored_for_diffusers(manifest) else "diffusers"


def stored_for_diffusers(manifest: AdapterManifest) -> bool:
    """Whether diffusers applies the stored file as it is: a LoRA or DoRA under its own names.

    Not so where text encoders are decomposed: these it gives to transformers, which leaves their magnitudes out.
    """
    own = "diffusers" in manifest.format.split("+")
    if other_diffusers_key(manifest) is not None:
        return False
    if manifest.mergeable:
        return own
    magnitudes = all("lora_magnitude_vector" in (module.magnitude_key or "") for module in manifest.modules)
    parts = {module.path.partition(".")[0] for module in manifest.modules}
    described = own or manifest.format == "safetensors-metadata"
    return described and manifest.method == "dora" and magnitudes and parts <= {"unet", "transformer"}


def foreign_key(key: str, path: str, engine: Literal["peft", "transformers"]) -> bool:
    """Whether the library passes over a tensor of the module at `path`, as levels of its name are others than PEFT's:
    those of wrappers (`_orig_mod`, `module`, `_fsdp_wrapped_module` …), none where it wants some, or too many.

    Seen with PEFT 0.21 and transformers 5.23: only PEFT asks for "base_model.model.", and only PEFT takes the adapter's
    name between a factor and its ".weight".
    """
    prefix = "base_model.model."
    if engine == "transformers":
        return not key.removeprefix(prefix).startswith(f"{path}.") or ".default" in key[-len(".default.weight") :]
    return not key.startswith(f"{prefix}{path}.") or key.endswith(".lora_magnitude_vector.default")


def other_diffusers_key(manifest: AdapterManifest) -> str | None:
    """A key of a stored file that diffusers passes over or refuses, for its wrapper's levels or an old name."""
    for module in manifest.modules:
        for key in module.factor_keys:
            old = ".lora_down." in key or ".lora_up." in key
            old = old or (".lora_linear_layer." in key and not key.startswith("text_encoder"))
            if old or not key.startswith(f"{module.path}."):
                return key
    return None


def why_not_counted(manifest: AdapterManifest) -> str | None:
    """Why the library needs more than the adapter's file and the base's shapes; None if it does not."""
    kind = str(manifest.config.get("peft_type", "LORA"))
    if kind in _NOT_COUNTED:
        return f"it is of type {kind}: {_NOT_COUNTED[kind]}"
    if kind == "VBLORA" and manifest.config.get("save_only_topk_weights"):
        return "save_only_topk_weights is set: what the file holds is not what the model gets"
    if manifest.config.get("prompt_tuning_init_state_dict_path"):
        return "prompt_tuning_init_state_dict_path names a file, which the library would read"
    return None


def describes_its_layers(manifest: AdapterManifest) -> bool:
    """Whether layers of the right sizes can be made of the adapter alone, and PEFT finds them by its configuration."""
    modules, elsewhere = manifest.modules, manifest.config.get("trainable_token_indices")
    elsewhere = elsewhere or manifest.config.get("target_modules") == "all-linear"
    alone = bool(modules) and not elsewhere and not manifest.report.facts.typed
    return alone and all(module.complete for module in modules)
