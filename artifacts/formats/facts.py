"""What can be done with an adapter that was understood, and the verdict on each of its keys."""

from __future__ import annotations

from collections.abc import Sequence

from artifacts.formats import architectures
from artifacts.formats.architectures import Named
from artifacts.formats.reading import Reading
from artifacts.manifest import Ability, FormatFacts, KeyUse, KeyVerdict, LoraModule
from artifacts.peft_keys import KeyMatch
from artifacts.refusals import OfType, lasting
from artifacts.safetensors_header import SafetensorsHeader

COMPOSABLE = ("lora", "rslora", "dora", "dylora")
"""Methods of which images can be composed."""
_PIPELINE_PARTS = ("unet.", "text_encoder.", "text_encoder_2.")


def facts_of(
    modules: Sequence[LoraModule], method: str, refusals: Sequence[str], reading: Reading | None
) -> FormatFacts:
    """Whether the adapter composes, and whether it is exactly a LoRA."""
    name = reading.architecture if reading is not None else _architecture_of(modules)
    return FormatFacts(
        architecture=name,
        modules_in_file=len(modules) if reading is None else reading.stems,
        partial=reading is not None and reading.partial,
        composable=_composable(modules, method, name, reading),
        exact_as_lora=_exact(refusals, reading),
        lasting=lasting(refusals),
        typed=() if reading is None else reading.typed,
    )


def _architecture_of(modules: Sequence[LoraModule]) -> str | None:
    """The stored list that has most of a PEFT adapter's modules; None if it lacks any."""
    names = []
    for module in modules:
        component, dot, rest = module.path.partition(".")
        known = dot and component in ("unet", "transformer")
        if not component.startswith("text_encoder"):
            names.append(Named(rest if known else module.path, False, module.d_out, module.d_in))
    found = architectures.choose(names, architectures.DENOISERS)
    if found is None or any(found.find(item.name, flat=False) is None for item in names):
        return None
    return found.name


def _composable(
    modules: Sequence[LoraModule], method: str, architecture: str | None, reading: Reading | None
) -> Ability:
    if method not in COMPOSABLE:
        return Ability(False, f"images are composed of LoRAs; this is of type {method}")
    if reading is not None and any(module.magnitude_key for module in modules):
        return Ability(False, "it is a DoRA without PEFT's configuration")
    if reading is not None and reading.partial:
        return Ability(False, "some of its modules could not be told")
    if reading is not None and any(module.bias_key for module in modules):
        return Ability(False, "it has biases, which can not be switched on and off")
    in_pipeline = any(module.path.startswith(_PIPELINE_PARTS) for module in modules)
    if architecture in ("sd1", "sd2", "sdxl") or (architecture is None and in_pipeline):
        return Ability(True)
    what = "no module of a UNet" if architecture is None else f"an adapter of {architecture}"
    return Ability(False, f"images are composed on Stable Diffusion 1.x, 2.x and XL; this is {what}")


def _exact(refusals: Sequence[str], reading: Reading | None) -> Ability:
    if not refusals:
        return Ability(True)
    of_type_only = all(isinstance(reason, OfType) for reason in refusals)
    if of_type_only and reading is not None and reading.typed and not reading.partial:
        kinds = {module.type for module in reading.typed}
        factored = all("lokr_w2" not in module.tensors or "lokr_w1" not in module.tensors for module in reading.typed)
        if kinds <= {"lokr"} and factored and not reading.modules:
            return Ability(True)
    return Ability(False, "; ".join(refusals))


def verdicts_of(header: SafetensorsHeader, match: KeyMatch) -> tuple[KeyVerdict, ...]:
    """The verdict on each key of a file in PEFT's own layout."""
    ignored = {entry.key: entry.reason for entry in match.ignored}
    parts: dict[str, tuple[str, str]] = {}
    for module in match.modules:
        named = {
            "lora_A": module.a_key,
            "lora_B": module.b_key,
            "lora_B.bias": module.bias_key,
            "magnitude": module.magnitude_key,
            "block": module.block_key,
        }
        parts |= {key: (role, module.path) for role, key in named.items() if key}
    found = []
    for key in header.tensors:
        role, path = parts.get(key, ("", ""))
        use: KeyUse = "used"
        if key in ignored:
            use = "kept" if ignored[key].endswith("kept in the stored file") else "ignored"
        elif not path or role == "magnitude":
            use = "kept"
        found.append(KeyVerdict(key, use, role, (path,) if path else (), ignored.get(key, "")))
    return tuple(found)
