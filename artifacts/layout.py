"""What lies on disk: where an adapter's weights and configuration are, and which tensors are which factors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from artifacts.errors import ConfigRefused, FileBroken, FormatUnknown, PickleRefused
from artifacts.formats.facts import facts_of, verdicts_of
from artifacts.formats.peft_view import config_of, document_of, match_of
from artifacts.formats.protocol import NOTHING_TOLD, Settings
from artifacts.formats.reading import Reading, read_keys
from artifacts.formats.roles import A, B, part_of
from artifacts.formats.table import configured_reader, is_reader
from artifacts.formats.values import FileValues, Values
from artifacts.identification import Identification, identify
from artifacts.json_objects import unique_members
from artifacts.manifest import FormatFacts, IgnoredKey, KeyVerdict, LoraModule
from artifacts.miss_keys import match_blocks
from artifacts.peft_config import BLOCK_TYPES, PeftLoraConfig, parse_config
from artifacts.peft_keys import KeyMatch, match_keys
from artifacts.safetensors_header import SafetensorsHeader, read_header

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
EMBEDDINGS_NAME = "new_embeddings.safetensors"
"""Where vLLM expects rows of the embedding that were trained besides the factors."""
METADATA_KEY = "lora_adapter_metadata"
"""The key of a safetensors file's metadata under which diffusers, and Rankwise, put the configuration as JSON."""
LINEAGE_KEY = "rankwise_lineage"
"""The key under which Rankwise writes what an adapter was made from, as JSON."""

MAX_CONFIG_BYTES = 4 * 1024 * 1024
MAX_CONFIG_DEPTH = 32
MAX_KEY_LENGTH = 500
MAX_COMPONENTS = 16
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def is_pickle_name(name: str) -> bool:
    """Whether files of that name are pickles: by their ending, of litgpt (lit_model.pth.lora) by the one before it."""
    return name.lower().removesuffix(".lora").endswith(_PICKLE_SUFFIXES)


@dataclass(frozen=True)
class AdapterLayout:
    """An adapter's files, understood from their headers.

    Attributes:
        format: "peft" with an adapter_config.json, "safetensors-metadata" with the configuration inside the file; else
            the name of the reader in `artifacts.formats` that knows the file's keys.
        configs: the configuration of each component; one entry "" when the file holds one model's adapter, or has none.
        document: the configuration as it was written; of a foreign file, what was understood of it.
        match: which tensor is what.
        reading: what was read of a foreign file; None for PEFT's own.
    """

    format: str
    weights_path: Path
    config_path: Path | None
    header: SafetensorsHeader
    configs: Mapping[str, PeftLoraConfig]
    document: Mapping[str, Any]
    match: KeyMatch
    reading: Reading | None = None

    @property
    def config(self) -> PeftLoraConfig:
        """The configuration; of the first component when there are several."""
        return next(iter(self.configs.values()))

    @property
    def modules(self) -> tuple[LoraModule, ...]:
        return self.match.modules

    @property
    def refusals(self) -> tuple[str, ...]:
        """Why the adapter can not be merged; empty when it can."""
        reasons = [reason for config in self.configs.values() for reason in config.refusals]
        return tuple(dict.fromkeys([*reasons, *self.match.refusals]))

    @property
    def facts(self) -> FormatFacts:
        """What was understood of the file besides its modules."""
        return facts_of(self.modules, self.config.method, self.refusals, self.reading)

    @property
    def verdicts(self) -> tuple[KeyVerdict, ...]:
        """What became of every key, in the order of the file."""
        return verdicts_of(self.header, self.match) if self.reading is None else self.reading.verdicts


def read_layout(path: Path) -> AdapterLayout:
    """Understand the adapter at `path`: a PEFT directory, or one safetensors file of any format of `artifacts.formats`.

    Raises:
        FormatUnknown: no weights, several, or nothing that is known as an adapter.
        ConfigRefused: the configuration is missing, invalid or can not be honoured.
        FileBroken: the weights do not fit the format or the configuration.
        PickleRefused: the weights are a pickle.
    """
    weights = _weights_path(path)
    header = read_header(weights)
    named = configured_reader(header.tensors)
    config_path = path / (CONFIG_NAME if named is None else named.settings_name)
    document = read_json(config_path) if path.is_dir() and config_path.is_file() else None
    layout = understand(header, FileValues(weights), document, weights, config_path)
    if path.is_dir() and (path / EMBEDDINGS_NAME).is_file():
        reason = f"{EMBEDDINGS_NAME} holds embedding rows besides the factors"
        return replace(layout, match=replace(layout.match, refusals=(*layout.match.refusals, reason)))
    return layout


