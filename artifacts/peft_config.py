"""`adapter_config.json`: every field honoured, known to be harmless, or refused by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from artifacts.declared_types import DECLARED_TYPES
from artifacts.errors import ConfigRefused, FieldError
from artifacts.peft_fields import BASE_CHANGING_INITS, DEFAULT_VALUES, FIELD_RULES, OTHER_PEFT_TYPES, PLAIN_INITS
from artifacts.peft_patterns import InnerNames, ModuleSelection, PatternTable
from artifacts.refusals import OfType

NAMING_FIELDS = frozenset({"base_model_name_or_path", "revision", "task_type", "init_lora_weights"})
"""Fields that name things around an adapter of another type than LoRA and leave its ΔW alone."""

BLOCK_TYPES = ("MISS", "BONE")
"""Types with one block per module, of which some are a low-rank product (`artifacts.miss_keys`)."""

MAX_RANK = 65536
MAX_LIST = 100_000
MAX_TEXT = 300


@dataclass(frozen=True)
class PeftLoraConfig:
    """The configuration of a PEFT adapter.

    Attributes:
        target_modules: names; or the one regular expression or keyword ("all-linear") that PEFT was given as a string.
        target_modules_regex: `target_modules` holds one regular expression.
        raw: the document as it was sent.
        method: "lora", "rslora", "dora", a variant's name, or the lower-case `peft_type`.
        opaque: the tensors do not follow the layout of A and B of one rank; they are stored without description.
        refusals: why the adapter can not be merged; empty when it can.
    """

    rank: int
    alpha: float
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    use_rslora: bool
    use_dora: bool
    fan_in_fan_out: bool
    bias: str
    lora_bias: bool
    target_modules: tuple[str, ...]
    target_modules_regex: bool
    modules_to_save: tuple[str, ...]
    base_model: str | None
    revision: str | None
    task_type: str | None
    peft_type: str
    raw: dict[str, Any]
    method: str = "lora"
    opaque: bool = False
    refusals: tuple[str, ...] = ()

    def rank_for(self, path: str) -> int:
        """The rank that PEFT gives to the module at `path` (without "base_model.model.")."""
        return self._ranks.lookup(path, self.rank)

    def alpha_for(self, path: str) -> float:
        """The alpha that PEFT gives to the module at `path`."""
        return self._alphas.lookup(path, self.alpha)

    def scaling_for(self, path: str, rank: int) -> float:
        """alpha/r, or alpha/√r with rsLoRA, for the module at `path` of `rank`."""
        return self.alpha_for(path) / (math.sqrt(rank) if self.use_rslora else rank)

    def unmatched_patterns(self, paths: tuple[str, ...]) -> tuple[str, ...]:
        """Keys of `rank_pattern` and `alpha_pattern` that match no module."""
        return tuple(dict.fromkeys(self._ranks.unmatched(paths) + self._alphas.unmatched(paths)))

    @property
    def delta_fields(self) -> dict[str, Any]:
        """The set fields that change ΔW, or what of the file is used, besides rank, alpha and their patterns."""
        if self.peft_type != "LORA":
            skipped = {field for field, rule in FIELD_RULES.items() if rule.kind == "harmless"} | NAMING_FIELDS
            return {key: value for key, value in self.raw.items() if key not in skipped and is_set(key, value)}
        kept: dict[str, Any] = {"method": self.method, "bias": self.bias, "fan_in_fan_out": self.fan_in_fan_out}
        for key, value in self.raw.items():
            rule = FIELD_RULES.get(key)  # a field of a later release that says nothing has none
            if rule is not None and rule.kind in ("unmergeable", "opaque") and is_set(key, value):
                kept[key] = sorted(value) if key == "modules_to_save" else value
        if any(reason.startswith("init_lora_weights") for reason in self.refusals):
            kept["init_lora_weights"] = self.raw["init_lora_weights"]
        if self.opaque:
            kept |= {"r": self.rank, "lora_alpha": self.alpha, "rank_pattern": self.rank_pattern}
            kept |= {"alpha_pattern": self.alpha_pattern, "use_rslora": self.use_rslora}
        return kept

    @cached_property
    def selection(self) -> ModuleSelection:
        """Which modules PEFT adapts under this configuration."""
        raw = self.raw
        targets: tuple[str, ...] | str | None = self.target_modules
        if raw.get("target_modules") is None:
            targets = None
        elif isinstance(raw["target_modules"], str):
            targets = raw["target_modules"]
        excludes = raw.get("exclude_modules") or ()
        layers = raw.get("layers_to_transform")
        patterns = raw.get("layers_pattern") or ()
        return ModuleSelection(
            targets,
            excludes if isinstance(excludes, str) else tuple(excludes),
            (layers,) if isinstance(layers, int) else tuple(layers or ()),
            (patterns,) if isinstance(patterns, str) else tuple(patterns),
            self.saved_names,
        )

    @cached_property
    def saved_names(self) -> InnerNames:
        """`modules_to_save`, to be found in paths: PEFT saves what is below such a module too."""
        return InnerNames("modules_to_save", self.modules_to_save)

    @property
    def evenly_targeted(self) -> bool:
        """Whether every layer is adapted alike: the targets are plain names, without exceptions."""
        narrowed = any(self.raw.get(field) for field in ("exclude_modules", "layers_to_transform", "layers_pattern"))
        listed = isinstance(self.raw.get("target_modules"), list) and bool(self.target_modules)
        return listed and not narrowed and not any("." in name for name in self.target_modules)

    @cached_property
    def _ranks(self) -> PatternTable[int]:
        return PatternTable("rank_pattern", self.rank_pattern)

    @cached_property
    def _alphas(self) -> PatternTable[float]:
        return PatternTable("alpha_pattern", self.alpha_pattern)


def parse_config(document: Mapping[str, Any]) -> PeftLoraConfig:
    """Read an adapter's configuration.

    Raises:
        ConfigRefused: a field is missing, has a wrong type or value, can not be honoured, or is unknown to PEFT 0.21.2
            while it is set to something; each finding is named in `errors`.
    """
    reader = _Reader(document)
    peft_type = reader.text("peft_type")
    if peft_type is None:
        raise ConfigRefused(
            "adapter_config.json has no peft_type.", hint='PEFT writes one in every file; for LoRA it is "LORA".'
        )
    if peft_type in DECLARED_TYPES:
        own = DECLARED_TYPES[peft_type]
        reason = OfType(f"it is of Rankwise's type {peft_type}, {own.reason}")
        return _other_type(reader, peft_type, own.method, (reason,))
    if peft_type in OTHER_PEFT_TYPES:
        reason = OfType(f"it is of PEFT type {peft_type}, whose ΔW is not scaling·B·A; it is stored as it is")
        # What keeps a MiSS adapter from being merged is found in its tensors.
        refusals = () if peft_type in BLOCK_TYPES else (reason,)
        return _other_type(reader, peft_type, peft_type.lower(), refusals)
    if peft_type != "LORA":
        raise ConfigRefused(
            f"adapter_config.json: peft_type {peft_type[:40]!r} is unknown.",
            hint=f"Known are LORA, {', '.join(OTHER_PEFT_TYPES)}.",
        )
    return _lora(reader)


def _lora(reader: _Reader) -> PeftLoraConfig:
    _check_fields(reader)
    rank, alpha = reader.rank("r"), reader.alpha("lora_alpha")
    targets, is_regex = _targets(reader)
    method, opaque, refusals = _consequences(reader)
    config = PeftLoraConfig(
        rank=rank,
        alpha=alpha,
        rank_pattern=reader.pattern("rank_pattern", reader.is_rank),
        alpha_pattern={key: float(value) for key, value in reader.pattern("alpha_pattern", reader.is_alpha).items()},
        use_rslora=reader.flag("use_rslora"),
        use_dora=reader.flag("use_dora"),
        fan_in_fan_out=reader.flag("fan_in_fan_out"),
        bias=_bias(reader),
        lora_bias=reader.flag("lora_bias"),
        target_modules=targets,
        target_modules_regex=is_regex,
        modules_to_save=reader.names("modules_to_save"),
        base_model=reader.text("base_model_name_or_path"),
        revision=reader.text("revision"),
        task_type=reader.text("task_type"),
        peft_type="LORA",
        raw=dict(reader.document),
        method=method,
        opaque=opaque,
        refusals=refusals,
    )
    reader.names("exclude_modules", allow_text=True)
    reader.names("layers_pattern", allow_text=True)
    reader.indices("layers_to_transform")
    reader.finish()
    return config


def _other_type(reader: _Reader, peft_type: str, method: str, refusals: tuple[str, ...]) -> PeftLoraConfig:
    document = reader.document
    rank = document.get("r")
    alpha = next((document[key] for key in ("lora_alpha", "alpha") if reader.is_alpha(document.get(key))), 0.0)
    targets = document.get("target_modules")
    config = PeftLoraConfig(
        rank=int(rank) if rank is not None and reader.is_rank(rank) else 0,
        alpha=float(alpha),
        rank_pattern={},
        alpha_pattern={},
        use_rslora=False,
        use_dora=False,
        fan_in_fan_out=False,
        bias="none",
        lora_bias=False,
        target_modules=(targets,) if isinstance(targets, str) else reader.names("target_modules"),
        target_modules_regex=isinstance(targets, str) and targets != "all-linear",
        modules_to_save=reader.names("modules_to_save"),
        base_model=reader.text("base_model_name_or_path"),
        revision=reader.text("revision"),
        task_type=reader.text("task_type"),
        peft_type=peft_type,
        raw=dict(document),
        method=method,
        opaque=True,
        refusals=refusals,
    )
    reader.finish()
    return config


def is_set(field: str, value: Any) -> bool:
    """Whether a field says anything: it is not null, false, empty or at its default."""
    return not (value is None or value is False or value in ("", [], {}) or value == DEFAULT_VALUES.get(field, ...))


def _check_fields(reader: _Reader) -> None:
    for field, value in reader.document.items():
        if not is_set(field, value):
            continue
        rule = FIELD_RULES.get(field)
        if rule is None:
            reader.fault(field, "unknown to PEFT 0.21.2, so its effect on ΔW is unknown; remove it or set it to null")
        elif rule.kind == "refused":
            reader.fault(field, f"can not be honoured: {rule.reason}")


def _consequences(reader: _Reader) -> tuple[str, bool, tuple[str, ...]]:
    """(method, opaque, refusals) that follow from the fields that are set."""
    method, opaque, refusals = "rslora" if reader.flag("use_rslora") else "lora", False, []
    for field, value in reader.document.items():
        rule = FIELD_RULES.get(field)
        if rule is None or rule.kind not in ("unmergeable", "opaque") or not is_set(field, value):
            continue
        method = rule.method or method
        opaque = opaque or rule.kind == "opaque"
        reason = f"{field} is set: {rule.reason}"
        refusals.append(OfType(reason) if field == "use_dora" else reason)
    if reader.document.get("bias", "none") in ("all", "lora_only"):
        refusals.append("bias is set: bias vectors of the base were trained, which B·A can not express")
    refusals.extend(_init_refusal(reader))
    return method, opaque, tuple(refusals)


def _init_refusal(reader: _Reader) -> list[str]:
    value = reader.document.get("init_lora_weights", True)
    if value is None or isinstance(value, bool):
        return []
    if isinstance(value, str):
        lowered = value.lower()
        for prefix, title in BASE_CHANGING_INITS.items():
            if lowered == prefix or (prefix in ("pissa", "corda") and lowered.startswith(prefix)):
                reason = (
                    f"init_lora_weights is {value[:40]!r}: {title} subtracts its initial B·A from the base weights (or "
                    "quantises them), so these factors fit that changed base and not the original. Save it in PEFT "
                    "with path_initial_model_for_weight_conversion to get factors for the original base"
                )
                return [reason]
        if lowered in PLAIN_INITS:
            return []
    reader.fault("init_lora_weights", f"{str(value)[:40]!r} is no initialisation of PEFT 0.21.2")
    return []


def _bias(reader: _Reader) -> str:
    value = reader.document.get("bias") or "none"
    if value not in ("none", "all", "lora_only"):
        reader.fault("bias", f"{str(value)[:40]!r} is not one of none, all, lora_only")
    return str(value)


def _targets(reader: _Reader) -> tuple[tuple[str, ...], bool]:
    value = reader.document.get("target_modules")
    if isinstance(value, str):
        return (value,), value != "all-linear"
    return reader.names("target_modules"), False


class _Reader:
    """Typed access to a JSON document that collects its findings."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self.document = document
        self._faults: list[FieldError] = []

    def fault(self, field: str, message: str) -> None:
        self._faults.append(FieldError(f"adapter_config.json#/{field[:MAX_TEXT]}", message))

    def finish(self) -> None:
        """Raise what was found, all together."""
        if self._faults:
            first = self._faults[0]
            field = first.pointer.partition("#/")[2]
            more = f" (and {len(self._faults) - 1} more)" if len(self._faults) > 1 else ""
            raise ConfigRefused(f"adapter_config.json: {field}: {first.message}{more}.", errors=self._faults)

    @staticmethod
    def is_rank(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_RANK

    @staticmethod
    def is_alpha(value: Any) -> bool:
        return (
            isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e9  # also false for NaN
        )

    def rank(self, field: str) -> int:
        # LoraConfig's own default, for files of releases that left defaults out
        value = self.document.get(field, 8)
        if not self.is_rank(value):
            self.fault(field, f"must be an integer from 1 to {MAX_RANK}, not {str(value)[:40]!r}")
            return 1
        return int(value)

    def alpha(self, field: str) -> float:
        value = self.document.get(field, 8)
        if not self.is_alpha(value):
            why = ": the adapter would change nothing" if value == 0 else ""
            self.fault(field, f"must be a number above 0, not {str(value)[:40]!r}{why}")
            return 1.0
        return float(value)

    def flag(self, field: str) -> bool:
        value = self.document.get(field)
        if value is not None and not isinstance(value, bool):
            self.fault(field, f"must be true or false, not {str(value)[:40]!r}")
        return value is True

    def text(self, field: str) -> str | None:
        value = self.document.get(field)
        if value is None or value == "":
            return None
        if not isinstance(value, str) or len(value) > MAX_TEXT or not value.isprintable():
            self.fault(field, f"must be printable text of at most {MAX_TEXT} characters")
            return None
        return value

    def names(self, field: str, *, allow_text: bool = False) -> tuple[str, ...]:
        value = self.document.get(field)
        if value is None:
            return ()
        if isinstance(value, str) and allow_text:
            return (value,)
        if not isinstance(value, list) or len(value) > MAX_LIST or not all(isinstance(item, str) for item in value):
            self.fault(field, "must be a list of module names")
            return ()
        return tuple(value)

    def indices(self, field: str) -> None:
        value = self.document.get(field)
        items = value if isinstance(value, list) else [value]
        if value is not None and not all(isinstance(item, int) and not isinstance(item, bool) for item in items):
            self.fault(field, "must be a layer number or a list of layer numbers")

    def pattern(self, field: str, accepts: Any) -> dict[str, Any]:
        value = self.document.get(field)
        if value is None:
            return {}
        if not isinstance(value, Mapping) or len(value) > MAX_LIST:
            self.fault(field, "must map module names to numbers")
            return {}
        for key, item in value.items():
            if not accepts(item):
                self.fault(field, f"{key[:80]!r} has the value {str(item)[:40]!r}, which is out of range")
                return {}
        return dict(value)
