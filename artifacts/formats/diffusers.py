"""diffusers: `<component>.<path>` before PEFT's `lora_A`, or the older `lora.down` and `lora_linear_layer.down`."""

from __future__ import annotations

from typing import Any

from artifacts.formats.pairs import Pair
from artifacts.formats.protocol import COMPONENTS, Place
from artifacts.formats.writing import Plan, Subject, pair_of, refuse, single
from artifacts.formats.written_config import config_of_pairs

_LEVEL = "text_model."
"""A level that CLIP has in transformers 4 and not in 5. diffusers takes it off keys and not off the configuration,
which therefore names the ends of paths that both have."""


class Diffusers:
    """Dotted names below the name of a pipeline's component."""

    name = "diffusers"
    description = "a diffusers LoRA"

    def place(self, stem: str, role: str) -> Place | None:
        component, dot, rest = stem.partition(".")
        if not dot or component not in COMPONENTS:
            return None
        if component == "transformer" and rest.startswith(("h.", "encoder.layers.")):
            return None  # "transformer.h.0" is GPT-2, "transformer.encoder.layers.0" is ChatGLM
        return Place(component, rest, kept=stem)


class DiffusersWriter:
    """`pytorch_lora_weights.safetensors`: PEFT's ends below the component; the scaling is in B.

    Releases that read the configuration in the metadata and those that do not then apply the same ΔW.
    """

    name = "diffusers"

    def plan(self, subject: Subject) -> Plan:
        pairs: list[Pair] = []
        fields: dict[str, Any] = {}
        for component, items in subject.parts().items():
            if not component:
                refuse(self.name, f"its modules belong to no component of a pipeline, as {items[0].path!r} does not")
            if any(item.module.kind == "embedding" for item in items):
                refuse(self.name, "it adapts an embedding")
            made = []
            for item in items:
                stem = f"{component}.{item.path}"
                names = (f"{stem}.lora_A.weight", f"{stem}.lora_B.weight", "")
                made.append(pair_of(single(item), names, subject, fold=True))
            paths = [item.path for item in items]
            ends = [path.removeprefix(_LEVEL) for path in paths] if component.startswith("text_encoder") else paths
            known = subject.architecture if ends == paths else None
            document = config_of_pairs(ends, made, known, whole=ends == paths)
            fields |= {f"{component}.{field}": value for field, value in document.items()}
            pairs += made
        return Plan(tuple(pairs), config=fields)
