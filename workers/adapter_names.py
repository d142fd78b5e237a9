"""What an adapter is called that nobody gave a name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath

from artifacts.layout import CONFIG_NAME, WEIGHTS_NAME

NAME_LIMIT = 200
_STANDARD_NAMES = frozenset({WEIGHTS_NAME, CONFIG_NAME})
_SUFFIXES = (".safetensors", ".gguf", ".zip", ".tar.gz", ".tgz", ".tar")


def default_name(names: Sequence[str], method: str, made: str = "merge") -> str:
    """ "merge of a + b (lego)", shortened in the middle to what a name may have."""
    name, tail = f"{made} of " + " + ".join(names), f" ({method})"
    if len(name) + len(tail) > NAME_LIMIT:
        name = name[: NAME_LIMIT - len(tail) - 1] + "…"
    return name + tail


def name_of_files(file_names: Sequence[str]) -> str:
    """A name for an upload without one: that of its file, unless PEFT always calls it so."""
    for file_name in file_names:
        base = PurePosixPath(file_name.replace("\\", "/")).name
        if base in _STANDARD_NAMES:
            continue
        suffix = next((item for item in _SUFFIXES if base.lower().endswith(item)), None)
        stem = base[: -len(suffix)] if suffix else ""
        clean = "".join(character for character in stem if character.isprintable()).strip()[:NAME_LIMIT]
        if clean:
            return clean
    return "adapter"
