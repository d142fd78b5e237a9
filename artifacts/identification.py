"""Which layout a safetensors file has, told from the names in its header alone."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from artifacts.formats.roles import A_T, B_T, WEAK, A, B, part_of
from artifacts.formats.table import READERS
from artifacts.safetensors_header import SafetensorsHeader


@dataclass(frozen=True, slots=True)
class Identification:
    """A layout: a stable short name, and words for a person."""

    name: str
    description: str

    @property
    def sentence(self) -> str:
        return f"it looks like {self.description}."


_PEFT = Identification("peft", "a PEFT LoRA file")
_ADALORA = Identification("adalora", "an AdaLoRA file")
_LOWERCASE = Identification("lora-lowercase", "an MLX or torchtune LoRA")
_TEXT_ENCODER = Identification("text-encoder", "a LoRA of a text encoder under a name that is not read")
_ENCODER_NAME = re.compile(r"(text_encoders\.\w+|te\d?)\.")
"""How ComfyUI and trainers after it begin the names of text encoders; those that are read are known before."""
_BARE = Identification("lora-bare", "a LoRA file without PEFT's prefix")
_READERS = {reader.name: Identification(reader.name, reader.description) for reader in READERS} | {"bare": _BARE}
_PLACES = tuple((reader.place, reader.name) for reader in READERS)
_UNSEEN = ""
_ALPHA_ONLY = Identification("alpha-only", "a file of alphas without factors")

_OTHERS = tuple(
    (Identification(name, description), re.compile(pattern))
    for name, description, pattern in (
        ("ip-adapter", "an IP-Adapter", r"(ip_adapter|image_proj)\..*"),
        (
            "textual-inversion",
            "a textual-inversion embedding",
            r"(clip_[lg]|t5xxl|emb_params|string_to_param.*|text_encoders_\d|<.*>)$",
        ),
        ("controlnet", "a ControlNet", r"(control_model|controlnet_\w+)\..*"),
        ("cloneofsimo", "a LoRA whose layers are numbered and not named (cloneofsimo/lora)", r"\w+:\d+:(up|down)"),
        ("vae", "a VAE", r"(first_stage_model\.)?(encoder|decoder|quant_conv|post_quant_conv)\.(conv|mid|down|up).*"),
    )
)
"""Files that are near an adapter and are none."""

_FULL_MODEL = (".weight", ".bias")


def identify(header: SafetensorsHeader) -> Identification:
    """Name the layout of a file: a known one, "mixed", "full-model", "empty" or "unknown".

    Every key is looked at once; a file in which two families of layouts occur is "mixed".
    """
    if not header.tensors:
        return Identification("empty", "a file without tensors")
    stems: dict[str, str | None] = {}
    names: list[str | None] = []
    rest: list[str] = []
    for key in header.tensors:
        part = part_of(key)
        if part is None or part.role in WEAK:
            rest.append(key)
            continue
        stem, role, _ = part
        name = stems.get(stem, _UNSEEN)
        if name is _UNSEEN:
            name = stems[stem] = _family(stem, role, key)
        names.append(name)
    found = Counter(name for name in names if name is not None)
    return _of_families(found) if found else _of_other_keys(header, rest)


def _of_other_keys(header: SafetensorsHeader, keys: list[str]) -> Identification:
    """The layout of a file without a key of any adapter."""
    pipeline = _is_pipeline(header)
    for layout, pattern in _OTHERS:
        if not (pipeline and layout.name == "vae") and any(pattern.match(key) for key in keys):
            return layout
    if any(key.endswith(".alpha") for key in keys):
        return _ALPHA_ONLY
    if any(key.endswith(_FULL_MODEL) for key in keys):
        return Identification("full-model", "the weights of a whole model or of one of its parts")
    return Identification("unknown", f"nothing known: its first key is {next(iter(header.tensors))[:80]!r}")


def _is_pipeline(header: SafetensorsHeader) -> bool:
    return any(key.startswith("model.diffusion_model.") for key in header.tensors)


def _family(stem: str, role: str, key: str) -> str | None:
    if stem.startswith("base_model.model."):
        return "adalora" if role == "lora_E" else "peft"
    stem = stem.removeprefix("module.")
    for place, name in _PLACES:
        if place(stem, role) is not None:
            if name == "bare" and _ENCODER_NAME.match(stem):
                return _TEXT_ENCODER.name
            lowercase = name == "bare" and role in (A, B, A_T, B_T) and (".lora_a" in key or ".lora_b" in key)
            return "lora-lowercase" if lowercase else name
    return None


def _of_families(found: Counter[str]) -> Identification:
    named = {
        **_READERS,
        "peft": _PEFT,
        "adalora": _ADALORA,
        "lora-lowercase": _LOWERCASE,
        "text-encoder": _TEXT_ENCODER,
    }
    if "adalora" in found:
        return _ADALORA
    families = set(found) - {"lora-lowercase"}
    if "onetrainer" in families:
        families.discard("kohya")  # its text encoders carry kohya's names
    if len(families) > 1 and _TEXT_ENCODER.name in families:
        families = families - {_TEXT_ENCODER.name} | {"bare"}
    if len(families) > 1:
        names = " and ".join(sorted(named[name].description for name in families))
        return Identification("mixed", f"{names} in one file")
    return named[found.most_common(1)[0][0] if not families else families.pop()]
