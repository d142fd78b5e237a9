"""ComfyUI and ai-toolkit: `diffusion_model.<path in the model's first implementation>`."""

from __future__ import annotations

from collections.abc import Sequence

from artifacts.formats.architectures import Architecture, specified
from artifacts.formats.pairs import Pair
from artifacts.formats.protocol import DENOISER, Place
from artifacts.formats.writing import Grouped, Placed, Plan, Subject, in_native_names, pair_of, refuse, single

_PREFIXES = ("diffusion_model.", "model.diffusion_model.")
_ENCODERS = {
    "text_encoders.clip_l.": "text_encoder",
    "text_encoders.clip_h.": "text_encoder",
    "text_encoders.clip_g.": "text_encoder_2",
    "text_encoders.t5xxl.": "text_encoder_3",
}
_STARTS = (*_PREFIXES, *_ENCODERS)


class Comfy:
    """Dotted names of the first implementation, or of diffusers."""

    name = "comfy"
    description = "a ComfyUI or ai-toolkit LoRA"

    def place(self, stem: str, role: str) -> Place | None:
        if not stem.startswith(_STARTS):
            return None
        for prefix in _PREFIXES:
            if stem.startswith(prefix):
                rest = stem[len(prefix) :]
                if rest.startswith("sformer_blocks."):
                    rest = f"tran{rest}"  # some exports of FLUX.2 cut the beginning of the name off
                return Place(DENOISER, rest, kept=f"diffusion_model.{rest}")
        for prefix, component in _ENCODERS.items():
            if stem.startswith(prefix):
                rest = stem[len(prefix) :].removeprefix("transformer.")
                return Place(component, rest, kept=f"{component}.{rest}")
        return None


_NATIVE = frozenset(
    {"sd1", "sd2", "sdxl", "flux", "chroma", "sd3", "sd35-medium", "sd35-large", "hunyuan-video", "z-image", "ltx-2"}
    | {"wan21-1.3b", "wan-14b", "wan-14b-i2v", "wan22-5b", "flux2", "flux2-klein-9b", "flux2-klein-4b", "lumina2"}
    | {"krea2", "anima"}
)
_SAME_NAMES = {"qwen-image": "", "hidream": "", "ltx-video": "transformer_blocks."}
"""Models whose names are diffusers', from this beginning on."""
_CLIP = {
    "sd1": {"text_encoder": "clip_l"},
    "sd2": {"text_encoder": "clip_h"},
    "sdxl": {"text_encoder": "clip_l", "text_encoder_2": "clip_g"},
    "sd3": {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl"},
    "flux": {"text_encoder": "clip_l", "text_encoder_2": "t5xxl"},
    "clip-l": {"text_encoder": "clip_l"},
}


class ComfyWriter:
    """`diffusion_model.<name in the first implementation>`, which ComfyUI takes for every model; alpha beside it."""

    name = "comfy"

    def plan(self, subject: Subject) -> Plan:
        pairs: list[Pair] = []
        for component, items in subject.parts().items():
            if any(item.module.kind == "embedding" for item in items):
                refuse(self.name, "it adapts an embedding")
            for group in self._groups(component, items, subject.architecture):
                names = (f"{group.name}.lora_A.weight", f"{group.name}.lora_B.weight", f"{group.name}.alpha")
                pairs.append(pair_of(group.blocks, names, subject, swap=group.swap))
        return Plan(tuple(pairs), specified(subject.architecture))

    def _groups(self, component: str, items: Sequence[Placed], known: Architecture | None) -> Sequence[Grouped]:
        if component.startswith("text_encoder"):
            name = "" if known is None else known.name
            encoder = _CLIP.get("sd3" if name.startswith("sd3") else name, {})
            if component not in encoder:
                refuse(self.name, f"which of ComfyUI's text encoders {component} is can not be told")
            start = f"text_encoders.{encoder[component]}.transformer"
            return [Grouped(f"{start}.{item.path}", single(item)) for item in items]
        if known is None or known.component != component:
            refuse(self.name, f"its modules are of no model whose names are stored here, as {items[0].path!r} is not")
        if known.name in _NATIVE:
            found = in_native_names(self.name, items, known)
        elif known.name in _SAME_NAMES:
            for item in items:
                if item.path not in known.modules or not item.path.startswith(_SAME_NAMES[known.name]):
                    refuse(self.name, f"ComfyUI's name of {item.path!r} is not known here")
            found = tuple(Grouped(item.path, single(item)) for item in items)
        else:
            refuse(self.name, f"ComfyUI's names of {known.title} are not known here")
        return [Grouped(f"diffusion_model.{group.name}", group.blocks, group.swap) for group in found]