def understand(
    header: SafetensorsHeader, values: Values, document: Mapping[str, Any] | None, weights: Path, config_path: Path
) -> AdapterLayout:
    """As `read_layout`, of what was read: the header, and adapter_config.json if there is one; of a
    format whose scaling stands in another file, that file."""
    _check_names(header)
    named = configured_reader(header.tensors)
    if named is not None:
        if document is None:
            raise ConfigRefused(
                f"{named.settings_name} is missing: it looks like {named.description}, "
                "whose tensors do not tell its scaling.",
                hint=f"Send {named.settings_name} along, as it stands beside the weights.",
            )
        return _foreign(weights, header, values, {}, named.settings(document))
    if document is not None and "lora_parameters" in document and "peft_type" not in document:
        raise FormatUnknown(
            f"{CONFIG_NAME} is mlx-lm's, and the file has no pair lora_a and lora_b of a layer that begins with "
            f"model.layers., as mlx-lm's adapters of language models have: its first key is {_first(header)!r}.",
            hint="Rename the layers as transformers does, or save the adapter with PEFT.",
        )
    if document is not None:
        return _layout("peft", weights, config_path, header, {"": parse_config(document)}, document)
    text = header.metadata.get(METADATA_KEY)
    if text is None:
        return _foreign(weights, header, values, {})
    document = parse_json(text, METADATA_KEY)
    configs = _component_configs(document)
    if _has_old_names(header):
        return _foreign(weights, header, values, {name.removesuffix("."): config for name, config in configs.items()})
    return _layout("safetensors-metadata", weights, None, header, configs, document)


def _first(header: SafetensorsHeader) -> str:
    return next(iter(header.tensors), "")[:80]


def _has_old_names(header: SafetensorsHeader) -> bool:
    """Whether the factors do not carry PEFT's names, which the configuration in the metadata is about."""
    ends = (".lora.down.weight", ".lora_down.weight", "_lora.down.weight", ".lora_linear_layer.down.weight")
    return any(key.endswith(ends) for key in header.tensors)


def _foreign(
    weights: Path,
    header: SafetensorsHeader,
    values: Values,
    configs: Mapping[str, PeftLoraConfig],
    told: Settings = NOTHING_TOLD,
) -> AdapterLayout:
    """A file without PEFT's configuration, or with one that tells the scaling of each component."""
    try:
        reading = read_keys(header, values, configs=configs, told=told)
    except FormatUnknown as error:
        raise _unknown(header, error) from error
    document = document_of(reading)
    reasons = tuple(reason for config in configs.values() for reason in config.refusals)
    found = replace(config_of(reading, document), refusals=reasons)
    return AdapterLayout(reading.format, weights, None, header, {"": found}, document, match_of(reading), reading)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of at most `MAX_CONFIG_BYTES`.

    Raises:
        ConfigRefused: too large, no UTF-8, no JSON, NaN or Infinity, a key twice, or no object.
    """
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise ConfigRefused(f"{path.name} has {path.stat().st_size} bytes; at most {MAX_CONFIG_BYTES} are accepted.")
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigRefused(f"{path.name} is not UTF-8 text: {error}.") from error
    return parse_json(text, path.name)


def parse_json(text: str, name: str) -> dict[str, Any]:
    """As `read_json`, from text."""

    def twice(key: str) -> ConfigRefused:
        return ConfigRefused(f"{name} names {key[:80]!r} twice.")

    def refuse(constant: str) -> Any:
        raise ConfigRefused(f"{name} holds {constant}, which is not JSON.")

    try:
        document = json.loads(text, object_pairs_hook=unique_members(twice), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ConfigRefused(f"{name} is not valid JSON: {error}.") from error
    if not isinstance(document, dict):
        raise ConfigRefused(f"{name} is a JSON {type(document).__name__}, not an object.")
    _check_values(document, name)
    return document


def _check_values(document: dict[str, Any], name: str) -> None:
    """Refuse what a database or another JSON reader would stumble over, so that it never gets there."""
    level: list[Any] = [document]
    for _ in range(MAX_CONFIG_DEPTH):
        following: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                following += [*value, *value.values()]
            elif isinstance(value, list):
                following += value
            elif isinstance(value, str) and not _is_text(value):
                raise ConfigRefused(f"{name} holds text with NUL or broken Unicode: {value[:40]!r}.")
            elif isinstance(value, (int, float)) and not abs(value) < 2**63:  # true for NaN as well
                raise ConfigRefused(f"{name} holds a number that is too large.")
        if not following:
            return
        level = following
    raise ConfigRefused(f"{name} is nested more than {MAX_CONFIG_DEPTH} levels deep.")


def _is_text(value: str) -> bool:
    return "\0" not in value and not any("\ud800" <= character <= "\udfff" for character in value)


def _check_names(header: SafetensorsHeader) -> None:
    for key in header.tensors:
        if not key.isprintable() or len(key) > MAX_KEY_LENGTH:
            raise FileBroken(f"The tensor name {key[:80]!r} is too long, or has characters that can not be printed.")


def _weights_path(path: Path) -> Path:
    if not path.is_dir():
        return path
    if (path / WEIGHTS_NAME).is_file():
        return path / WEIGHTS_NAME
    found = sorted(entry for entry in path.glob("*.safetensors") if entry.is_file())
    if len(found) == 1:
        return found[0]
    if found:
        raise FormatUnknown(
            f"Several safetensors files and none is called {WEIGHTS_NAME}: "
            f"{', '.join(entry.name for entry in found[:20])}.",
            hint="Send one adapter at a time.",
        )
    pickles = sorted(entry.name for entry in path.iterdir() if is_pickle_name(entry.name))
    if pickles:
        raise PickleRefused(
            f"The weights are a pickle: {', '.join(pickles[:20])}.",
            hint="Convert them: load the adapter in PEFT and save it with safe_serialization=True.",
        )
    raise FormatUnknown(f"There is no {WEIGHTS_NAME}.", hint="Send the files that PEFT's save_pretrained writes.")


def _component_configs(document: Mapping[str, Any]) -> dict[str, PeftLoraConfig]:
    """One configuration per component ("unet", "transformer", …) of diffusers' flattened metadata, or one in all."""
    if "r" in document or "peft_type" in document:
        return {"": parse_config({"peft_type": "LORA", **document})}
    parts: dict[str, dict[str, Any]] = {}
    for key, value in document.items():
        component, dot, field = key.partition(".")
        if not dot or not component or not field:
            raise ConfigRefused(f"{METADATA_KEY} has the key {key[:80]!r}; expected are fields, or component.field.")
        parts.setdefault(f"{component}.", {"peft_type": "LORA"})[field] = value
    if not parts:
        raise ConfigRefused(f"{METADATA_KEY} is empty.")
    if len(parts) > MAX_COMPONENTS:
        raise ConfigRefused(
            f"{METADATA_KEY} names {len(parts)} components; a pipeline has at most {MAX_COMPONENTS} that are adapted."
        )
    return {component: parse_config(fields) for component, fields in sorted(parts.items())}


