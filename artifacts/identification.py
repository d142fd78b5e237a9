"""Which layout a safetensors file has, told from the names in its header alone."""

from __future__ import annotations

import re
from dataclasses import dataclass

from artifacts.safetensors_header import SafetensorsHeader


@dataclass(frozen=True, slots=True)
class Identification:
    """A layout: a stable short name, and words for a person."""

    name: str
    description: str

    @property
    def sentence(self) -> str:
        return f"it looks like {self.description}."


def _rule(name: str, description: str, pattern: str) -> tuple[Identification, re.Pattern[str]]:
    return Identification(name, description), re.compile(pattern)


# In order: the first rule that any key satisfies names the family. More specific layouts come first.
_RULES = (
    _rule("lycoris-loha", "a LyCORIS LoHa file", r".*\.hada_w[12]_[ab]$"),
    _rule("lycoris-lokr", "a LyCORIS LoKr file", r".*\.lokr_(w[12](_[ab])?|t2)$"),
    _rule("lycoris-oft", "a LyCORIS or kohya OFT file", r".*\.(oft_blocks|oft_diag|oft_R\.weight)$"),
    _rule("lycoris-ia3", "a LyCORIS IA3 file", r".*\.on_input$"),
    _rule("lycoris-glora", "a LyCORIS GLoRA file", r".*\.(a1|a2|b1|b2)\.weight$"),
    _rule("lycoris-dylora", "a LyCORIS DyLoRA file", r".*\.lora_(up|down)_list\.\d+$|.*\.(up|down)_list\.\d+$"),
    _rule("xlabs", "an XLabs FLUX LoRA", r".*\.processor\.(qkv|proj)_lora\d?\.(down|up)\.weight$"),
    _rule("adalora", "an AdaLoRA file", r".*\.lora_E(\..+)?$"),
    _rule("peft", "a PEFT LoRA file", r"base_model\.model\..*\.lora_(embedding_)?[AB](\..+)?$"),
    _rule("onetrainer", "a OneTrainer LoRA", r"lora_transformer_.*\.(lora_(down|up)\.weight|alpha)$"),
    _rule("kohya", "a kohya sd-scripts LoRA", r"(lora|lycoris)_[a-z0-9]+_.*\.(lora_(down|up|mid)\.weight)$"),
    _rule("old-attn-procs", "an old diffusers attention-processor LoRA", r".*processor\.\w+_lora\.(down|up)\.weight$"),
    _rule("comfy", "a ComfyUI or ai-toolkit LoRA", r"diffusion_model\..*\.lora_(A|B|down|up)(\..+)?\.?(weight)?$"),
    _rule(
        "diffusers",
        "a diffusers LoRA",
        r"(module\.)?(unet|transformer(_2)?|text_encoder(_\d)?|prior)\..*(lora_[AB]\..*|lora\.(down|up)\.|lora_linear_layer|lora_magnitude)",
    ),
    _rule("bfl", "a FLUX LoRA with Black Forest Labs names", r"(double|single)_blocks\.\d+\..*\.lora_[AB]\.weight$"),
    _rule("lora-bare", "a LoRA file without PEFT's prefix", r".*\.lora_(embedding_)?[AB](\..+)?$"),
    _rule("lora-lowercase", "an MLX, torchtune or litgpt LoRA", r".*\.lora_[ab](\.weight)?$"),
    _rule("down-up", "a LoRA with down/up names", r".*(lora_(down|up)|lora\.(down|up)|\.(down|up))\.weight$"),
    _rule("lycoris-diff", "a file of full weight differences", r".*\.(diff|diff_b|w_norm|b_norm)$"),
    _rule("ip-adapter", "an IP-Adapter", r"(ip_adapter|image_proj)\..*"),
    _rule("textual-inversion", "a textual-inversion embedding", r"(clip_[lg]|emb_params|string_to_param.*|<.*>)$"),
    _rule("alpha-only", "a file of alphas without factors", r".*\.alpha$"),
)

_FULL_MODEL = re.compile(r".*\.(weight|bias)$")
_MIXABLE = {"peft", "kohya", "onetrainer", "diffusers", "comfy", "lycoris-loha", "lycoris-lokr"}


def identify(header: SafetensorsHeader) -> Identification:
    """Name the layout of a file: a known one, "mixed", "full-model", "empty" or "unknown".

    Every key is looked at once; a file in which two families of layouts occur is "mixed".
    """
    if not header.tensors:
        return Identification("empty", "a file without tensors")
    found: dict[str, Identification] = {}
    weights = 0
    for key in header.tensors:
        for layout, pattern in _RULES:
            if pattern.match(key):
                found.setdefault(layout.name, layout)
                break
        else:
            weights += _FULL_MODEL.match(key) is not None
    families = [name for name in found if name in _MIXABLE and not (name == "kohya" and "onetrainer" in found)]
    if len(families) > 1:
        names = " and ".join(found[name].description for name in sorted(families))
        return Identification("mixed", f"{names} in one file")
    for layout, _ in _RULES:
        if layout.name in found:
            return layout
    if weights:
        return Identification("full-model", "the weights of a whole model or of one of its parts")
    return Identification("unknown", f"nothing known: its first key is {next(iter(header.tensors))[:80]!r}")
