"""PEFT's own format as a writer: `base_model.model.<path>.lora_A.weight`, and the configuration with the scaling."""

from __future__ import annotations

from artifacts.formats.writing import Plan, Subject, pair_of, refuse, single
from artifacts.formats.written_config import config_of_pairs
from artifacts.peft_keys import PREFIX


class PeftWriter:
    """A PEFT directory holds the adapter of one model."""

    name = "peft"

    def plan(self, subject: Subject) -> Plan:
        parts = subject.parts()
        if len(parts) > 1:
            refuse(
                self.name,
                f"it holds the adapters of several components ({', '.join(parts)}); a PEFT directory holds one",
                "format=diffusers holds them all in one file.",
            )
        (items,) = parts.values()
        pairs = []
        for item in items:
            stem = f"{PREFIX}{item.path}"
            ends = ("lora_embedding_A", "lora_embedding_B")
            if item.module.kind != "embedding":
                ends = ("lora_A.weight", "lora_B.weight")
            names = (f"{stem}.{ends[0]}", f"{stem}.{ends[1]}", "")
            # PEFT's alpha is a positive number
            pairs.append(pair_of(single(item), names, subject, fold=item.module.scaling <= 0))
        manifest = subject.manifest
        config = config_of_pairs([item.path for item in items], pairs, subject.architecture)
        stored = manifest.config if manifest.format in ("peft", "safetensors-metadata") else {}
        config |= {
            "base_model_name_or_path": manifest.base_model,
            "revision": manifest.base_model_revision,
            "task_type": stored.get("task_type"),
            "fan_in_fan_out": bool(stored.get("fan_in_fan_out")),
            "inference_mode": True,
        }
        return Plan(tuple(pairs), config=config)
