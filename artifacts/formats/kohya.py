"""kohya's sd-scripts, musubi-tuner and LyCORIS: `lora_unet_<path with underscores>.lora_down.weight`."""

from __future__ import annotations

from collections.abc import Sequence

from artifacts.formats.architectures import Architecture, specified
from artifacts.formats.pairs import Pair
from artifacts.formats.protocol import DENOISER, Place
from artifacts.formats.writing import Grouped, Placed, Plan, Subject, in_native_names, pair_of, refuse, single

_PREFIXES = (
    ("lora_unet_", DENOISER),
    ("lora_te_", "text_encoder"),
    ("lora_te1_", "text_encoder"),
    ("lora_te2_", "text_encoder_2"),
    ("lora_te3_", "text_encoder_3"),
    ("lycoris_", DENOISER),
    ("oft_unet_", DENOISER),
    ("oft_te_", "text_encoder"),
    ("lora_prior_unet_", "prior"),
)
_STARTS = tuple(prefix for prefix, _ in _PREFIXES)


class Kohya:
    """Flattened names below a prefix that tells the part of the pipeline."""

    name = "kohya"
    description = "a kohya sd-scripts LoRA"

    def place(self, stem: str, role: str) -> Place | None:
        if not stem.startswith(_STARTS):
            return None
        for prefix, component in _PREFIXES:
            if stem.startswith(prefix):
                return Place(component, stem[len(prefix) :], flat=True)
        return None


_ENCODERS = {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_", "text_encoder_3": "lora_te3_"}
_ONE_ENCODER = ("sd1", "sd2", "clip-l", "clip-h")
_T5_SECOND = ("flux", "chroma")
_PATHS_OF_DIFFUSERS = frozenset({"sd1", "sd2", "framepack", "z-image", "qwen-image"})
"""Models whose adapters the trainers write under flattened names of diffusers."""
_NATIVE = frozenset(
    {"sdxl", "flux", "chroma", "sd3", "sd35-medium", "sd35-large", "wan21-1.3b", "wan-14b", "wan-14b-i2v", "wan22-5b"}
    | {"hunyuan-video", "flux2", "flux2-klein-9b", "flux2-klein-4b", "lumina2", "anima"}
)
"""Models whose adapters they write under flattened names of the first implementation."""


class KohyaWriter:
    """`networks.lora` of sd-scripts, or musubi-tuner's: flattened names, alpha beside the factors."""

    name = "kohya"

    def plan(self, subject: Subject) -> Plan:
        pairs: list[Pair] = []
        known = subject.architecture
        for component, items in subject.parts().items():
            if any(item.module.kind == "embedding" for item in items):
                refuse(self.name, "it adapts an embedding")
            if component.startswith("text_encoder"):
                prefix = self._encoder(component, subject)
                groups = [Grouped(item.path, single(item)) for item in items]
            elif known is None or known.component != component:
                refuse(
                    self.name, f"its modules are of no model whose names are stored here, as {items[0].path!r} is not"
                )
            elif known.name in _PATHS_OF_DIFFUSERS | _NATIVE:
                prefix = "lora_unet_"
                groups = list(self._groups(items, known))
            else:
                refuse(self.name, f"the names of kohya's trainers for {known.title} are not known here")
            for group in groups:
                stem = f"{prefix}{group.name.replace('.', '_')}"
                names = (f"{stem}.lora_down.weight", f"{stem}.lora_up.weight", f"{stem}.alpha")
                pairs.append(pair_of(group.blocks, names, subject, swap=group.swap))
        return Plan(tuple(pairs), self._metadata(pairs) | specified(known))

    def _groups(self, items: Sequence[Placed], known: Architecture) -> Sequence[Grouped]:
        if known.name in _NATIVE:
            return in_native_names(self.name, items, known)
        for item in items:
            if item.path not in known.modules:
                refuse(self.name, f"{known.title} has no module {item.path!r}")
        return [Grouped(item.path, single(item)) for item in items]

    def _encoder(self, component: str, subject: Subject) -> str:
        name = "" if subject.architecture is None else subject.architecture.name
        if name in _T5_SECOND and component == "text_encoder_2":
            return _ENCODERS["text_encoder_3"]  # trainers count T5 as Stable Diffusion 3 does
        if name in _ONE_ENCODER:
            return "lora_te_"
        if component not in _ENCODERS:
            refuse(self.name, f"kohya's trainers have no name for {component}")
        return _ENCODERS[component]

    def _metadata(self, pairs: Sequence[Pair]) -> dict[str, str]:
        ranks, alphas = {pair.rank for pair in pairs}, {pair.alpha for pair in pairs}
        found = {"ss_network_module": "networks.lora"}
        if len(ranks) == 1:
            found["ss_network_dim"] = str(ranks.pop())
        if len(alphas) == 1:
            found["ss_network_alpha"] = f"{alphas.pop():g}"
        return found
