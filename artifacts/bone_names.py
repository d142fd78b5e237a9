"""Old BONE adapters under their present names: PEFT calls them MiSS since 0.16 and reads no BONE since 0.19."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from artifacts.errors import FileBroken
from artifacts.layout import CONFIG_NAME, WEIGHTS_NAME, read_json
from artifacts.renaming import rename_tensors
from artifacts.safetensors_header import SafetensorsHeader, read_header

_OLD, _NEW = ".bone_", ".miss_"
_CONCERNED = re.compile(rb'"peft_type"\s*:\s*"(?:BONE|MISS)"')


def modernise(directory: Path) -> tuple[str, ...]:
    """Rewrite a BONE adapter in `directory` as the MiSS adapter that it is, so that the PEFT of today loads it.

    Every tensor keeps its bytes. `.bone_` becomes `.miss_` in the names, `peft_type` becomes MISS. `init_weights`
    chooses the algorithm: before PEFT 0.14 BONE meant, with `true`, what is called "bat" now, which the blocks' three
    dimensions show; then it becomes "bat". Files of other adapters are not touched.

    Returns:
        What was changed, in sentences; empty when nothing was. The changed files are new ones: a hard link elsewhere
        keeps the old bytes.

    Raises:
        FileBroken: two tensors would get one name, or the weights are broken.
        ConfigRefused: the configuration is no JSON.
    """
    config_path, weights = directory / CONFIG_NAME, directory / WEIGHTS_NAME
    if not config_path.is_file() or not _CONCERNED.search(config_path.read_bytes()):
        return ()
    document = read_json(config_path)
    if document.get("peft_type") not in ("BONE", "MISS"):
        return ()
    header = read_header(weights)
    said = [*_rename_tensors(weights, header), *_update(document, header)]
    if said:
        _replace(config_path, (json.dumps(document, indent=2, sort_keys=True) + "\n").encode())
    return tuple(said)


def _rename_tensors(weights: Path, header: SafetensorsHeader) -> list[str]:
    names = {name: name.replace(_OLD, _NEW) for name in header.tensors}
    renamed = sorted(name for name, new in names.items() if new != name)
    if not renamed:
        return []
    if len(set(names.values())) != len(names):
        twice = next(name for name in renamed if names[name] in header.tensors)
        raise FileBroken(f"The file holds both {twice!r} and {names[twice]!r}.", hint="Upload each adapter by itself.")
    rename_tensors(weights, header, names)
    said = (
        f"{len(renamed)} tensors were renamed, {_OLD!r} to {_NEW!r} in each name, for instance {renamed[0]!r} to "
        f"{names[renamed[0]]!r}; their values are as uploaded."
    )
    return [said]


def _update(document: dict[str, Any], header: SafetensorsHeader) -> list[str]:
    said = []
    if document["peft_type"] == "BONE":
        document["peft_type"] = "MISS"
        if document.get("bias") == "Bone_only":
            document["bias"] = "MiSS_only"
        said.append("peft_type was BONE and is now MISS, the name under which PEFT loads it since 0.19.")
    blocks = [info for name, info in header.tensors.items() if name.endswith((f"{_OLD}block", f"{_NEW}block"))]
    meant = document.get("init_weights", True)
    if blocks and all(len(info.shape) == 3 for info in blocks) and meant != "bat":
        document["init_weights"] = "bat"
        said.append(
            f'init_weights was {json.dumps(meant)} and is now "bat": the blocks have three dimensions, so the adapter '
            "is of the first form of Bone, which PEFT renamed."
        )
    return said


def _replace(path: Path, content: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    partial.replace(path)
