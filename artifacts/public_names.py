"""What a base model is called in what is handed out: by a name of a hub or of the registry, never by a folder of
somebody's machine, which means nothing elsewhere and is nobody else's business."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from artifacts.errors import ConfigRefused
from artifacts.layout import METADATA_KEY, parse_json

NAME_FIELDS = ("base_model_name_or_path", "tokenizer_name_or_path")
"""Fields of an adapter_config.json that name a model; PEFT writes into them whatever the model was loaded from."""
_DRIVE = re.compile(r"[A-Za-z]:[/\\]")


def is_path(name: str) -> bool:
    """Whether the name is a path on a disk, or looks like one: a repository of a hub is `owner/name` at most."""
    return name.startswith(("/", ".", "~")) or "\\" in name or name.count("/") > 1 or _DRIVE.match(name) is not None


def public_name(*names: str | None) -> str | None:
    """The first name that is no path."""
    return next((name for name in names if name and not is_path(name)), None)


def public_config(document: Mapping[str, Any], base_model: str | None) -> Mapping[str, Any]:
    """The configuration with `base_model`, or null where that is a path too, in the place of every path of a model; the
    document itself where there is none. Fields of components (`unet.base_model_name_or_path`) are looked at as well."""
    told = public_name(base_model)
    changes = {
        key: told if key.endswith(NAME_FIELDS[0]) else None
        for key, value in document.items()
        if key.rpartition(".")[2] in NAME_FIELDS and isinstance(value, str) and is_path(value)
    }
    return {**document, **changes} if changes else document


def public_metadata(metadata: Mapping[str, str], base_model: str | None) -> Mapping[str, str]:
    """The same for the configuration among the strings of a safetensors file's header, if there is one."""
    if METADATA_KEY not in metadata:
        return metadata
    try:
        document = parse_json(metadata[METADATA_KEY], METADATA_KEY)
    except ConfigRefused:  # beside an adapter_config.json nobody reads it
        return metadata
    told = public_config(document, base_model)
    if told is document:
        return metadata
    return {**metadata, METADATA_KEY: json.dumps(told, sort_keys=True)}
