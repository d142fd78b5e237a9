"""What was read of a foreign file, in the words of PEFT's configuration: so the rest of Rankwise reads one thing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from artifacts.formats.protocol import COMPONENTS
from artifacts.formats.reading import Reading
from artifacts.formats.written_config import most_common, short
from artifacts.manifest import LoraModule, TypedModule
from artifacts.peft_config import PeftLoraConfig
from artifacts.peft_keys import KeyMatch


def match_of(reading: Reading) -> KeyMatch:
    """The reading as the matching of a PEFT file."""
    return KeyMatch(reading.modules, reading.ignored, reading.used, reading.warnings, reading.refusals)


def document_of(reading: Reading) -> dict[str, Any]:
    """The configuration of each component as diffusers writes it into metadata: `component.field`;
    of a model that is no part of a pipeline, `field`.

    Empty where modules are no low-rank pairs, which PEFT's fields can not describe.
    """
    if reading.typed:
        return {}
    groups: dict[str, list[LoraModule]] = defaultdict(list)
    for module in reading.modules:
        component, dot, _ = module.path.partition(".")
        groups[component + dot if component in COMPONENTS else ""].append(module)
    document: dict[str, Any] = {}
    for prefix, modules in sorted(groups.items()):
        for field, value in _fields(prefix, modules).items():
            document[f"{prefix}{field}"] = value
    return document


def _fields(prefix: str, modules: list[LoraModule]) -> dict[str, Any]:
    rank = most_common(module.rank for module in modules)
    alpha = most_common(module.alpha for module in modules)
    paths = {module.path.removeprefix(prefix): module for module in modules}
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": short(alpha),
        "target_modules": sorted(paths),
        "rank_pattern": {path: module.rank for path, module in paths.items() if module.rank != rank},
        "alpha_pattern": {path: short(module.alpha) for path, module in paths.items() if module.alpha != alpha},
        "use_dora": any(module.magnitude_key for module in modules),
    }


def config_of(reading: Reading, document: Mapping[str, Any]) -> PeftLoraConfig:
    """A configuration for all components together; the scaling of single modules is theirs."""
    plain = not reading.typed
    modules: list[LoraModule | TypedModule] = [*reading.modules, *reading.typed]
    return PeftLoraConfig(
        rank=max((module.rank for module in modules), default=0),
        alpha=most_common(module.alpha for module in modules),
        rank_pattern={},
        alpha_pattern={},
        use_rslora=False,
        use_dora=any(module.magnitude_key for module in reading.modules),
        fan_in_fan_out=False,
        bias="none",
        lora_bias=any(module.bias_key for module in reading.modules),
        target_modules=tuple(sorted({module.path.rpartition(".")[2] for module in modules})),
        target_modules_regex=False,
        modules_to_save=(),
        base_model=None,
        revision=None,
        task_type=None,
        peft_type="LORA" if plain else reading.method.upper(),
        raw={},
        method=reading.method,
        opaque=not plain,
    )