def _unknown(header: SafetensorsHeader, error: FormatUnknown) -> ConfigRefused | FormatUnknown:
    """The reason in words for a file that no reader understands."""
    layout = identify(header)
    if layout.name == "text-encoder":
        return FormatUnknown(
            f"{layout.sentence[0].upper()}{layout.sentence[1:-1]}: its first key is {next(iter(header.tensors))!r}.",
            hint="Text encoders are read that ComfyUI calls clip_l, clip_g, clip_h and t5xxl. Save others with PEFT, "
            "under the names that their own model has.",
        )
    if layout.name in ("peft", "lora-bare", "lora-lowercase", "adalora"):
        return ConfigRefused(
            f"{CONFIG_NAME} is missing, and the file has no {METADATA_KEY} in its metadata.",
            hint="The tensors do not tell alpha and the scaling. Send adapter_config.json along, as PEFT saved it.",
        )
    if layout.name in ("full-model", "empty", "unknown", "alpha-only") or not is_reader(layout.name):
        if layout.name == "mixed":
            return error
        return FormatUnknown(
            f"Not an adapter: {layout.sentence}",
            hint="Send a LoRA as PEFT, diffusers, kohya, ComfyUI or another of the formats that are read writes it.",
        )
    return error


def _layout(
    kind: str,
    weights: Path,
    config_path: Path | None,
    header: SafetensorsHeader,
    configs: Mapping[str, PeftLoraConfig],
    document: Mapping[str, Any],
) -> AdapterLayout:
    found = identify(header)
    match = _join([_match(header, config, component, found) for component, config in configs.items()])
    known = {*match.used, *(entry.key for entry in match.ignored)}
    homeless = [key for key in sorted(header.tensors) if key not in known]
    if homeless:
        reason = f"belongs to none of the components in the metadata ({', '.join(sorted(configs))})"
        factors = [key for key in homeless if (part := part_of(key)) is not None and part.role in (A, B)]
        refusals = (f"{len(factors)} factors, for instance {factors[0]!r}: {reason}",) if factors else ()
        match = _join(
            [
                match,
                KeyMatch(
                    (),
                    tuple(IgnoredKey(key, reason) for key in homeless),
                    warnings=(f"{len(homeless)} tensors, for instance {homeless[0]!r}: {reason}.",),
                    refusals=refusals,
                ),
            ]
        )
    return AdapterLayout(kind, weights, config_path, header, configs, document, match)


def _match(header: SafetensorsHeader, config: PeftLoraConfig, component: str, layout: Identification) -> KeyMatch:
    if config.peft_type in BLOCK_TYPES:
        return match_blocks(header, config, component=component)
    if not config.opaque:
        return match_keys(header, config, component=component, layout=layout)
    keys = tuple(key for key in sorted(header.tensors) if key.startswith(component))
    if not keys:
        raise FormatUnknown("The file holds no tensors.")
    return KeyMatch((), (), used=keys)


def _join(matches: list[KeyMatch]) -> KeyMatch:
    return KeyMatch(
        tuple(sorted((module for match in matches for module in match.modules), key=lambda module: module.path)),
        tuple(entry for match in matches for entry in match.ignored),
        tuple(key for match in matches for key in match.used),
        tuple(text for match in matches for text in match.warnings),
        tuple(reason for match in matches for reason in match.refusals),
    )
